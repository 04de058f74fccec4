"""Audit a step function of your own, in this process: ``check(step, model=model)``."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import UNEXPLAINED, Evidence
from thence.audit.objectives import check_objective
from thence.audit.report import Report, make_report
from thence.audit.result import Case, CaseResult
from thence.audit.run.repeat import random_step
from thence.audit.run.watch import OptimizerWatch
from thence.audit.solve.probe import LENGTHS
from thence.audit.solve.sequences import KnownExample
from thence.errors import UserError

LabelledRow = Mapping[str, Sequence[int]]
StepFunction = Callable[..., Any]


def check(
    step: StepFunction,
    *,
    model: nn.Module,
    batch: Sequence[LabelledRow] | None = None,
    asked: str = "token-mean",
    lr: float | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
) -> Report:
    """Recover the weight that every token gets in your own training step.

    ``step(model, rows)`` trains the model in place on rows of ``input_ids`` and ``labels`` (lists of int; -100: not
    trained) with one optimizer step, by a new optimizer. If it takes ``micro_batch`` and
    ``accumulation`` too, the same rows are cut in several ways, which is what tells most rules apart.

    Args:
        step: your step. SGD and Adam both do: Adam's first update gives the weights from its signs.
        model: a small one (up to some million parameters), without dropout; it is copied, not changed. Parameters
            that need no gradient are taken for frozen on purpose. Its forward takes ``input_ids`` of shape (1, T) and
            returns logits, or something with ``.logits``.
        batch: rows to train on; None: random ones with very different lengths.
        asked: the objective that you mean; a key of ``OBJECTIVES``.
        lr: the learning rate, if the step is plain SGD: then the scale of the update is judged too.
        vocabulary: size of the vocabulary for random rows; None: that of the model's configuration or embedding.
        seed: of the random rows.

    Raises:
        UserError: an unknown objective; rows without labels, or none given and the model's vocabulary size is not
            known.
    """
    start = time.monotonic()
    check_objective(asked)
    rows = list(batch) if batch is not None else random_rows(vocabulary or vocabulary_of(model), seed)
    _validate(rows)
    cut = takes_a_cut(step)
    known = [KnownExample((), (), tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]
    size = max(max(row["input_ids"]) for row in rows) + 1
    judge = Judge(copy.deepcopy(model), known, [str(i) for i in range(size)], -1, None)
    results = []
    for case in _cases(len(rows), cut, asked, lr):
        results.append(_one(step, model, rows[: case.examples], case, judge, cut, lr))
    results = judge.compare_cuts(results)
    return step_report("check", step, model, results, asked, cut, start, {"examples": len(rows), "seed": seed})


def step_report(
    function: str,
    step: StepFunction,
    model: nn.Module,
    results: Sequence[CaseResult],
    asked: str,
    cut: bool,
    begun: float,
    probe: Mapping[str, Any],
) -> Report:
    """The report of a step of one's own.

    Args:
        function: of ``thence.audit`` that audited it.
        cut: whether the step can be told how to cut its rows.
        begun: ``time.monotonic`` at the start of the audit, s.
        probe: what there is to say of the rows.
    """
    name = getattr(step, "__name__", type(step).__name__)
    return make_report(
        f"step {name}",
        results,
        {"torch": torch.__version__},
        f"thence.audit.{function}({name}, model=...)",
        {"model": type(model).__name__, **probe},
        time.monotonic() - begun,
        asked,
        [] if cut else ["the step takes no micro_batch and accumulation"],
    )


def random_rows(vocabulary: int, seed: int = 0, lengths: Sequence[int] = LENGTHS[:8]) -> list[LabelledRow]:
    """Rows of random tokens: a prompt of 4 to 6 tokens, then a response.

    Args:
        vocabulary: ids are drawn below it.
        lengths: tokens of the responses.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(lengths):
        prompt = 4 + index % 3
        ids = torch.randint(0, vocabulary, (prompt + length,), generator=generator).tolist()
        # Rows whose first tokens are the same cannot be told apart there.
        ids[0] = index % vocabulary
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def _cases(rows: int, cut: bool, asked: str, lr: float | None) -> list[Case]:
    optimizer: Literal["sgd", "unknown"] = "unknown" if lr is None else "sgd"
    common = {"optimizer": optimizer, "lr": 1.0 if lr is None else lr, "asked": asked}
    if not cut:
        return [Case("the step as it is", rows, 1, examples=rows, **common)]
    cases = [Case(f"micro {rows} x 1", rows, 1, examples=rows, **common)]
    for micro_batch in (1, 2, 4):
        accumulation = -(-rows // micro_batch)
        if accumulation > 1:
            cases.append(
                Case(f"micro {micro_batch} x {accumulation}", micro_batch, accumulation, examples=rows, **common)
            )
    return cases


def _one(
    step: StepFunction,
    model: nn.Module,
    rows: Sequence[LabelledRow],
    case: Case,
    judge: Judge,
    cut: bool,
    lr: float | None,
) -> CaseResult:
    arguments = {"micro_batch": case.micro_batch, "accumulation": case.accumulation} if cut else {}

    def run(own: nn.Module) -> None:
        step(own, [{key: list(row[key]) for key in ("input_ids", "labels")} for row in rows], **arguments)

    own = copy.deepcopy(model)
    before = state_of(own)
    begun = time.monotonic()
    watch = OptimizerWatch(own, before)
    try:
        with watch:
            run(own)
    except Exception as error:
        return CaseResult(case, "failed", f"the step raised {type(error).__name__}: {error}")
    seconds = time.monotonic() - begun
    pieces = judge.plan(case, cut_known=cut)
    after = state_of(own)
    if new := sorted(set(after) - set(before)):
        reason = (
            f"the step puts parameters into the model that were not there before ({new[0]} ...), such as adapters; put "
            "them in first, and give that model to check"
        )
        return CaseResult(case, "not judged", reason, seconds=seconds)
    if reason := reshaped(before, after):
        return CaseResult(case, "not judged", reason, seconds=seconds)
    evidence = Evidence(
        [before, after], pieces=pieces, scale_known=lr is not None, frozen=frozen_in(model), seen=watch.seen(after)
    )
    result = judge.case(case, evidence)
    if result.status == "not judged" and UNEXPLAINED in result.reason:
        result = replace(result, reason=random_step(result.reason, run, model, own, (before, after)))
    return replace(result, seconds=seconds)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are now, by name, copied."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def frozen_in(model: nn.Module) -> frozenset[str]:
    """The parameters that need no gradient in the model as it was handed over: what a step freezes is its own doing."""
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def reshaped(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Why a step that changes the shapes of parameters, or takes some away, cannot be judged; empty: it does not."""
    gone = sorted(name for name in before if name not in after)
    if gone:
        return f"the step takes parameters out of the model: {', '.join(gone[:3])}"
    other = sorted(name for name in before if before[name].shape != after[name].shape)
    if other:
        return f"the step changes the shape of {', '.join(other[:3])}; do so first, and give that model to the audit"
    return ""


def takes_a_cut(step: StepFunction) -> bool:
    """Whether a step can be told how to cut its rows into micro-batches."""
    try:
        parameters = inspect.signature(step).parameters
    except (TypeError, ValueError):
        return False
    return {"micro_batch", "accumulation"} <= set(parameters)


def vocabulary_of(model: nn.Module) -> int:
    """Size of a model's vocabulary. Raises UserError where neither its configuration nor an embedding says it."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int):
        return size
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise UserError(
        "the model's vocabulary size is not known", remedy="pass vocabulary=..., or rows of your own as batch="
    )


def _validate(rows: Sequence[LabelledRow]) -> None:
    for index, row in enumerate(rows):
        missing = [key for key in ("input_ids", "labels") if key not in row]
        if missing or len(row["input_ids"]) != len(row["labels"]):
            raise UserError(
                f"row {index} has no {missing[0]}"
                if missing
                else f"row {index}: input_ids and labels differ in length",
                remedy="give rows with input_ids and labels of the same length, -100 where a token is not trained",
            )
        if all(label == -100 for label in row["labels"]):
            raise UserError(f"row {index} trains no token", remedy="leave it out, or set its labels")
