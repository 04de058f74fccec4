"""The steps of a case of reinforcement learning, judged together against the policy objective asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from thence.audit.judge.evidence import Evidence
from thence.audit.judge.policy_record import EDGES, PolicyRecord, StepSource, by_piece, recorded
from thence.audit.judge.weights import FLOORS, SIGMAS
from thence.audit.objectives import OBJECTIVES
from thence.audit.policy.change import Hypothesis
from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.observed import Observed, Variant, worst
from thence.audit.policy.predict import token_weights
from thence.audit.policy.read import LogProbabilities, PolicyFacts, read_step
from thence.audit.policy.search import Explained, search
from thence.audit.result import RESPONSE_ROLES, Finding, PolicyCheck, SequenceWeights, StepResult, TokenWeight
from thence.audit.solve.sequences import Piece
from thence.audit.solve.solver import Explanation, ObservedUpdate, StepSolver
from thence.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

_WARMER = 1.05
SMALL = 0.01
"""Weights below this share of the mean one have no ratio of their own: their deviation is shown over the mean."""


class PolicyCase:
    """Collects the optimizer steps of one case, then judges them together.

    Args:
        evidence: whose ``policy`` and ``facts`` were said.
        states: parameters before the first step and after each, as they are followed.
    """

    def __init__(self, evidence: Evidence, precision: str, texts: Sequence[str]):
        assert evidence.policy is not None and evidence.facts is not None
        self.asked: PolicyObjective = evidence.policy
        self.facts: PolicyFacts = evidence.facts
        self._states, self._precision, self._texts = evidence.states, precision, texts
        self._logs: LogProbabilities | None = None
        self.records: list[PolicyRecord] = []

    def step(self, solver: StepSolver, index: int, pieces: Sequence[Piece]) -> PolicyStep:
        """The facts of a step. Leaves the solver's model at another version.

        Raises:
            UserError: what was said is wrong or not enough.
        """
        self._logs = self._logs or LogProbabilities(solver.differentiator, self._states)
        return read_step(self.facts, index, pieces, self._logs, self.asked.temperature)

    def predicted(self, solver: StepSolver, index: int, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Weights of every target of each piece under the objective asked for. Leaves the model at another version."""
        step = self.step(solver, index, pieces)
        return by_piece(token_weights(step, self.asked), pieces)

    def add(
        self,
        solver: StepSolver,
        index: int,
        update: ObservedUpdate,
        state: Mapping[str, Tensor],
        *,
        sized: bool,
    ) -> None:
        """Take a step in.

        Args:
            solver: at the temperature asked for.
            state: the parameters before the step.
            sized: whether the learning rate is known and nothing clips.

        Raises:
            UserError: what was said is wrong or not enough.
        """
        step = self.step(solver, index, update.pieces)
        assert self._logs is not None
        source = StepSource(solver, self._logs, self.facts, state, update, index, sized, self._precision)
        self.records.append(recorded(source, step, self.asked, EDGES[self._precision]))

    def finish(self) -> tuple[list[StepResult], PolicyCheck]:
        """Judge all steps taken in, together.

        Raises:
            UserError: some update is no weighted sum of token gradients, and nothing that was tried explains it.
        """
        observed = [record.observed for record in self.records]
        spanned = all(record.explanation.fits for record in self.records)
        explained = search(observed, self.asked, spanned)
        findings = self._findings(explained)
        found = tuple(h.detail for h in explained.found)
        check = PolicyCheck(self.asked.plain(), found=found, others=explained.others)
        if explained.clean:
            check = replace(check, **self._scope(explained))
        alike = tuple(name for name in OBJECTIVES if explained.clean and self._alike(observed, name))
        results = []
        for record in self.records:
            faulty = record.observed.index in explained.faulty
            results.append(self.result(record, findings if faulty else (), alike, explained.found))
        return results, check

    def _findings(self, explained: Explained) -> tuple[Finding, ...]:
        if explained.clean:
            return ()
        still = [
            r.observed.index for r in self.records if r.observed.index in explained.faulty and r.observed.system.empty
        ]
        if explained.found and set(still) == set(explained.faulty):
            # Nothing speaks for any change of the objective but that it, too, would leave the parameters alone.
            many = "steps" if len(still) > 1 else "step"
            detail = f"optimizer {many} {', '.join(map(str, still))} changed no parameter, though a gradient was due"
            others = "; ".join([*(h.detail for h in explained.found), *explained.others])
            return (Finding("no-step", "fault", f"{detail} (so would it be if {others})"),)
        if explained.found:
            also = ""
            if explained.others:
                also = f" (or: {'; '.join(explained.others)}: this probe cannot tell them apart)"
            return tuple(Finding(h.finding, "fault", h.detail + also) for h in explained.found)
        for record in self.records:
            if record.observed.index not in explained.faulty:
                continue
            if record.observed.system.empty:
                detail = f"optimizer step {record.observed.index} changed no parameter"
                return (Finding("no-step", "fault", detail),)
            if not record.explanation.fits:
                raise UserError(
                    f"{record.explanation.fit.residual:.0%} of the update of step {record.observed.index} is no "
                    "weighted sum of token gradients",
                    remedy="switch off what else is in the loss",
                )
        return (Finding("unnamed", "fault", self._unnamed(explained)),)

    def _unnamed(self, explained: Explained) -> str:
        """The token that is farthest from what was asked."""
        record = next(r for r in self.records if r.observed.index in explained.faulty)
        share = record.observed.distance(Variant(record.observed.step, self.asked)).share
        step, ideal = record.observed.step, token_weights(record.observed.step, self.asked)
        response = [t.role in RESPONSE_ROLES for t in record.explanation.design.targets]
        weights = _recovered(record.explanation, ideal)[0][response]
        far = int(np.argmax(np.abs(weights - ideal)))
        return (
            f"{share:.0%} of the update of step {record.observed.index} is not as asked; token "
            f"{step.place[far] + 1} of the response of example {step.example[step.row[far]] + 1} has weight "
            f"{weights[far]:.3g} where {ideal[far]:.3g} was asked for"
        )

    def _scope(self, explained: Explained) -> dict[str, Any]:
        """The parts that are verified, and those that are not."""
        still = dict(explained.open)
        if not self.asked.kl:
            still.setdefault("KL", "none was asked for; a KL of steps where the policy is the reference would not show")
        reasons = {
            "importance weights": (
                self.asked.correction == "none",
                "the rollouts hold no log-probabilities of a sampler",
            ),
            "responses cut at the length limit": (True, "the rollouts hold none"),
            "tokens of the environment": (True, "the rollouts hold none"),
            "groups of equal rewards": (True, "the rollouts hold none"),
        }
        for part, (named, reason) in reasons.items():
            if part not in explained.tried and named:
                still.setdefault(part, reason)
        if any(o.step.versions and np.abs(o.step.logp - o.step.reference).max() > 1e-6 for o in self._observed()):
            still.pop("KL", None)
        verified = tuple(part for part in explained.tried if part not in still)
        observed = self._observed()
        if not any(o.system.signs for o in observed) and any(o.step.outside["prompt"].any() for o in observed):
            # Every weight of theirs would be in the update, and nothing is left of it.
            verified = (*verified, "prompts")
        other, distance = self.records[0].observed.at_temperature(_WARMER * self.asked.temperature)
        if distance(token_weights(other, self.asked)).share > self.records[0].observed.system.tolerance:
            verified = (*verified, "temperature")
        if "KL" not in still and not self.asked.kl and self._no_kl():
            verified = (*verified, "no KL")
        return {"verified": verified, "open": still}

    def _no_kl(self) -> bool:
        """Whether a small KL in the loss would show."""
        some = [replace(self.asked, kl=1e-2, estimator=name) for name in ("k1", "k2", "k3")]
        observed = self._observed()
        return all(worst(observed, [Variant(o.step, asked) for o in observed]) > 1 for asked in some)

    def _observed(self) -> list[Observed]:
        return [record.observed for record in self.records]

    def _alike(self, observed: Sequence[Observed], name: str) -> bool:
        """Whether another normaliser gives the same updates."""
        if name == self.asked.normaliser or (name == "constant-divisor" and not self.asked.longest):
            return False
        return worst(observed, [Variant(o.step, replace(self.asked, normaliser=name)) for o in observed]) <= 1

    def result(
        self,
        record: PolicyRecord,
        findings: Sequence[Finding],
        alike: tuple[str, ...] = (),
        found: Sequence[Hypothesis] = (),
    ) -> StepResult:
        """A step with the weights of its tokens beside those asked for."""
        named = [h.finding for h in found if h.finding in OBJECTIVES]
        explanation, step = record.explanation, record.observed.step
        ideal = token_weights(step, self.asked)
        system = record.observed.system
        scale = system.scale(system.spread(ideal))
        weights, errors, mixed = _recovered(explanation, ideal)
        response = np.array([t.role in RESPONSE_ROLES for t in explanation.design.targets])
        whole = np.zeros(len(response))
        whole[response] = ideal
        mean = float(np.abs(ideal).mean()) or 1.0
        clear = np.abs(whole) > SMALL * mean
        size = 1.0 if system.sized else float(weights @ whole) / (float(whole @ whole) or 1.0) or 1.0
        ratio = np.where(clear, weights / np.where(clear, whole, 1.0) / size, 0.0)
        ratio = np.where(clear, ratio, (response & (whole != 0)) + (weights / size - whole) / mean)
        shown = ratio[response & clear] if (response & clear).any() else np.ones(1)
        lost = float((np.abs(whole) * np.clip(1 - ratio, 0, None)).sum() / (np.abs(whole).sum() or 1.0))
        return StepResult(
            index=record.observed.index,
            objective=named[0] if named and findings else self.asked.normaliser,
            alike=alike,
            residual=explanation.fit.residual,
            residual_sequences=explanation.residual_sequences,
            condition=explanation.fit.condition,
            error=float(np.median(SIGMAS * errors[response] / mean)) + FLOORS[self._precision],
            scale=scale if system.sized else None,
            smallest=float(shown.min()),
            largest=float(shown.max()),
            lost=lost,
            roles={str(r): float(ratio[_roles(explanation) == r].mean()) for r in dict.fromkeys(_roles(explanation))},
            sequences=_sequences(explanation, record.update.pieces, weights, whole, ratio, self._texts),
            findings=tuple(findings),
            undetermined=int((mixed & response).sum()),
        )


def _recovered(explanation: Explanation, ideal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight and error of every target, and which cannot be determined: those are taken to be as asked.

    Targets that share a column share what it deviates by.
    """
    targets = explanation.design.targets
    column = np.array([t.column for t in targets])
    asked = np.zeros(len(targets))
    asked[[t.role in RESPONSE_ROLES for t in targets]] = ideal
    total = np.bincount(column, asked)[column]
    shared = explanation.design.shared[column]
    deviation = explanation.fit.weights[column] - total
    undetermined = explanation.fit.undetermined[column]
    weights = np.where(undetermined, asked, asked + deviation / shared)
    return weights, explanation.fit.errors[column], undetermined


def _roles(explanation: Explanation) -> np.ndarray:
    return np.array([t.role for t in explanation.design.targets])


def _sequences(
    explanation: Explanation,
    pieces: Sequence[Piece],
    weights: np.ndarray,
    ideal: np.ndarray,
    ratio: np.ndarray,
    texts: Sequence[str],
) -> tuple[SequenceWeights, ...]:
    result = []
    targets = explanation.design.targets
    for index, piece in enumerate(pieces):
        own = [t for t, target in enumerate(targets) if target.piece == index]
        tokens = tuple(
            TokenWeight(
                texts[piece.ids[targets[t].place]] if piece.ids[targets[t].place] < len(texts) else "?",
                targets[t].role,
                float(weights[t]),
                float(ideal[t]),
                float(ratio[t]),
            )
            for t in own
        )
        acting = [token.ratio for token in tokens if token.ideal]
        mean = float(np.mean(acting)) if acting else 0.0
        result.append(SequenceWeights(piece.example, piece.micro_batch, piece.rank, mean, tokens))
    return tuple(result)
