"""From what a case left behind (parameters before and after, rows that went forward) to its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from thence.audit.judge.adapted import add_adapters, followed
from thence.audit.judge.cuts import FirstUpdate, compare_cuts
from thence.audit.judge.evaluation import judge_evaluation
from thence.audit.judge.evidence import Evidence, NotJudged, said_policy
from thence.audit.judge.resume import judge_resume
from thence.audit.judge.saved import judge_saved
from thence.audit.judge.walk import Walk, count_steps
from thence.audit.judge.windows import planned_places
from thence.audit.result import Case, CaseResult, Finding
from thence.audit.solve.gradients import Differentiator
from thence.audit.solve.observation import Observation, forward_rows, load_states
from thence.audit.solve.probe import Probe, vocabulary
from thence.audit.solve.recover import LeastSquares
from thence.audit.solve.sequences import KnownExample, Piece, planned_pieces
from thence.audit.solve.signs import SignRegression
from thence.audit.solve.solver import StepSolver
from thence.errors import UserError


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
        ids = vocabulary()
        known = []
        for example, (row, labels) in zip(probe.examples, probe.rows, strict=True):
            prompt = tuple(ids[c] for c in example.prompt)
            response = tuple(ids[c] for c in example.response)
            known.append(KnownExample(prompt, response, row, labels))
        judge = cls(probe_model(probe), known, list(ids), ids["<|pad|>"], ids["<|end|>"])
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
        said: dict[str, Any] = {}
        for record in observed.records:
            said |= record["said"]
        if case.beyond:
            return self._beyond(observed, said)
        states, findings = load_states(observed.folder, len(observed.records))
        if not states:
            return CaseResult(case, "failed", "the adapter kept no parameters", seconds=observed.seconds)
        try:
            policy = said_policy(said)
        except UserError as error:
            return CaseResult(case, "not judged", str(error), seconds=observed.seconds)
        evidence = Evidence(
            states,
            rows=[forward_rows(observed.records, step, self.pad) for step in range(max(len(states) - 1, 1))],
            advantages=said.get("advantages"),
            longest=float(said.get("longest", 0.0)),
            lr=said.get("lr"),
            frozen=frozenset(name for record in observed.records for name in record.get("frozen", ())),
            policy=policy and policy[0],
            facts=policy and policy[1],
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

    def _beyond(self, observed: Observation, said: Mapping[str, Any]) -> CaseResult:
        """Judge a case that looks at something else than the weights of its steps."""
        if observed.case.beyond == "saved":
            return judge_saved(self, observed, said)
        try:
            judge = self.with_adapters(said["lora"]) if "lora" in said else self
            if observed.case.beyond == "evaluation":
                return judge_evaluation(judge, observed)
            return judge_resume(judge, observed, said)
        except UserError as error:
            return CaseResult(observed.case, "not judged", str(error), seconds=observed.seconds)

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

    def beside(self, model: nn.Module) -> Judge:
        """A judge of the same examples with another model, such as this one's with an adapter in it."""
        judge = Judge(model, self.known, self.texts, self.pad, self.end)
        judge.updates = self.updates
        return judge

    def case(self, case: Case, evidence: Evidence) -> CaseResult:
        """Judge the steps of a case, in order, up to the first that cannot be judged.

        Raises:
            UserError: the trained model has no parameter of the probe's.
        """
        walk = Walk(self, case, evidence)
        status, reason = "judged", ""
        try:
            for step in range(1, len(evidence.states)):
                if not walk.step(step):
                    break
            else:
                count_steps(walk)
        except NotJudged as stop:
            status, reason = "not judged", str(stop)
        try:
            walk.finish()
        except NotJudged as stop:
            status, reason = "not judged", reason or str(stop)
        return CaseResult(case, status, reason, tuple(walk.results), _unique(walk.findings), policy=walk.check)

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
        self,
        state: Mapping[str, Tensor],
        regression: type[LeastSquares] | type[SignRegression] = LeastSquares,
        temperature: float = 1.0,
    ) -> StepSolver:
        """The solver over the parameters that a snapshot and the probe's model share.

        Args:
            temperature: logits are divided by it.

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
        key = (names, regression, temperature)
        if key not in self._solvers:
            self._solvers[key] = StepSolver(Differentiator(self.model, names, temperature), regression)
        return self._solvers[key]


def probe_model(probe: Probe) -> nn.Module:
    """The probe's model as it lies in its folder, with attention that has a plain backward."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(probe.model, attn_implementation="eager")


def _unique(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    unique: dict[str, Finding] = {}
    for finding in findings:
        unique.setdefault(finding.id, finding)
    return tuple(unique.values())
