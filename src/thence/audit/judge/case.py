"""From what a case left behind (parameters before and after, rows that went forward) to its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thence.audit.judge.diagnose import FLOORS, Asked, diagnose_step
from thence.audit.judge.objectives import OBJECTIVES
from thence.audit.result import Case, CaseResult, Finding, StepResult
from thence.audit.solve.explain import Explainer
from thence.audit.solve.gradients import Differentiator
from thence.audit.solve.observation import ForwardRow, Observation, forward_rows, load_states
from thence.audit.solve.probe import Probe, vocabulary
from thence.audit.solve.recover import System, gradient_of_update, rounding_noise
from thence.audit.solve.sequences import Known, Piece, find_pieces, planned_pieces
from thence.audit.solve.signs import FLOOR as SIGN_FLOOR
from thence.audit.solve.signs import WRONG, SignSystem, looks_like_signs

RESIDUALS = {"float32": 1e-4, "bfloat16": 8e-2, "autocast": 8e-2}
"""Residuals that arithmetic alone may leave, by precision; rounding of the stored parameters comes on top."""
MANTISSA = {"torch.float32": 23, "torch.bfloat16": 7, "torch.float16": 10, "torch.float64": 52}
DROWNED = 0.3
"""An update whose rounding noise is a larger share than this cannot be judged."""


class Judge:
    """Judges cases of one probe; keeps the model in float64 and the gradients at the parameters last seen.

    Args:
        model: a copy of the probe's model; becomes float64.
        known: the examples.
        texts: of the tokens, by id.
        pad: id of the padding token.
        end: id of the end-of-turn token; None: the last trained token of a row.
    """

    def __init__(self, model: nn.Module, known: Sequence[Known], texts: Sequence[str], pad: int, end: int | None):
        self.model, self.known, self.texts, self.pad, self.end = model, list(known), list(texts), pad, end
        self._explainers: dict[tuple, Explainer] = {}

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
            known.append(Known(prompt, response, row, labels))
        return cls(model, known, list(ids), ids["<|pad|>"], ids["<|end|>"])

    def observation(self, observed: Observation) -> CaseResult:
        """Judge what an adapter's processes left behind."""
        case = observed.case
        if observed.status != "done":
            return CaseResult(case, observed.status, observed.reason, seconds=observed.seconds)  # pyright: ignore
        states, findings = load_states(observed.folder, len(observed.records))
        if not states:
            return CaseResult(case, "failed", "the adapter kept no parameters", seconds=observed.seconds)
        said: dict[str, Any] = {}
        for record in observed.records:
            said |= record["said"]
        rows = [forward_rows(observed.records, step, self.pad) for step in range(max(len(states) - 1, 1))]
        result = self.case(
            case,
            states,
            rows=rows,
            advantages=said.get("advantages"),
            longest=float(said.get("longest", 0.0)),
            lr=said.get("lr", case.lr),
        )
        return replace(result, findings=(*findings, *result.findings), seconds=observed.seconds)

    def case(
        self,
        case: Case,
        states: Sequence[Mapping[str, Tensor]],
        *,
        rows: Sequence[Sequence[ForwardRow]] | None = None,
        pieces: Sequence[Sequence[Piece]] | None = None,
        advantages: Sequence[float] | None = None,
        longest: float = 0.0,
        lr: float | None = None,
        scale_known: bool = True,
    ) -> CaseResult:
        """Judge the steps of a case.

        Args:
            states: parameters before the first step and after each.
            rows: that went forward in each step, where they were watched; else
            pieces: of each step as planned.
            advantages: one factor an example, for policy-gradient losses.
            longest: constant of a constant divisor.
            lr: learning rate, where it is not the case's.
            scale_known: False where learning rate or optimizer are not known.
        """
        lr = case.lr if lr is None else lr
        findings: list[Finding] = []
        results: list[StepResult] = []
        updates: list[np.ndarray] = []
        seen: dict[int, int] = {}
        explainer = self._explainer(states[0])
        narrow = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in states[0].values())
        precision = "bfloat16" if narrow and case.precision == "float32" else case.precision
        floor, residual = FLOORS[precision], RESIDUALS[precision]
        for step in range(1, len(states)):
            before, after = states[step - 1], states[step]
            flat_before, flat_after = explainer.differentiator.flat(before), explainer.differentiator.flat(after)  # pyright: ignore
            if not np.any(flat_before - flat_after):
                findings.append(Finding("no-step", "fault", f"optimizer step {step} changed no parameter"))
                updates.append(np.zeros_like(flat_before))
                continue
            own_rows: Sequence[ForwardRow] = rows[step - 1] if rows is not None else ()
            if rows is not None:
                own, strange = find_pieces(own_rows, self.known, self.end)
                if strange or not own:
                    return self._unjudged(case, results, findings, _strange(strange, own_rows))
                findings += window_findings(case, step, own, seen)
            else:
                own = list(pieces[step - 1]) if pieces is not None else []
            unseen = [p.example + 1 for p in own if advantages is not None and not advantages[p.example]]
            if unseen:
                reason = f"example {unseen[0]} has advantage zero, so nothing can be seen of it; choose other rewards"
                return self._unjudged(case, results, findings, reason)
            noise = rounding_noise(flat_before, flat_after, MANTISSA[str(next(iter(after.values())).dtype)])
            if noise > DROWNED:
                reason = f"the update drowns in the rounding of the parameters ({noise:.0%}); raise the learning rate"
                return self._unjudged(case, results, findings, reason)
            if case.optimizer == "unknown" and looks_like_signs(flat_before - flat_after):
                if step > 1:
                    return self._unjudged(
                        case, results, findings, "of Adam as it is, only the first step can be judged"
                    )
                update, noise, floor, residual = flat_before - flat_after, 0.0, SIGN_FLOOR, WRONG
                explainer = self._explainer(states[0], SignSystem)
            else:
                update = gradient_of_update(flat_before, flat_after, case.optimizer, lr, case.eps)
            explainer.at(dict(before))
            tolerance = max(residual, 4 * noise)
            explanation = explainer.explain(
                update,
                own,
                own_rows,
                tolerance=tolerance,
                earlier=updates[::-1][:2],
                decay=flat_before,
                smoothing=case.label_smoothing,
            )
            updates.append(update)
            if not explanation.fits:
                return self._not_explained(case, results, findings, explainer, explanation, update, own, tolerance)
            asked = Asked(
                case.asked,
                np.array([1.0 if advantages is None else advantages[p.example] for p in own]),
                case.accumulation,
                case.ranks,
                scale_known and case.clip == 0 and case.optimizer != "unknown",
                longest,
            )
            result = diagnose_step(step, explanation, own, asked, self.texts, floor)
            results.append(replace(result, findings=(*result.findings, *objective_findings(case, result))))
        if len(states) == 1:
            findings.append(
                Finding("no-step", "fault", f"{case.examples} examples went in and no optimizer step was taken")
            )
        elif len(states) - 1 < planned_steps(case) and rows is not None:
            findings.append(
                Finding(
                    "window-dropped",
                    "note",
                    f"{len(states) - 1} optimizer steps were taken where {planned_steps(case)} were due",
                )
            )
        return CaseResult(case, "judged", steps=tuple(results), findings=_unique(findings))

    def plan(self, case: Case) -> list[list[Piece]]:
        """The pieces of every step, if rows are taken in order and dealt to ranks micro-batch by micro-batch."""
        steps, done = [], 0
        for size in window_sizes(case)[: case.steps]:
            order = []
            for place in range(size):
                number = place // case.micro_batch
                order.append(((done + place) % case.examples, number // case.ranks, number % case.ranks))
            steps.append(planned_pieces(self.known, order))
            done += size
        return steps

    def _explainer(self, state: Mapping[str, Tensor], solver: type[System] | type[SignSystem] = System) -> Explainer:
        parameters = dict(self.model.named_parameters())
        names = tuple(n for n in parameters if n in state and state[n].shape == parameters[n].shape)
        if not names:
            from thence.errors import UserError

            raise UserError(
                f"the trained model has no parameter of the probe's (but {', '.join(list(state)[:3])} ...)",
                remedy="write the model in the Hugging Face layout",
            )
        if (names, solver) not in self._explainers:
            self._explainers[names, solver] = Explainer(Differentiator(self.model, names), solver)
        return self._explainers[names, solver]

    def _unjudged(self, case: Case, steps, findings, reason: str) -> CaseResult:
        return CaseResult(case, "not judged", reason, tuple(steps), _unique(findings))

    def _not_explained(self, case, steps, findings, explainer, explanation, update, pieces, tolerance) -> CaseResult:
        """The update is no weighted sum of token gradients as a whole: perhaps it is one parameter by parameter."""
        parts = explainer.by_parameter(update, pieces)
        good = {name: weights for name, (weights, residual) in parts.items() if residual <= 10 * tolerance}
        if parts and len(good) == len(parts):
            shapes: dict[tuple[float, ...], list[str]] = {}
            for name, weights in good.items():
                key = tuple(np.round(weights / max(np.abs(weights).max(), 1e-12), 2).tolist())
                shapes.setdefault(key, []).append(name)
            if len(shapes) > 1:
                rare = min(shapes.values(), key=len)
                detail = f"{len(rare)} of {len(good)} parameters ({', '.join(rare[:3])}) got other rows than the rest"
                findings = [*findings, Finding("differs-by-parameter", "fault", detail)]
                return CaseResult(case, "judged", "", tuple(steps), _unique(findings))
        reason = (
            f"the update is not a weighted sum of token gradients: residual {explanation.fit.residual:.2g} per token, "
            f"{explanation.residual_sequences:.2g} per sequence, {tolerance:.2g} allowed"
        )
        return self._unjudged(case, steps, findings, reason)


def window_sizes(case: Case) -> list[int]:
    """Rows of each optimizer step, if the last window of an epoch is trained as it is."""
    sizes = []
    for _ in range(case.epochs):
        left = case.examples
        while left > 0:
            sizes.append(min(left, case.window))
            left -= sizes[-1]
    return sizes


def planned_steps(case: Case) -> int:
    """Optimizer steps that the case should take."""
    return min(case.steps, len(window_sizes(case)))


def window_findings(case: Case, step: int, pieces: Sequence[Piece], seen: dict[int, int]) -> list[Finding]:
    """Whether a step held the rows that were due; ``seen`` counts every example's appearances and is updated."""
    sizes = window_sizes(case)
    examples = [p.example for p in pieces]
    before = {seen.get(example, 0) for example in examples}
    for example in examples:
        seen[example] = seen.get(example, 0) + 1
    if case.packing or step > len(sizes) or len(examples) == sizes[step - 1]:
        return []
    due = sizes[step - 1]
    full = case.micro_batch * case.ranks
    if due < len(examples) <= -(-due // full) * full and len(set(examples)) == due:
        return [Finding("rows-repeated", "note", f"step {step} holds {len(examples)} rows of {due} examples")]
    if len(examples) > due and len(before) == 1 and before != {0}:
        return [Finding("window-dropped", "note", f"the last {due} examples of an epoch were not trained")]
    if len(examples) > due:
        # Every row still counts once; if the mixture is scaled wrongly, the weights say so by themselves.
        detail = f"step {step} holds {len(examples)} rows where the epoch had {due} left"
        return [Finding("window-mixed", "note", detail)]
    return [Finding("window-dropped", "note", f"step {step} holds {len(examples)} rows where {due} were due")]


def objective_findings(case: Case, result: StepResult) -> list[Finding]:
    """Whether the objective is the one asked for."""
    if result.objective is None:
        if result.findings:
            return []
        detail = f"response tokens weigh from {result.smallest:.3g} to {result.largest:.3g} of what they should"
        return [Finding("unnamed", "fault", detail)]
    asked = {case.asked, *(("token-mean",) if case.asked == "constant-divisor" else ())}
    if asked & {result.objective, *result.alike}:
        choice = Finding(case.asked, "choice", f"the {OBJECTIVES[case.asked].title}, as asked for")
        return [] if case.asked == "token-mean" else [choice]
    if any(f.id == result.objective and f.kind == "fault" for f in result.findings):
        return []
    detail = f"response tokens weigh from {result.smallest:.3g} to {result.largest:.3g} of what they should"
    return [Finding(result.objective, "fault", detail)]


def _strange(strange: int, rows: Sequence[ForwardRow]) -> str:
    if not rows:
        return "no forward pass was seen in this step"
    return f"{strange or len(rows)} of {len(rows)} rows that went forward hold none of the probe's examples"


def _unique(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    unique: dict[str, Finding] = {}
    for finding in findings:
        unique.setdefault(finding.id, finding)
    return tuple(unique.values())
