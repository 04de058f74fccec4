"""What a run is planned to cost, told before its first step; and what it did cost beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thence.accounting.budget import plan
from thence.accounting.memory import readable
from thence.accounting.planned import Plan
from thence.errors import UserError, first_line
from thence.files import read_json, to_json, write_atomically
from thence.pipeline.layout import memory_of
from thence.pipeline.planning import facts_of, lengths_of
from thence.pipeline.progress import PROGRESS
from thence.pipeline.prompts import RenderedPrompts
from thence.pipeline.run_files import number, read_run
from thence.recipe import Eval, Recipe
from thence.train.model import load_tokenizer

log = logging.getLogger(__name__)
FORESEEN = "plan.json"
"""What was planned for each stage, in the run's folder."""
LEAST_PEAK = 64 * 2**20
"""Bytes. A smaller peak cannot be told from what Python and torch take anyway, and is not compared."""
Span = tuple[float, float]
_SUMS = ("rule_flops", "exact_flops", "trained_tokens", "generated_tokens")


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What the stages to come are planned to cost. Spans are from the least to the most; None: not known.

    Args:
        stages: to come, in order.
        layout, ranks: how ranks share training.
        rule_flops, exact_flops, trained_tokens, generated_tokens: of the training stages among them.
        peak: bytes of a rank at the worst moment of all of them.
        each: the same of every stage by its name.
        upper: whether lengths of responses are counted as the longest, so that the most is an upper bound.
    """

    stages: tuple[str, ...]
    layout: str
    ranks: int
    rule_flops: Span | None
    exact_flops: Span | None
    trained_tokens: Span | None
    generated_tokens: Span | None
    peak: int | None
    each: Mapping[str, Mapping[str, Any]]
    upper: bool = False

    def __str__(self) -> str:
        flops = "FLOPs not known"
        if self.rule_flops is not None:
            exact = "" if self.exact_flops is None else f", {_span(self.exact_flops, '{:.3g}')} exact"
            flops = f"{_span(self.rule_flops, '{:.3g}')} FLOPs by the rule{exact}"
        tokens = "tokens not known"
        if self.trained_tokens is not None and self.generated_tokens is not None:
            tokens = f"{_span(self.trained_tokens, '{:,.0f}')} tokens trained"
            tokens += f", {_span(self.generated_tokens, '{:,.0f}')} sampled"
        memory = "memory not known" if self.peak is None else f"{readable(self.peak)} on a rank at most"
        how = f"{self.layout} over {self.ranks} ranks" if self.ranks > 1 else "one rank"
        bound = "; responses counted as long as may be" if self.upper else ""
        return f"plan: {flops}; {tokens}; {memory} ({how}){bound}"


def _span(values: Span, pattern: str) -> str:
    least, most = (pattern.format(value) for value in values)
    return least if least == most else f"{least} to {most}"


def foresee(
    recipe: Recipe, stages: Sequence[str], prompts: RenderedPrompts, ranks: int, device: torch.device
) -> Foreseen | None:
    """Plan the stages to come, from data that are rendered already. None: no plan could be made, and the log says why.

    A run never fails for its plan.
    """
    try:
        return summed(_planned(recipe, prompts, ranks, device), stages)
    except Exception as error:  # whatever it is, the run is worth more
        log.warning("no plan was made: %s", first_line(error))
        return None


def _planned(recipe: Recipe, prompts: RenderedPrompts, ranks: int, device: torch.device) -> Plan:
    facts = facts_of(recipe)
    with suppress(UserError):
        training = [name for name in recipe.stages if not isinstance(recipe.stage(name), Eval)]
        data = recipe.stage_data(recipe.stage(training[0]).data if training else {})
        rows = prompts.held(data, load_tokenizer(recipe.model))
        facts |= lengths_of(rows) if rows else {}
    on_host = device.type == "cpu"
    size = 2 if recipe.model.compute_dtype == "auto" and not on_host and torch.cuda.is_bf16_supported() else None
    return plan(recipe, **facts, ranks=ranks, device_bytes=memory_of(device), compute_bytes=size, on_host=on_host)


def summed(made: Plan, stages: Sequence[str]) -> Foreseen:
    """A plan's figures for some of its stages."""
    chosen = [stage for stage in made.stages if stage.name in stages]
    each: dict[str, dict[str, Any]] = {}
    for stage in chosen:
        least = stage.at_least or stage
        found: dict[str, Any] = {}
        for name in _SUMS:
            ends = (getattr(least, name), getattr(stage, name))
            found[name] = None if None in ends else sorted(ends)
        found["peak"] = None if stage.memory is None else stage.memory.peak
        batches = stage.rollouts.batches if stage.rollouts is not None else None
        found["steps"] = batches if stage.kind == "rl" else stage.optimizer_steps  # as metrics count them
        each[stage.name] = found
    trained = [each[stage.name] for stage in chosen if stage.kind != "eval"]
    totals: dict[str, Any] = {}
    for name in _SUMS:
        spans = [found[name] for found in trained]
        totals[name] = None if None in spans else (sum(s[0] for s in spans), sum(s[1] for s in spans))
    peaks = [found["peak"] for found in each.values()]
    return Foreseen(
        stages=tuple(stages),
        layout=made.layout,
        ranks=made.ranks,
        **totals,
        peak=None if None in peaks or not peaks else max(peaks),
        each=each,
        upper=any("an upper bound" in text for text in made.assumptions),
    )


def keep(folder: Path, foreseen: Foreseen) -> None:
    """Write the plan of the stages to come beside those of stages before. Nothing depends on the file."""
    with suppress(OSError):
        before = _read(folder)
        write_atomically(folder / FORESEEN, to_json({**before, **foreseen.each}, indent=1) + "\n")


def keep_peak(folder: Path, stage: str, peak: int | None) -> None:
    """Note what a stage has held at most beside what was planned for it."""
    with suppress(OSError):
        before = _read(folder)
        if stage in before:
            before[stage] = {**before[stage], "measured_peak": peak}
            write_atomically(folder / FORESEEN, to_json(before, indent=1) + "\n")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """The file; empty where there is none, or none that can be read."""
    with suppress(UserError, OSError):
        found = read_json(folder / FORESEEN, remedy="")
        if isinstance(found, dict) and all(isinstance(value, dict) for value in found.values()):
            return found
    return {}


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity of a stage, planned and measured. A time is what the first three steps let expect, not a plan.

    Args:
        planned: least and most; None: not known.
        measured: None: not known.
    """

    stage: str
    quantity: str
    planned: Span | None
    measured: float | None


@dataclass(frozen=True, slots=True)
class StageClocked:
    """Seconds of a stage's steps: what the first three let expect, and what they took."""

    stage: str
    steps: int
    foreseen: float
    took: float


def times_of(folder: Path) -> list[StageClocked]:
    """The stages whose first three steps were taken by the process that wrote the run's ``progress.json`` last."""
    try:
        found = read_json(folder / PROGRESS, remedy="").get("times", {})
    except (UserError, OSError, AttributeError):
        return []
    times = []
    for stage, each in found.items() if isinstance(found, dict) else ():
        told = each if isinstance(each, dict) else {}
        steps, expected, took = (number(told.get(name)) for name in ("steps", "foreseen", "took"))
        if steps is not None and expected is not None and took is not None:
            times.append(StageClocked(stage, int(steps), expected, took))
    return times


def compared(folder: Path) -> list[Compared]:
    """Every quantity of every stage that was planned and has run, beside its measurement."""
    planned, run = _read(folder), read_run(folder)
    clocks = {time.stage: time for time in times_of(folder)}
    found = []
    for stage, figures in planned.items():
        metrics = next((each for each in run.training if each.stage == stage), None)
        if metrics is not None:
            kinds = {
                "rule_flops": "flops",
                "exact_flops": "executed_flops",
                "trained_tokens": "trained_tokens",
                "generated_tokens": "sampled_tokens",
            }
            for name, key in kinds.items():
                measured = metrics.total(key)
                if measured is not None or name != "generated_tokens":
                    found.append(Compared(stage, name, _pair(figures.get(name)), measured))
        if (measured := number(figures.get("measured_peak"))) is not None:
            peak = number(figures.get("peak"))
            if peak is None or peak >= LEAST_PEAK:
                found.append(Compared(stage, "peak", None if peak is None else (peak, peak), measured))
        if stage in clocks:
            expected = clocks[stage].foreseen
            found.append(Compared(stage, "seconds", (expected, expected), clocks[stage].took))
    return found


def _pair(value: Any) -> Span | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    least, most = number(value[0]), number(value[1])
    return None if least is None or most is None else (least, most)


class PeakMemory:
    """What a process holds at most, beyond what it held before its first stage.

    On a GPU: what torch has allocated there. On a CPU: the resident set, of which Linux tells the peak. Elsewhere it is
    not known.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0 if device.type == "cuda" else _resident("VmRSS")

    def begin(self) -> None:
        """A stage begins."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again at what is held

    def end(self) -> int | None:
        """Bytes at most since then; None: not known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident("VmHWM")
        return None if peak is None or self._before is None else max(0, peak - self._before)


def _resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process, bytes; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
