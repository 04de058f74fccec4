"""A case that trains straight through and again from its own checkpoint: do the two agree, and if not, what was lost?

Parameters say whether they agree. Why they do not is read from the first step that differs: its gradient is known from
the rows that went forward, so AdamW can be repeated with every state that the trainer may have started from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thence.audit.judge.weights import step_rows
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import RESPONSE_ROLES, CaseResult, Finding
from thence.audit.solve.observation import Observation, forward_rows, load_states
from thence.audit.solve.sequences import Piece, find_pieces

if TYPE_CHECKING:
    from thence.audit.judge.case import Judge

APART = 1e-3
"""Norm of the difference of two runs over that of one step that arithmetic alone may cause, in float32."""
EXPLAINED = 5e-3
"""Norm of what is left of an update after AdamW was repeated, over that of the update."""
RATE = 1e-2
"""Relative difference of two learning rates that is no rounding."""

TINY = 1e-30


@dataclass(frozen=True)
class AdamState:
    """The state of AdamW over all parameters, flat, float64."""

    first: Tensor
    second: Tensor
    steps: int


def judge_resume(judge: Judge, observed: Observation, said: Mapping[str, Any]) -> CaseResult:
    """Compare the run that started again from a checkpoint with the one that went straight through.

    Args:
        said: by the adapter: ``own_position`` where its own loop remembers the position in the data.
    """
    case, ranks = observed.case, len(observed.records)
    straight, differ = load_states(observed.folder, ranks)
    resumed, differ_later = load_states(observed.folder, ranks, "resumed", case.save_after)
    if len(straight) <= case.save_after + 1 or not resumed:
        reason = "the adapter kept no parameters of a run that started again, or no steps after its checkpoint"
        return CaseResult(case, "not judged", reason, seconds=observed.seconds)
    comparison = _Comparison(judge, observed, straight, resumed)
    findings = [*differ, *differ_later, *comparison.findings()]
    left, taken = len(straight) - 1 - case.save_after, len(resumed) - 1
    steps = f"rows and parameters of {taken} steps after step {case.save_after} compared with a run without a break"
    own, unseen = bool(said.get("own_position")), ()
    if own:
        unseen = ("position in the data: the stack does not keep it, so the audit's own loop went on at the right row",)
    kept = ["optimizer state"] * (case.optimizer == "adamw") + ["schedule"] * (case.schedule != "constant")
    kept += ["position in the data"] * (not own)
    words = f"{', '.join(['weights', *kept])}; {steps}"
    if taken != left:
        detail = f"{taken} steps were taken after resuming where the run without a break took {left}"
        findings.append(Finding("resume-differs", "fault", detail))
    unique = tuple(reversed({finding.id: finding for finding in reversed(findings)}.values()))
    return CaseResult(case, "judged", "", (), unique, observed.seconds, said=words, unseen=unseen)


class _Comparison:
    """Two runs of one case; ``resumed[0]`` are the parameters as they were loaded."""

    def __init__(
        self,
        judge: Judge,
        observed: Observation,
        straight: Sequence[Mapping[str, Tensor]],
        resumed: Sequence[Mapping[str, Tensor]],
    ):
        self.judge, self.observed, self.case = judge, observed, observed.case
        self.straight, self.resumed = straight, resumed
        self.start = self.case.save_after
        self.solver = judge.solver(straight[0])
        self.names = self.solver.differentiator.names

    def findings(self) -> list[Finding]:
        """What was lost between the two runs, or that they differ and nobody can say why."""
        found = [*self._loaded(), *self._data()]
        differs = self._first_difference()
        if differs is None:
            return found
        found += self._explain(differs)
        if not found:
            steps = f"after step {differs} the parameters differ from those of the run without a break"
            detail = f"{steps} by {self._distance(differs):.2g} of the size of that step"
            found.append(Finding("resume-differs", "fault", detail))
        return found

    def _loaded(self) -> list[Finding]:
        """Whether training starts again from the parameters that were there when it was saved."""
        lacking = [name for name in self.names if name not in self.resumed[0]]
        if lacking:
            detail = f"{len(lacking)} parameters are not there after resuming, {lacking[0]} among them"
            return [Finding("resume-weights", "fault", detail)]
        loaded, kept = self._flat(self.resumed[0]), self._flat(self.straight[self.start])
        size = (kept - self._flat(self.straight[self.start - 1])).norm()
        if (loaded - kept).norm() <= APART * size:
            return []
        for step, state in enumerate(self.straight):
            if step != self.start and (loaded - self._flat(state)).norm() <= APART * size:
                return [Finding("resume-weights", "fault", f"training starts again from the parameters of step {step}")]
        detail = f"the loaded parameters differ by {(loaded - kept).norm() / size:.2g} of a step from those saved"
        for dtype in (torch.bfloat16, torch.float16):
            if (loaded - kept.to(dtype).double()).norm() <= APART * size:
                detail = f"the loaded parameters are rounded to {str(dtype).removeprefix('torch.')}"
        return [Finding("resume-weights", "fault", detail)]

    def _data(self) -> list[Finding]:
        """Whether every step after resuming trains the rows that it trains in the run without a break."""
        for step in range(self.start + 1, self._last + 1):
            straight, resumed = (sorted(p.example + 1 for p in self._pieces(step, run)) for run in ("step", "resumed"))
            if not straight or not resumed or straight == resumed:
                continue
            earlier = [self._examples(s) for s in range(1, step)]
            again = next((s for s, rows in enumerate(earlier, 1) if rows == resumed), None)
            later = [s for s in range(step + 1, len(self.straight)) if self._examples(s) == resumed]
            how = f" again, those of step {again}" if again else ", so rows are skipped" if later else ""
            detail = (
                f"step {step} trains examples {_numbers(resumed)}{how}; the run without a break trains "
                f"{_numbers(straight)}"
            )
            return [Finding("resume-data", "fault", detail)]
        return []

    def _first_difference(self) -> int | None:
        """The first step after resuming whose update is not that of the run without a break."""
        for step in range(self.start + 1, self._last + 1):
            if self._distance(step) > APART:
                return step
        return None

    def _distance(self, step: int) -> float:
        """Norm of the difference of a step's two updates over that of the straight run's."""
        straight, resumed = self._update(step, "step"), self._update(step, "resumed")
        return float((straight - resumed).norm() / straight.norm().clamp_min(TINY))

    def _explain(self, step: int) -> list[Finding]:
        """What AdamW started from in the first step that differs; nothing if no state that was tried gives it."""
        states, rates = [self._nothing()], []
        for number in range(1, step + 1):
            gradient = self._gradient(number, "step")
            if gradient is None:
                return []
            after = self._advance(states[-1], gradient)
            rate, rest = _fit(self._update(number, "step"), self._direction(after))
            if rest > EXPLAINED:
                return []  # this trainer's step is not the AdamW asked for: its weights say so in other cases
            states.append(after)
            rates.append(rate)
        gradient = self._gradient(step, "resumed")
        if gradient is None:
            return []
        update = self._update(step, "resumed")
        fits = []
        for words, state in self._beginnings(states, step - 1):
            rate, rest = _fit(update, self._direction(self._advance(state, gradient)))
            fits.append((rest, words, rate))
        best = fits[0] if fits[0][0] <= EXPLAINED else min(fits)
        if best[0] > EXPLAINED:
            return []
        found = []
        if best[1]:
            found.append(Finding("resume-optimizer", "fault", f"step {step} is that of an optimizer {best[1]}"))
        if not _near(best[2], rates[-1]):
            same = [s for s, rate in enumerate(rates, 1) if _near(best[2], rate)]
            known = f", that of step {same[0]}," if same else ""
            detail = f"the learning rate of step {step} is {best[2]:.4g}{known} where it was {rates[-1]:.4g}"
            found.append(Finding("resume-schedule", "fault", f"{detail} in the run without a break"))
        return found

    def _beginnings(self, states: Sequence[AdamState], done: int) -> list[tuple[str, AdamState]]:
        """States that a step may have started from, each with words for what is wrong; the right one first."""
        whole, none = states[done], self._nothing()
        found = [
            ("", whole),
            ("without any state of the steps before", none),
            ("whose first moments were lost", AdamState(none.first, whole.second, whole.steps)),
            ("whose second moments were lost", AdamState(whole.first, none.second, whole.steps)),
            ("whose moments were lost, but not its count of steps", AdamState(none.first, none.second, whole.steps)),
            ("whose count of steps was lost", AdamState(whole.first, whole.second, 0)),
        ]
        return [*found, *((f"with the state of step {s}", states[s]) for s in range(done - 1, 0, -1))]

    @property
    def _last(self) -> int:
        return self.start + min(len(self.resumed), len(self.straight) - self.start) - 1

    def _states(self, run: str) -> tuple[Sequence[Mapping[str, Tensor]], int]:
        return (self.straight, 0) if run == "step" else (self.resumed, self.start)

    def _update(self, step: int, run: str) -> Tensor:
        states, first = self._states(run)
        return self._flat(states[step - 1 - first]) - self._flat(states[step - first])

    def _pieces(self, step: int, run: str) -> list[Piece]:
        rows = forward_rows(self.observed.records, step - 1, self.judge.pad, run)
        pieces, strange = find_pieces(rows, self.judge.known, self.judge.end)
        return [] if strange else pieces

    def _examples(self, step: int) -> list[int]:
        return sorted(piece.example + 1 for piece in self._pieces(step, "step"))

    def _gradient(self, step: int, run: str) -> Tensor | None:
        """Gradient of the objective asked for in the rows of a step, flat; None where they were not seen."""
        pieces = self._pieces(step, run)
        if not pieces:
            return None
        states, first = self._states(run)
        self.solver.move_to(states[step - 1 - first])
        weights = OBJECTIVES[self.case.asked].weights(step_rows(pieces, RESPONSE_ROLES, 0.0))
        return self._flat(self.solver.differentiator.objective(pieces, weights))

    def _advance(self, state: AdamState, gradient: Tensor) -> AdamState:
        one, two = self.case.betas
        first = one * state.first + (1 - one) * gradient
        return AdamState(first, two * state.second + (1 - two) * gradient**2, state.steps + 1)

    def _direction(self, state: AdamState) -> Tensor:
        """The step that AdamW takes with a learning rate of one."""
        one, two = self.case.betas
        size = (state.second / (1 - two**state.steps)).sqrt() + self.case.eps
        return state.first / (1 - one**state.steps) / size

    def _nothing(self) -> AdamState:
        zero = torch.zeros_like(self._flat(self.straight[0]))
        return AdamState(zero, zero, 0)

    def _flat(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[name].double().reshape(-1) for name in self.names])


def _fit(update: Tensor, direction: Tensor) -> tuple[float, float]:
    """The factor of a direction in an update, and the share of the update that is left."""
    factor = float(update @ direction / (direction @ direction).clamp_min(TINY))
    return factor, float((update - factor * direction).norm() / update.norm().clamp_min(TINY))


def _near(rate: float, other: float) -> bool:
    return abs(rate - other) <= RATE * abs(other)


def _numbers(examples: Sequence[Any]) -> str:
    return ", ".join(map(str, examples))
