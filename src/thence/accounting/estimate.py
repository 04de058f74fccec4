"""How long a plan takes on given hardware, for stated utilisations: every part with the arithmetic that it came from.

A time here is arithmetic over datasheet figures, and not a measurement. What is left out: the data, answer checking,
checkpoints, validation while training, ranks that wait for each other, and the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from thence.accounting.hardware import Hardware
from thence.accounting.planned import Plan, StagePlan
from thence.accounting.traffic import Sent

OPTIMIZER_NUMBERS = 7
"""Numbers that AdamW reads and writes for each that it trains: weight, gradient and two moments; and three back."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Which share of a datasheet's figures is reached: assumed, unless somebody measured it.

    Args:
        training: of the peak, by the FLOPs that forward and backward execute, recomputation included.
        sampling: of the memory's bandwidth, by what a decoding model and the optimizer read and write.
        links: of a link's speed.
        overlap: whether FSDP2's messages go on beside computing.
    """

    training: float = 0.4
    sampling: float = 0.5
    links: float = 0.7
    overlap: bool = True

    def in_words(self) -> tuple[str, ...]:
        """What is assumed."""
        beside = "go on beside computing" if self.overlap else "do not go on beside computing"
        return (
            f"training and scoring reach {self.training:.0%} of the device's peak, by executed FLOPs",
            f"sampling and the optimizer reach {self.sampling:.0%} of the memory's bandwidth",
            f"messages between ranks reach {self.links:.0%} of a link's speed; FSDP2's own {beside}",
            "least: responses sampled in parallel are all of mean length; most: one of them is as long as may be",
            "not counted: the latency of messages and kernels, so that times of small models are far too short",
            "not counted: the start, data, grading, checkpoints, validation, and ranks that wait for each other",
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stage's time, seconds of the whole stage."""

    name: str
    seconds: float
    arithmetic: str
    beside: bool = False
    """Whether it goes on beside the passes: the longer of the two counts."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """What one stage takes.

    Args:
        name: of the stage.
        parts: of the longest time.
        least, most: seconds of the stage; None: not known.
        steps: optimizer steps.
        tokens: trained tokens.
        unknown: what is missing for a time.
    """

    name: str
    parts: tuple[Part, ...]
    least: float | None
    most: float | None
    steps: int | None
    tokens: float | None
    unknown: tuple[str, ...] = ()

    @property
    def step(self) -> float | None:
        """Seconds of an optimizer step, the sampling before it included, at most."""
        return self.most / self.steps if self.most is not None and self.steps else None

    @property
    def tokens_per_s(self) -> float | None:
        """Trained tokens a second over all ranks, at least."""
        return self.tokens / self.most if self.most and self.tokens else None


def stage_times(plan: Plan, hardware: Hardware, rates: Rates) -> tuple[StageTime, ...]:
    """The time of every stage."""
    return tuple(_time(stage, plan, hardware, rates) for stage in plan.stages)


def total_seconds(times: tuple[StageTime, ...]) -> tuple[float, float] | None:
    """Least and most of all stages; None: one of them is not known."""
    least, most = [time.least for time in times], [time.most for time in times]
    if None in least or None in most:
        return None
    return sum(value or 0.0 for value in least), sum(value or 0.0 for value in most)


def _time(stage: StagePlan, plan: Plan, hardware: Hardware, rates: Rates) -> StageTime:
    missing: list[str] = []
    ends = []
    for outcome, longest in ((stage.at_least or stage, False), (stage, True)):
        parts = [*_passes(outcome, stage, plan, hardware, rates, missing)]
        parts += _sampling(outcome, hardware, rates, longest, missing)
        ends.append(tuple(parts))
    if stage.executed is None and stage.rollouts is None:
        missing.append("its FLOPs")
    steps, tokens = stage.optimizer_steps, stage.trained_tokens
    if missing:
        return StageTime(stage.name, ends[1], None, None, steps, tokens, tuple(dict.fromkeys(missing)))
    least, most = sorted(map(_added, ends))
    return StageTime(stage.name, ends[1], least, most, steps, tokens)


def _added(parts: tuple[Part, ...]) -> float:
    """Seconds of parts together: what goes on beside the passes counts where it is longer than they are."""
    beside = sum(part.seconds for part in parts if part.beside)
    computing = sum(part.seconds for part in parts if part.name == PASSES)
    rest = sum(part.seconds for part in parts if not part.beside and part.name != PASSES)
    return max(beside, computing) + rest


PASSES = "forward and backward passes"


def _passes(
    outcome: StagePlan, stage: StagePlan, plan: Plan, hardware: Hardware, rates: Rates, missing: list[str]
) -> Iterator[Part]:
    """Passes, optimizer and messages of the whole stage."""
    done, steps, held, device = outcome.executed, outcome.optimizer_steps, plan.held, hardware.device
    if stage.kind == "eval":
        return
    if done is None or steps is None or plan.counts is None:
        missing.append("its FLOPs")
        return
    peak = device.peak_of(held.compute_bytes)
    dtype = {2: "bfloat16", 4: "float32", 8: "float64"}[held.compute_bytes]
    if peak is None:
        missing.append(f"the peak of {device.name} in {dtype}")
    else:
        uneven, said = _uneven(stage, plan)
        text = f"{done.training + done.scoring:.4g} FLOPs / {plan.ranks:,} ranks / ({peak:.4g} FLOP/s in {dtype}"
        seconds = uneven * (done.training + done.scoring) / plan.ranks / (peak * rates.training)
        yield Part(PASSES, seconds, f"{text} x {rates.training:g}){said}")
    if held.cut and held.offload:
        missing.append("the optimizer's speed in host memory")
    elif device.bandwidth is None:
        missing.append(f"the memory bandwidth of {device.name}")
    else:
        trained = held.adapters or plan.counts.total
        moved = OPTIMIZER_NUMBERS * trained * held.width / held.parts
        text = f"{steps:,} steps x {OPTIMIZER_NUMBERS} x {trained:,} x {held.width} B / {held.parts:,}"
        text += f" / ({device.bandwidth:.4g} B/s x {rates.sampling:g})"
        yield Part("optimizer", steps * moved / (device.bandwidth * rates.sampling), text)
    batches = outcome.rollouts.batches if outcome.rollouts else steps
    for sent in stage.sent:
        times = batches if sent.each_batch else steps
        yield from _message(sent, times, hardware, rates, missing)


def _uneven(stage: StagePlan, plan: Plan) -> tuple[float, str]:
    """How much more the rank with the most rows of a step does than the mean, since no row is cut but by context."""
    groups = plan.ranks / plan.held.context
    if not stage.step_rows or groups <= 1:
        return 1.0, ""
    most, mean = math.ceil(stage.step_rows / groups), stage.step_rows / groups
    return most / mean, "" if most == mean else f" x {most:,} / {mean:.3g} rows of a rank, at most and on average"


def _message(sent: Sent, times: int, hardware: Hardware, rates: Rates, missing: list[str]) -> Iterator[Part]:
    speed, where = hardware.link(*sent.between)
    if speed is None:
        missing.append(f"the link of {hardware.device.name} {where}")
        return
    text = f"{times:,} x {sent.bytes:.4g} B / ({speed:.4g} B/s {where} x {rates.links:g})"
    yield Part(sent.name, times * sent.bytes / (speed * rates.links), text, sent.overlaps and rates.overlap)


def _sampling(
    outcome: StagePlan, hardware: Hardware, rates: Rates, longest: bool, missing: list[str]
) -> Iterator[Part]:
    """Sampling reads the weights once for a token of each response in parallel, and every response's own cache."""
    drawn, done, device = outcome.rollouts, outcome.executed, hardware.device
    if drawn is None or not drawn.responses:
        if outcome.kind != "sft" and drawn is None:
            missing.append("its responses")
        return
    peak, bandwidth = device.peak_of(drawn.size), device.bandwidth
    if bandwidth is None:
        missing.append(f"the memory bandwidth of {device.name}")
    if peak is None:
        missing.append(f"the peak of {device.name} in numbers of {drawn.size} B")
    if bandwidth is None or peak is None or done is None:
        return
    each = drawn.responses / drawn.batches / hardware.ranks
    waves = math.ceil(each / drawn.rows) * drawn.batches
    tokens = max(drawn.longest, drawn.response) if longest else drawn.response
    own = drawn.responses / hardware.ranks
    weights = waves * tokens * drawn.weights
    held = drawn.prompt + drawn.response / 2  # in the cache, on average over the tokens of a response
    cache = own * drawn.response * held * drawn.cache
    read = (weights + cache) / (bandwidth * rates.sampling)
    computed = done.sampling / hardware.ranks / (peak * rates.training)
    if read >= computed:
        text = f"({waves:,} times in parallel x {tokens:,.0f} tokens x {drawn.weights:,} B of weights"
        text += f" + {own:,.0f} responses x {drawn.response:,.0f} tokens x {held:,.0f} in the cache x"
        text += f" {drawn.cache:,} B) / ({bandwidth:.4g} B/s x {rates.sampling:g})"
    else:
        text = f"{done.sampling:.4g} FLOPs / {hardware.ranks:,} ranks / ({peak:.4g} FLOP/s x {rates.training:g})"
    yield Part("sampling", max(read, computed), text)
