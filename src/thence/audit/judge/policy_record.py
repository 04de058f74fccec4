"""One optimizer step of a policy: its update beside the gradients of tokens, entropies and the exact KL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.observed import Observed, Variant
from thence.audit.policy.predict import beside_weights, sensitivity
from thence.audit.policy.read import LogProbabilities, PolicyFacts, read_step
from thence.audit.policy.system import Distance, UpdateSystem
from thence.audit.policy.whole import measure_of
from thence.audit.result import RESPONSE_ROLES
from thence.audit.solve.explain import padding_targets
from thence.audit.solve.sequences import Piece
from thence.audit.solve.signs import SignRegression
from thence.audit.solve.solver import Explanation, ObservedUpdate, StepSolver

EDGES = {"float32": 1e-4, "bfloat16": 0.1, "autocast": 0.1}
"""How far rounding may move a log-ratio, by precision."""

LOOSEST = 0.2
"""Share of an update that may be left unexplained where weights are very sensitive to rounding."""


@dataclass(frozen=True)
class PolicyRecord:
    """A step with its update solved for the weights of all tokens.

    Args:
        explanation: of the update without the entropy and the exact KL that were asked for: these are no weights of
            tokens.
    """

    observed: Observed
    update: ObservedUpdate
    explanation: Explanation


@dataclass(frozen=True)
class StepSource:
    """Where the gradients of a step come from.

    Args:
        solver: at the temperature asked for.
        state: the parameters before the step.
        index: of the step, 1 for the first.
        sized: whether the learning rate is known and nothing clips.
        precision: of the step.
    """

    solver: StepSolver
    logs: LogProbabilities
    facts: PolicyFacts
    state: Mapping[str, Tensor]
    update: ObservedUpdate
    index: int
    sized: bool
    precision: str

    @property
    def signs(self) -> bool:
        """Whether nothing but signs is left of the update."""
        return self.solver.regression is SignRegression

    def beside(self, asked: PolicyObjective) -> np.ndarray:
        """Gradients of the entropy at every response token, then of the exact KL or the divergence there.

        Returns:
            Shape (2 T, coordinates).
        """
        pieces, version = self.update.pieces, min(self.facts.reference, self.index - 1)
        theirs = self.logs.logits(version, pieces)
        if asked.divergence != "none":
            theirs = [self._of_the_teacher(p, logits, version) for p, logits in zip(pieces, theirs, strict=True)]
        self.solver.move_to(self.state)
        kept = [[role in RESPONSE_ROLES for role in piece.roles[1:]] for piece in pieces]
        gradients, measure = self.solver.differentiator.beside, measure_of(asked)
        found = [gradients(piece.ids, logits, measure) for piece, logits in zip(pieces, theirs, strict=True)]
        return np.concatenate([b[i][k] for i in (0, 1) for b, k in zip(found, kept, strict=True)])

    def _of_the_teacher(self, piece: Piece, logits_TV: Tensor, version: int) -> Tensor:
        """The same logits with the teacher's at the response's targets; all the same where no teacher reads it."""
        before = self.facts.rollouts[piece.example].teacher_prompt
        if not before:
            return logits_TV
        targets = [t for t, role in enumerate(piece.roles[1:]) if role in RESPONSE_ROLES]
        row = replace(piece, ids=(*before, *(piece.ids[t + 1] for t in targets)))
        changed = logits_TV.clone()
        changed[targets] = self.logs.logits(version, [row])[0][len(before) - 1 :]
        return changed

    def padding(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gradients of padding behind the responses, shape (padding, coordinates), and how much of it each row has.

        First masked from attention, then not; nothing where no row has padding.
        """
        self.solver.move_to(self.state)
        for masked in (True, False):
            pads = padding_targets(self.solver, self.update.rows, masked)
            if pads:
                counts = np.bincount([row for row, _, _ in pads], minlength=len(self.update.rows))
                own = np.array([counts[piece.row] for piece in self.update.pieces])
                yield np.stack([tokens.gradients[t - 1] for _, tokens, t in pads]), own

    def at_temperature(self, temperature: float) -> tuple[PolicyStep, Callable[[np.ndarray], Distance]]:
        """See :class:`Observed`."""
        pieces, update = self.update.pieces, self.update
        other = read_step(self.facts, self.index, pieces, self.logs, temperature)
        self.solver.move_to(self.state)

        def distance(weights: np.ndarray) -> Distance:
            self.solver.move_to(self.state)
            found = self.solver.differentiator.weighted(pieces, by_piece(weights, pieces), temperature)
            flat = self.solver.differentiator.flat(found)[None]
            own = UpdateSystem(
                flat, np.zeros(1, int), update.gradient, update.tolerance, sized=self.sized, signs=self.signs,
                precision=self.precision,
            )  # fmt: skip
            return own.distance(np.ones(1))

        return other, distance


def recorded(source: StepSource, step: PolicyStep, asked: PolicyObjective, width: float) -> PolicyRecord:
    """The update of a step, ready for hypotheses, and solved.

    Args:
        width: see :class:`Observed`.
    """
    solver, update = source.solver, source.update
    solver.move_to(source.state)
    solver.trim()
    explanation = solver.plain(update)
    design = explanation.design
    column = np.array([t.column for t in design.targets if t.role in RESPONSE_ROLES])
    roles = np.full(len(design.columns), "prompt", dtype="<U8")
    for target in design.targets:
        roles[target.column] = target.role

    tolerance = max(update.tolerance, min(update.tolerance * sensitivity(step, asked), LOOSEST))

    def system(more: np.ndarray, loose: int = 0) -> UpdateSystem:
        columns = np.concatenate([design.columns, more]) if len(more) else design.columns
        return UpdateSystem(
            columns, column, update.gradient, tolerance, sized=source.sized, signs=source.signs, loose=loose,
            precision=source.precision,
        )  # fmt: skip

    def leaked() -> UpdateSystem:
        return system(np.stack(update.earlier), loose=len(update.earlier))

    def padded() -> list[Observed]:
        found = []
        for pads, counts in source.padding():
            wider = np.concatenate([roles, np.full(len(pads), "padding")])
            own = replace(step, outside={**step.outside, "padding": counts})
            widened = lambda p=pads: system(np.concatenate([p, source.beside(asked)]))  # noqa: E731
            found.append(
                replace(observed, step=own, system=system(pads), roles=wider, widened=widened, leaked=None, _wide=[])
            )
        return found

    observed = Observed(
        source.index,
        width,
        step,
        system(np.empty(0)),
        roles,
        lambda: system(source.beside(asked)),
        leaked if update.earlier and not source.signs else None,
        source.at_temperature,
        padded,
    )
    if not source.signs and any(weights.any() for weights in beside_weights(step, asked)):
        factor = observed.distance(Variant(step, asked)).factor
        others = factor * np.concatenate(beside_weights(step, asked)) @ source.beside(asked)
        solver.move_to(source.state)
        explanation = solver.plain(replace(update, gradient=update.gradient - others))
    return PolicyRecord(observed, update, explanation)


def by_piece(weights: np.ndarray, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """Weights of response tokens, shape (T,), as weights of every target of each piece."""
    found, start = [], 0
    for piece in pieces:
        response = np.array([role in RESPONSE_ROLES for role in piece.roles[1:]], bool)
        own = np.zeros(len(response))
        own[response] = weights[start : start + response.sum()]
        start += int(response.sum())
        found.append(own)
    return found
