"""From what a case left behind (parameters before and after, rows that went forward) to its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thence.audit.judge.adapted import add_adapters, followed
from thence.audit.judge.cuts import FirstUpdate, compare_cuts, first_update
from thence.audit.judge.diagnose import diagnose_step, objective_findings
from thence.audit.judge.objectives import OBJECTIVES
from thence.audit.judge.repeats import per_example
from thence.audit.judge.untouched import find_untouched, partly_finding, untouched_finding
from thence.audit.judge.weights import FLOORS, AskedObjective, step_rows
from thence.audit.judge.windows import planned_places, planned_steps, window_findings
from thence.audit.result import RESPONSE_ROLES, Case, CaseResult, Finding, StepResult
from thence.audit.solve.explain import explain
from thence.audit.solve.gradients import Differentiator
from thence.audit.solve.observation import ForwardRow, Observation, forward_rows, load_states
from thence.audit.solve.probe import Probe, vocabulary
from thence.audit.solve.recover import LeastSquares, gradient_of_update, rounding_noise
from thence.audit.solve.sequences import KnownExample, Piece, find_pieces, planned_pieces
from thence.audit.solve.signs import FLOOR as SIGN_FLOOR
from thence.audit.solve.signs import WRONG, SignRegression, looks_like_signs
from thence.audit.solve.solver import Explanation, ObservedUpdate, StepSolver
from thence.errors import UserError

RESIDUALS = {"float32": 1e-4, "bfloat16": 8e-2, "autocast": 8e-2}
"""Residuals that arithmetic alone may leave, by precision; rounding of the stored parameters comes on top."""
MANTISSA = {"torch.float32": 23, "torch.bfloat16": 7, "torch.float16": 10, "torch.float64": 52}
DROWNED = 0.3
"""An update whose rounding noise is a larger share than this cannot be judged."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a case that was run.

    Args:
        states: parameters before the first step and after each, by name.
        rows: that went forward in each step, where they were watched; else
        pieces: of each step as planned.
        advantages: one factor an example, for policy-gradient losses; None: supervised.
        longest: constant of a constant divisor, tokens; 0: not known.
        lr: learning rate, where it is not the case's.
        scale_known: False where learning rate or optimizer are not known.
        frozen: parameters that are not meant to be trained, by name.
    """

    states: Sequence[Mapping[str, Tensor]]
    rows: Sequence[Sequence[ForwardRow]] | None = None
    pieces: Sequence[Sequence[Piece]] | None = None
    advantages: Sequence[float] | None = None
    longest: float = 0.0
    lr: float | None = None
    scale_known: bool = True
    frozen: frozenset[str] = frozenset()


class Judge:
    """Judges cases of one probe; keeps the model in float64 and the gradients at the parameters last seen.

    Args:
        model: a copy of the probe's model; becomes float64.
        known: the examples.
        texts: of the tokens, by id.
        pad: id of the padding token.
        end: id of the end-of-turn token; None: the last trained token of a row.

    Attributes:
        updates: of the first step of every case judged so far, by the case's name.
    """

    def __init__(
        self, model: nn.Module, known: Sequence[KnownExample], texts: Sequence[str], pad: int, end: int | None
    ):
        self.model, self.known, self.texts, self.pad, self.end = model, list(known), list(texts), pad, end
        self.updates: dict[str, FirstUpdate] = {}
        self._solvers: dict[tuple, StepSolver] = {}
        self._probe: Probe | None = None
        self._adapted: dict[str, Judge] = {}
        self.trains: frozenset[str] = frozenset()  # of a judge with adapters

    @classmethod
    def of_probe(cls, probe: Probe) -> Judge:
        """The judge of a probe in its folder."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(probe.model, attn_implementation="eager")
        ids = vocabulary()
        known = []
        for example, (row, labels) in zip(probe.examples, probe.rows, strict=True):
            prompt = tuple(ids[c] for c in example.prompt)
            response = tuple(ids[c] for c in example.response)
            known.append(KnownExample(prompt, response, row, labels))
        judge = cls(model, known, list(ids), ids["<|pad|>"], ids["<|end|>"])
        judge._probe = probe
        return judge

    def observation(self, observed: Observation) -> CaseResult:
        """Judge what an adapter's processes left behind.

        Raises:
            UserError: the trained model has no parameter of the probe's.
        """
        case = observed.case
        if observed.status != "done":
            return CaseResult(case, observed.status, observed.reason, seconds=observed.seconds)  # pyright: ignore
        states, findings = load_states(observed.folder, len(observed.records))
        if not states:
            return CaseResult(case, "failed", "the adapter kept no parameters", seconds=observed.seconds)
        said: dict[str, Any] = {}
        for record in observed.records:
            said |= record["said"]
        evidence = Evidence(
            states,
            rows=[forward_rows(observed.records, step, self.pad) for step in range(max(len(states) - 1, 1))],
            advantages=said.get("advantages"),
            longest=float(said.get("longest", 0.0)),
            lr=said.get("lr"),
            frozen=frozenset(name for record in observed.records for name in record.get("frozen", ())),
        )
        judge: Judge = self
        if "lora" in said:
            try:
                judge = self.with_adapters(said["lora"])
                trained, moved = followed(judge.model, judge.trains, states)
            except UserError as error:
                return CaseResult(case, "not judged", str(error), seconds=observed.seconds)
            evidence, findings = replace(evidence, states=trained), [*findings, *moved]
        result = judge.case(case, evidence)
        return replace(result, findings=(*findings, *result.findings), seconds=observed.seconds)

    def with_adapters(self, said: Mapping[str, Any]) -> Judge:
        """The judge of the same probe with LoRA adapters in the model.

        Raises:
            UserError: peft is not installed, or cannot make such adapters; or this is the judge of no probe.
        """
        key = repr(sorted(said.items()))
        if key not in self._adapted:
            if self._probe is None:
                raise UserError(
                    "adapters are judged on the audit's own probe only",
                    remedy="audit the trainer through an adapter of `thence audit`",
                )
            judge = Judge.of_probe(self._probe)
            judge.updates = self.updates
            judge.trains = add_adapters(judge.model, said)
            self._adapted[key] = judge
        return self._adapted[key]

    def case(self, case: Case, evidence: Evidence) -> CaseResult:
        """Judge the steps of a case, in order, up to the first that cannot be judged.

        Raises:
            UserError: the trained model has no parameter of the probe's.
        """
        walk = _Walk(self, case, evidence)
        status, reason = "judged", ""
        try:
            for step in range(1, len(evidence.states)):
                if not walk.step(step):
                    break
            else:
                walk.count_steps()
        except _NotJudged as stop:
            status, reason = "not judged", str(stop)
        return CaseResult(case, status, reason, tuple(walk.results), _unique(walk.findings))

    def compare_cuts(self, results: Sequence[CaseResult]) -> list[CaseResult]:
        """The results with the finding ``depends-on-cut`` where one cut moves the model elsewhere than another."""
        return compare_cuts(results, self.updates)

    def plan(self, case: Case, *, cut_known: bool = True) -> list[list[Piece]]:
        """The pieces of every step, if rows are taken in order and dealt to ranks micro-batch by micro-batch.

        Args:
            cut_known: False where nobody knows how the trainer cuts the rows into micro-batches and ranks.
        """
        steps = planned_places(case)
        if not cut_known:
            steps = [[(example, None, None) for example, _, _ in places] for places in steps]
        return [planned_pieces(self.known, places) for places in steps]

    def solver(
        self, state: Mapping[str, Tensor], regression: type[LeastSquares] | type[SignRegression] = LeastSquares
    ) -> StepSolver:
        """The solver over the parameters that a snapshot and the probe's model share.

        Raises:
            UserError: they share none.
        """
        parameters = dict(self.model.named_parameters())
        names = tuple(n for n in parameters if n in state and state[n].shape == parameters[n].shape)
        if not names:
            raise UserError(
                f"the trained model has no parameter of the probe's (but {', '.join(list(state)[:3])} ...)",
                remedy="write the model in the Hugging Face layout",
            )
        if (names, regression) not in self._solvers:
            self._solvers[names, regression] = StepSolver(Differentiator(self.model, names), regression)
        return self._solvers[names, regression]


class _NotJudged(Exception):
    """A step that cannot be judged; the message says why."""


class _Walk:
    """The steps of one case, judged one after the other; ``results`` and ``findings`` grow."""

    def __init__(self, judge: Judge, case: Case, evidence: Evidence):
        self.judge, self.case, self.evidence = judge, case, evidence
        self.results: list[StepResult] = []
        self.findings: list[Finding] = []
        self._gradients: list[np.ndarray] = []
        self._seen: dict[int, int] = {}
        narrow = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in evidence.states[0].values())
        self._precision = "bfloat16" if narrow and case.precision == "float32" else case.precision
        self._repeated = False
        self._left_out = set(evidence.frozen)
        self._solver = judge.solver(self._trained(0))

    def step(self, step: int) -> bool:
        """Judge one step, the first is 1. Returns whether the next one can be judged. Raises _NotJudged."""
        evidence = self.evidence
        before, after = (self._solver.differentiator.flat(evidence.states[i]) for i in (step - 1, step))
        if not np.any(before - after):
            self.findings.append(Finding("no-step", "fault", f"optimizer step {step} changed no parameter"))
            self._gradients.append(np.zeros_like(before))
            return True
        pieces, rows, problem = self._examples(step)
        partly = self._untouched(step, pieces)
        before, after = (self._solver.differentiator.flat(evidence.states[i]) for i in (step - 1, step))
        noise = rounding_noise(before, after, self._bits(step))
        if step == 1 and pieces:
            examples = [piece.example for piece in pieces]
            found = first_update(self._trained(0), self._trained(1), examples, noise, self._precision)
            self.judge.updates[self.case.name] = found
        if not problem and noise > DROWNED:
            problem = f"the update drowns in the rounding of the parameters ({noise:.0%}); raise the learning rate"
        if problem:
            raise _NotJudged(problem)
        return self._fit(step, pieces, rows, (before, after), noise, partly)

    def _fit(
        self,
        step: int,
        pieces: Sequence[Piece],
        rows: Sequence[ForwardRow],
        flat: tuple[np.ndarray, np.ndarray],
        noise: float,
        partly: Finding | None,
    ) -> bool:
        """Recover the weights of a step from the parameters before and after it, and judge them."""
        before, after = flat
        floor, tolerance = FLOORS[self._precision], max(RESIDUALS[self._precision], 4 * noise)
        solver, state = self._solver, self._trained(step - 1)
        if self.case.optimizer == "unknown" and looks_like_signs(before - after):
            if step > 1:
                raise _NotJudged("of Adam as it is, only the first step can be judged")
            gradient, floor, tolerance = before - after, SIGN_FLOOR, WRONG
            solver = self.judge.solver(state, SignRegression)
        else:
            lr = self.case.lr if self.evidence.lr is None else self.evidence.lr
            gradient = gradient_of_update(before, after, self.case.optimizer, lr, self.case.eps)
        solver.move_to(state)
        earlier = self._gradients[::-1][:2]
        asked = (self.case.label_smoothing, self.case.ranks, self.case.clip)
        update = ObservedUpdate(gradient, pieces, rows, tolerance, earlier, before, *asked)
        explanation = explain(solver, update)
        self._gradients.append(gradient)
        if not explanation.fits:
            self.findings.append(_differs_by_parameter(solver, update, explanation))
            return False
        result = diagnose_step(step, explanation, pieces, self._asked(pieces), self.judge.texts, floor)
        findings = (*result.findings, *objective_findings(self.case, result))
        if partly is not None and not any(finding.kind == "fault" for finding in findings):
            findings = (*findings, partly)
        result = replace(result, findings=findings)
        self.results.append(per_example(result, self.case.asked) if self._repeated else result)
        return True

    def _untouched(self, step: int, pieces: Sequence[Piece]) -> Finding | None:
        """Note parameters that never moved; those of step 1 are left out of the fit, so that the rest is judged.

        Returns what is to be said of parameters that moved in part, if nothing else is wrong.
        """
        if not pieces:
            planned = self.judge.plan(self.case)
            pieces = planned[step - 1] if step <= len(planned) else ()
        if not pieces:
            return None
        before, after = self._trained(step - 1), self._trained(step)
        self._solver.move_to(before)
        weights = self._asked(pieces)
        ideal = OBJECTIVES[self.case.asked].weights(step_rows(pieces, RESPONSE_ROLES, weights.longest))
        expected = self._solver.differentiator.objective(pieces, ideal * weights.advantages)
        found = find_untouched(before, after, expected, self._bits(step))
        if found.whole:
            self.findings.append(untouched_finding(found))
        if found.whole and step == 1 and len(found.whole) < found.tensors:
            self._left_out |= set(found.whole)
            self._solver = self.judge.solver(self._trained(0))
        return partly_finding(found) if found.parts else None

    def _trained(self, step: int) -> dict[str, Tensor]:
        """The parameters after a step, without those that are not to be looked at."""
        return {n: t for n, t in self.evidence.states[step].items() if n not in self._left_out}

    def _bits(self, step: int) -> int:
        return MANTISSA[str(next(iter(self.evidence.states[step].values())).dtype)]

    def count_steps(self) -> None:
        """Say so where fewer optimizer steps were taken than were due."""
        taken, due = len(self.evidence.states) - 1, planned_steps(self.case)
        if taken == 0:
            detail = f"{self.case.examples} examples went in and no optimizer step was taken"
            self.findings.append(Finding("no-step", "fault", detail))
        elif taken < due and self.evidence.rows is not None:
            detail = f"{taken} optimizer steps were taken where {due} were due"
            self.findings.append(Finding("window-dropped", "note", detail))

    def _examples(self, step: int) -> tuple[list[Piece], Sequence[ForwardRow], str]:
        """The pieces of a step, its rows where they were watched, and why they cannot be judged, if so."""
        evidence = self.evidence
        rows: Sequence[ForwardRow] = ()
        pieces: list[Piece] = []
        if evidence.rows is not None:
            rows = evidence.rows[step - 1]
            pieces, strange = find_pieces(rows, self.judge.known, self.judge.end)
            if strange or not pieces:
                return [], rows, _strange(strange, rows)
            found = window_findings(self.case, step, pieces, self._seen)
            self._repeated = any(finding.id == "rows-repeated" for finding in found)
            self.findings += found
        elif evidence.pieces is not None:
            pieces = list(evidence.pieces[step - 1])
        advantages = evidence.advantages
        unseen = [p.example + 1 for p in pieces if advantages is not None and not advantages[p.example]]
        if unseen:
            problem = f"example {unseen[0]} has advantage zero, so nothing can be seen of it; choose other rewards"
            return pieces, rows, problem
        return pieces, rows, ""

    def _asked(self, pieces: Sequence[Piece]) -> AskedObjective:
        case, advantages = self.case, self.evidence.advantages
        return AskedObjective(
            case.asked,
            np.array([1.0 if advantages is None else advantages[p.example] for p in pieces]),
            case.accumulation,
            case.ranks,
            self.evidence.scale_known and case.clip == 0 and case.optimizer != "unknown",
            self.evidence.longest,
        )


def _differs_by_parameter(solver: StepSolver, update: ObservedUpdate, explanation: Explanation) -> Finding:
    """An update that is no weighted sum of token gradients as a whole may be one parameter by parameter.

    Raises:
        _NotJudged: it is not, or all parameters got the same rows.
    """
    parts = solver.by_parameter(update)
    good = {name: weights for name, (weights, residual) in parts.items() if residual <= 10 * update.tolerance}
    if parts and len(good) == len(parts):
        shapes: dict[tuple[float, ...], list[str]] = {}
        for name, weights in good.items():
            key = tuple(np.round(weights / max(np.abs(weights).max(), 1e-12), 2).tolist())
            shapes.setdefault(key, []).append(name)
        if len(shapes) > 1:
            rare = min(shapes.values(), key=len)
            detail = f"{len(rare)} of {len(good)} parameters ({', '.join(rare[:3])}) got other rows than the rest"
            return Finding("differs-by-parameter", "fault", detail)
    raise _NotJudged(
        f"the update is not a weighted sum of token gradients: residual {explanation.fit.residual:.2g} per token, "
        f"{explanation.residual_sequences:.2g} per sequence, {update.tolerance:.2g} allowed"
    )


def _strange(strange: int, rows: Sequence[ForwardRow]) -> str:
    if not rows:
        return "no forward pass was seen in this step"
    return f"{strange or len(rows)} of {len(rows)} rows that went forward hold none of the probe's examples"


def _unique(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    unique: dict[str, Finding] = {}
    for finding in findings:
        unique.setdefault(finding.id, finding)
    return tuple(unique.values())
