"""The optimizer steps of one case, judged one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from thence.audit.judge.cuts import first_update
from thence.audit.judge.diagnose import diagnose_step, objective_findings
from thence.audit.judge.evidence import UNEXPLAINED, Evidence, NotJudged
from thence.audit.judge.forms import merged
from thence.audit.judge.policy import PolicyCase
from thence.audit.judge.reading import Reading, of_any_signs, read_step, unverified, what_made_it
from thence.audit.judge.repeats import per_example
from thence.audit.judge.untouched import find_untouched, not_finite, partly_finding, untouched_finding
from thence.audit.judge.weights import AskedObjective, step_rows
from thence.audit.judge.windows import planned_steps, window_findings
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import RESPONSE_ROLES, Case, Finding, PolicyCheck, StepResult
from thence.audit.solve.explain import explain
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.recover import rounding_noise
from thence.audit.solve.sequences import Piece, find_pieces
from thence.audit.solve.signs import SignRegression
from thence.audit.solve.solver import Explanation, ObservedUpdate, StepSolver
from thence.errors import UserError

if TYPE_CHECKING:
    from thence.audit.judge.case import Judge

MANTISSA = {"torch.float32": 23, "torch.bfloat16": 7, "torch.float16": 10, "torch.float64": 52}
FAR = 0.05
"""An update that plain weights explain but for this share is nearly the gradient; its signs alone prove nothing."""
USUAL_CAUSES = (
    "dropout left on; a loss term that is no token weight (auxiliary loss, KL penalty, regulariser); another chat "
    "template, truncation or attention mask than the audit assumes; several optimizer steps"
)


class Walk:
    """The steps of one case, judged one after the other; ``results`` and ``findings`` grow."""

    def __init__(self, judge: Judge, case: Case, evidence: Evidence):
        self.judge, self.case, self.evidence = judge, case, evidence
        self.results: list[StepResult] = []
        self.findings: list[Finding] = []
        self.check: PolicyCheck | None = None
        self._gradients: list[np.ndarray] = []
        self._seen: dict[int, int] = {}
        narrow = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in evidence.states[0].values())
        self._precision = "bfloat16" if narrow and case.precision == "float32" else case.precision
        self._repeated = False
        self._left_out = set(evidence.frozen)
        self._temperature = evidence.policy.temperature if evidence.policy is not None else 1.0
        self._solver = judge.solver(self._trained(0), temperature=self._temperature)
        self._policy: PolicyCase | None = None
        if evidence.policy is not None:
            self._policy = PolicyCase(evidence, self._precision, judge.texts)

    def step(self, step: int) -> bool:
        """Judge one step, the first is 1. Returns whether the next one can be judged. Raises NotJudged."""
        evidence = self.evidence
        if broken := not_finite(evidence.states[step]):
            self.findings.append(Finding("not-finite", "fault", f"after optimizer step {step} {broken}"))
            raise NotJudged(f"after step {step} {broken}")
        before, after = (self._solver.differentiator.flat(evidence.states[i]) for i in (step - 1, step))
        if not np.any(before - after) and self._policy is None:
            self.findings.append(Finding("no-step", "fault", f"optimizer step {step} changed no parameter"))
            self._gradients.append(np.zeros_like(before))
            return True
        pieces, rows, problem = self._examples(step)
        blind = self.case.optimizer == "unknown" and evidence.seen is None
        if blind and (reason := merged(self._trained(step - 1), self._trained(step), self._bits(step))):
            raise NotJudged(reason)
        partly = self._untouched(step, pieces)
        before, after = (self._solver.differentiator.flat(evidence.states[i]) for i in (step - 1, step))
        if step == 1 and pieces and np.any(before - after):
            _keep_update(self, pieces, rounding_noise(before, after, self._bits(step)))
        if problem:
            raise NotJudged(problem)
        return self._fit(step, pieces, rows, (before, after), partly)

    def _fit(
        self,
        step: int,
        pieces: Sequence[Piece],
        rows: Sequence[ForwardRow],
        flat: tuple[np.ndarray, np.ndarray],
        partly: Finding | None,
    ) -> bool:
        """Recover the weights of a step from the parameters before and after it, and judge them."""
        reading = read_step(
            self.case, self.evidence, step, flat, self._bits(step), self._precision, _seen_gradient(self)
        )
        if self._policy is not None:
            solver, update = self._observed(step, reading, pieces, rows, flat[0])
            self._gradients.append(update.gradient)
            return self._take_in(self._policy, solver, step, update)
        solver, update, explanation = _explain(self, step, reading, pieces, rows, flat[0])
        if not explanation.fits and reading.source == "update" and self.case.optimizer == "unknown" and step == 1:
            # An optimizer may keep the signs of the gradient and choose the sizes itself.
            other = of_any_signs(flat[0] - flat[1], self._precision)
            found = _explain(self, step, other, pieces, rows, flat[0], briefly=True)
            if found[2].fits and explanation.fit.residual > FAR:
                reading, (solver, update, explanation) = other, found
        self._gradients.append(update.gradient)
        if not explanation.fits:
            form = what_made_it(self.case, self.evidence, reading)
            self.findings.append(_differs_by_parameter(solver, update, explanation, form))
            return False
        result = diagnose_step(step, explanation, pieces, self._asked(pieces), self.judge.texts, reading.floor)
        findings = _without_own_sizes(self.case, (*result.findings, *objective_findings(self.case, result)))
        right = self.case.asked == result.objective and all(finding.kind == "choice" for finding in findings)
        if reading.source == "signs" and explanation.rule < 0 and right:
            signs, columns = np.count_nonzero(reading.gradient), len(explanation.design.columns)
            raise NotJudged(f"{signs} signs do not tell whether the weights of {columns} tokens are those asked for")
        if partly is not None and not any(finding.kind == "fault" for finding in findings):
            findings = (*findings, partly)
        if reading.relation is not None and reading.relation.decay:
            detail = f"the parameters themselves enter with factor {reading.relation.decay:.3g}"
            findings = (*findings, Finding("weight-decay", "note", detail))
        unseen = (*unverified(reading, self.evidence.seen), *self.evidence.unseen)
        if self.evidence.frozen:
            count, all_of = len(self.evidence.frozen), len(self.evidence.states[0])
            unseen += (f"{count} of {all_of} parameters: they need no gradient, and are taken for frozen on purpose",)
        result = replace(result, findings=findings, source=reading.source, unseen=unseen)
        self.results.append(per_example(result, self.case.asked) if self._repeated else result)
        return True

    def _observed(
        self, step: int, reading: Reading, pieces: Sequence[Piece], rows: Sequence[ForwardRow], before: np.ndarray
    ) -> tuple[StepSolver, ObservedUpdate]:
        """What a reading says of a step, and the solver at its parameters."""
        state, case, asked = self._trained(step - 1), self.case, self._asked(pieces)
        solver = self.judge.solver(state, reading.regression, self._temperature)
        solver.move_to(state)
        # Earlier gradients are of use where they were read in the same way.
        earlier = self._gradients[::-1][:2]
        lengths = step_rows(pieces, RESPONSE_ROLES, asked.longest)
        order = sorted(OBJECTIVES, key=lambda name: name != case.asked)
        rules = [OBJECTIVES[name].weights(lengths) * asked.advantages for name in order]
        update = ObservedUpdate(
            reading.gradient, pieces, rows, reading.tolerance, earlier, before, case.label_smoothing, case.ranks,
            case.clip, rules, self._precision,
        )  # fmt: skip
        return solver, update

    def _take_in(self, policy: PolicyCase, solver: StepSolver, step: int, update: ObservedUpdate) -> bool:
        """Hand a step over to the policy's case. Raises NotJudged."""
        try:
            policy.add(solver, step, update, self._trained(step - 1), sized=self._sized())
        except UserError as error:
            raise NotJudged(str(error)) from error
        return True

    def finish(self) -> None:
        """Judge what can only be judged over all steps. Raises NotJudged."""
        if self._policy is not None:
            try:
                results, self.check = self._policy.finish()
            except UserError as error:
                raise NotJudged(error.problem) from error
            self.results += results

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
        expected = self._expected(step, pieces)
        found = find_untouched(before, after, expected, self._bits(step))
        if found.whole:
            self.findings.append(untouched_finding(found))
        if found.whole and step == 1 and len(found.whole) < found.tensors:
            self._left_out |= set(found.whole)
            self._solver = self.judge.solver(self._trained(0), temperature=self._temperature)
        return partly_finding(found) if found.parts else None

    def _expected(self, step: int, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """The gradient that the objective asked for gives. Raises NotJudged."""
        if self._policy is not None:
            try:
                tokens = self._policy.predicted(self._solver, step, pieces)
            except UserError as error:
                raise NotJudged(str(error)) from error
            self._solver.move_to(self._trained(step - 1))
            return self._solver.differentiator.weighted(pieces, tokens)
        self._solver.move_to(self._trained(step - 1))
        weights = self._asked(pieces)
        ideal = OBJECTIVES[self.case.asked].weights(step_rows(pieces, RESPONSE_ROLES, weights.longest))
        return self._solver.differentiator.objective(pieces, ideal * weights.advantages)

    def _trained(self, step: int) -> dict[str, Tensor]:
        """The parameters after a step, without those that are not to be looked at."""
        return {n: t for n, t in self.evidence.states[step].items() if n not in self._left_out}

    def _bits(self, step: int) -> int:
        return MANTISSA[str(next(iter(self.evidence.states[step].values())).dtype)]

    def _examples(self, step: int) -> tuple[list[Piece], Sequence[ForwardRow], str]:
        """The pieces of a step, its rows where they were watched, and why they cannot be judged, if so."""
        evidence = self.evidence
        rows: Sequence[ForwardRow] = ()
        pieces: list[Piece] = []
        if evidence.rows is not None:
            rows = evidence.rows[step - 1]
            hidden = evidence.policy is not None and evidence.policy.truncated == "mask"
            pieces, strange = find_pieces(rows, self.judge.known, self.judge.end, hidden, self._seen)
            if strange or not pieces:
                return [], rows, _strange(strange, rows)
            found = window_findings(self.case, step, pieces, self._seen, evidence.policy is not None)
            self._repeated = any(finding.id == "rows-repeated" for finding in found)
            self.findings += found
        elif evidence.pieces is not None:
            pieces = list(evidence.pieces[step - 1])
        advantages = evidence.advantages if self._policy is None else None
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
            self._sized(),
            self.evidence.longest,
        )

    def _sized(self) -> bool:
        """Whether the size of an update says something."""
        return self.evidence.scale_known and self.case.clip == 0 and self.case.optimizer != "unknown"


def _keep_update(walk: Walk, pieces: Sequence[Piece], noise: float) -> None:
    """For the comparison with other cuts."""
    seen, examples = walk.evidence.seen, [piece.example for piece in pieces]
    states = walk._trained(0), walk._trained(1)
    whole = seen is not None and seen.whole and walk.case.optimizer == "unknown"
    gradient = {n: g for n, g in seen.gradients.items() if n in states[0]} if seen and whole else None
    found = first_update(*states, examples, noise, walk._precision, walk._bits(1), gradient)
    walk.judge.updates[walk.case.name] = found


def _seen_gradient(walk: Walk) -> np.ndarray | None:
    """The gradient that the optimizer was given as one vector, if nothing but its one step moved the parameters."""
    seen = walk.evidence.seen
    if seen is None or not seen.whole:
        return None
    gradients = {n: seen.gradients.get(n, torch.zeros_like(t)) for n, t in walk._trained(0).items()}
    return walk._solver.differentiator.flat(gradients)


def count_steps(walk: Walk) -> None:
    """Say so where fewer optimizer steps were taken than were due."""
    taken, due = len(walk.evidence.states) - 1, planned_steps(walk.case)
    if taken == 0:
        detail = f"{walk.case.examples} examples went in and no optimizer step was taken"
        walk.findings.append(Finding("no-step", "fault", detail))
    elif taken < due and walk.evidence.rows is not None:
        detail = f"{taken} optimizer steps were taken where {due} were due"
        walk.findings.append(Finding("window-dropped", "note", detail))


def _without_own_sizes(case: Case, findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """An optimizer that nobody knows may scale parameters on purpose. Raises NotJudged: nothing else is wrong."""
    own = [f for f in findings if f.id == "scale-by-parameter" and case.optimizer == "unknown"]
    others = tuple(f for f in findings if f not in own)
    if own and not any(f.kind == "fault" for f in others):
        raise NotJudged(
            f"{own[0].detail}: layer-wise optimizers (LARS) and learning rates of parameter groups do that, "
            "and so do faults; give lr if it is plain SGD"
        )
    return others


def _explain(
    walk: Walk,
    step: int,
    reading: Reading,
    pieces: Sequence[Piece],
    rows: Sequence[ForwardRow],
    before: np.ndarray,
    briefly: bool = False,
) -> tuple[StepSolver, ObservedUpdate, Explanation]:
    """The explanation of a reading, by token weights alone if ``briefly``, and what it was made from."""
    solver, update = walk._observed(step, reading, pieces, rows, before)
    return solver, update, solver.plain(update) if briefly else explain(solver, update)


def _differs_by_parameter(
    solver: StepSolver, update: ObservedUpdate, explanation: Explanation, form: str = ""
) -> Finding:
    """An update that is no weighted sum of token gradients as a whole may be one parameter by parameter.

    Raises:
        NotJudged: it is not, or all parameters got the same rows.
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
    form = f"; {form}" if form else ""
    what, is_ = ("signs of the update", "are") if solver.regression is SignRegression else ("update", "is")
    raise NotJudged(
        f"{100 * explanation.fit.residual:.2g}% of the {what} {is_} {UNEXPLAINED} ({100 * update.tolerance:.2g}% "
        f"allowed){form}. Usual causes: {USUAL_CAUSES}"
    )


def _strange(strange: int, rows: Sequence[ForwardRow]) -> str:
    if not rows:
        return "no forward pass was seen in this step"
    return f"{strange or len(rows)} of {len(rows)} rows that went forward hold none of the probe's examples"
