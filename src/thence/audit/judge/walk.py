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
from thence.audit.judge.evidence import Evidence
from thence.audit.judge.policy import PolicyCase
from thence.audit.judge.repeats import per_example
from thence.audit.judge.untouched import find_untouched, partly_finding, untouched_finding
from thence.audit.judge.weights import FLOORS, AskedObjective, step_rows
from thence.audit.judge.windows import planned_steps, window_findings
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import RESPONSE_ROLES, Case, Finding, PolicyCheck, StepResult
from thence.audit.solve.explain import explain
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.recover import gradient_of_update, rounding_noise
from thence.audit.solve.sequences import Piece, find_pieces
from thence.audit.solve.signs import FLOOR as SIGN_FLOOR
from thence.audit.solve.signs import WRONG, SignRegression, looks_like_signs
from thence.audit.solve.solver import Explanation, ObservedUpdate, StepSolver
from thence.errors import UserError

if TYPE_CHECKING:
    from thence.audit.judge.case import Judge

RESIDUALS = {"float32": 1e-4, "bfloat16": 8e-2, "autocast": 8e-2}
"""Residuals that arithmetic alone may leave, by precision; rounding of the stored parameters comes on top."""
MANTISSA = {"torch.float32": 23, "torch.bfloat16": 7, "torch.float16": 10, "torch.float64": 52}
DROWNED = 0.3
"""An update whose rounding noise is a larger share than this cannot be judged."""


class NotJudged(Exception):
    """A step that cannot be judged; the message says why."""


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
        before, after = (self._solver.differentiator.flat(evidence.states[i]) for i in (step - 1, step))
        if not np.any(before - after) and self._policy is None:
            self.findings.append(Finding("no-step", "fault", f"optimizer step {step} changed no parameter"))
            self._gradients.append(np.zeros_like(before))
            return True
        pieces, rows, problem = self._examples(step)
        partly = self._untouched(step, pieces)
        before, after = (self._solver.differentiator.flat(evidence.states[i]) for i in (step - 1, step))
        noise = rounding_noise(before, after, self._bits(step)) if np.any(before - after) else 0.0
        if step == 1 and pieces:
            examples = [piece.example for piece in pieces]
            found = first_update(self._trained(0), self._trained(1), examples, noise, self._precision)
            self.judge.updates[self.case.name] = found
        if not problem and noise > DROWNED:
            problem = f"the update drowns in the rounding of the parameters ({noise:.0%}); raise the learning rate"
        if problem:
            raise NotJudged(problem)
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
                raise NotJudged("of Adam as it is, only the first step can be judged")
            gradient, floor, tolerance = before - after, SIGN_FLOOR, WRONG
            solver = self.judge.solver(state, SignRegression, self._temperature)
        else:
            lr = self.case.lr if self.evidence.lr is None else self.evidence.lr
            gradient = gradient_of_update(before, after, self.case.optimizer, lr, self.case.eps)
        solver.move_to(state)
        earlier = self._gradients[::-1][:2]
        asked = (self.case.label_smoothing, self.case.ranks, self.case.clip)
        update = ObservedUpdate(gradient, pieces, rows, tolerance, earlier, before, *asked)
        if self._policy is not None:
            self._gradients.append(gradient)
            return self._take_in(self._policy, solver, step, update)
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
                raise NotJudged(str(error)) from error
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


def _differs_by_parameter(solver: StepSolver, update: ObservedUpdate, explanation: Explanation) -> Finding:
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
    raise NotJudged(
        f"the update is not a weighted sum of token gradients: residual {explanation.fit.residual:.2g} per token, "
        f"{explanation.residual_sequences:.2g} per sequence, {update.tolerance:.2g} allowed"
    )


def _strange(strange: int, rows: Sequence[ForwardRow]) -> str:
    if not rows:
        return "no forward pass was seen in this step"
    return f"{strange or len(rows)} of {len(rows)} rows that went forward hold none of the probe's examples"
