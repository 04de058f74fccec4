"""Curves of training: of one run, or of several laid over each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thence.pages.figure import Chart, Key, Line, line_chart, steps_a_point
from thence.pipeline.run_files import StageMetrics


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve: key in metrics.jsonl, title, unit of the vertical axis, and a second key drawn over it."""

    key: str
    title: str
    unit: str
    second: str | None = None
    second_label: str = ""


_COMMON = (
    Curve("grad_norm", "Gradient norm", "L2, before clipping"),
    Curve("lr", "Learning rate", "learning rate"),
)
QUANTITIES = {
    "sft": (
        Curve("loss", "Loss", "nats a trained token", "held_out_loss", "held out"),
        *_COMMON,
        Curve("entropy", "Entropy", "nats a token"),
    ),
    "rl": (
        Curve("reward", "Reward", "mean over rollouts"),
        Curve("response_tokens", "Response length", "tokens, mean"),
        Curve("entropy", "Entropy", "nats a token"),
        Curve("clip_share", "Clipped tokens", "share of tokens"),
        Curve("loss", "Loss", "surrogate loss"),
        *_COMMON,
        Curve("staleness", "Age of the weights that sampled", "steps, mean over tokens"),
        Curve("waited_share", "Waiting for responses", "share of the step"),
        Curve("importance", "Importance weight", "mean over sampled tokens"),
    ),
}

WEIGHED = (
    Curve("nll", "Cross-entropy", "nats a trained token", "held_out_loss", "held out"),
    Curve("loss", "Loss", "of the method, a token"),
)
"""In place of the loss, where a method of SFT weighs tokens: its own loss is no cross-entropy."""


def _named(training: StageMetrics, prefix: str, title: str, unit: str) -> list[Curve]:
    """A curve for each quantity whose key begins with the prefix: a test set, a part of the reward."""
    keys = dict.fromkeys(key for step in training.steps for key in step if key.startswith(prefix))
    return [Curve(key, f"{title}{key.removeprefix(prefix)}", unit) for key in keys]


def quantities_of_stage(training: StageMetrics) -> tuple[Curve, ...]:
    """What is drawn of a stage of this kind: test sets first, and parts of the reward after the reward."""
    sets = _named(training, "eval/", "Test set ", "accuracy or mean reward")
    parts = _named(training, "reward/", "Reward: ", "mean over rollouts")
    own = list(QUANTITIES.get(training.kind, QUANTITIES["sft"]))
    if training.kind == "sft" and any("nll" in step for step in training.steps):
        own[:1] = WEIGHED
        own += _named(training, "blend/", "Reference in the target: ", "mean, or share of tokens")
    at = next((i + 1 for i, quantity in enumerate(own) if quantity.key == "reward"), len(own))
    return (*sets, *own[:at], *parts, *own[at:])


def curves(training: StageMetrics) -> list[Chart]:
    """The curves of a stage, each with its last value; a quantity that was never measured is left out."""
    drawn = []
    for quantity in quantities_of_stage(training):
        lines = [_line(training, quantity.key, quantity.title.lower())]
        if quantity.second:
            lines.append(_line(training, quantity.second, quantity.second_label))
        if lines[0] is not None:
            drawn.append(_chart(quantity, [line for line in lines if line is not None], alone=True))
    return drawn


def overlaid(stages: Mapping[str, StageMetrics], keys: Mapping[str, Key]) -> list[Chart]:
    """The curves of one stage in several runs, a line a run and a dashed one for its held-out loss.

    Args:
        stages: by the name of the run.
        keys: of the runs, by the same names.
    """
    drawn = []
    for quantity in dict.fromkeys(q for training in stages.values() for q in quantities_of_stage(training)):
        found = [_line(training, quantity.key, name) for name, training in stages.items()]
        lines = [line for line in found if line is not None]
        if lines:
            drawn.append(_chart(quantity, lines, keys=[keys[line.name] for line in lines]))
    return drawn


def smoothing_note(longest: int) -> str:
    """What a reader has to know of curves of this many steps; nothing where every step is drawn."""
    size = steps_a_point(longest)
    return f"Each point is the mean of {size} steps." if size > 1 else ""


def _line(training: StageMetrics, key: str, name: str) -> Line | None:
    xs, ys = training.series(key)
    return Line(name, xs, ys) if xs else None


def _chart(quantity: Curve, lines: list[Line], keys: list[Key] | None = None, alone: bool = False) -> Chart:
    last = lines[0]
    said = f"{last.y[-1]:.4g} at step {last.x[-1]:,.0f}" if alone else ""
    if alone and len(lines) > 1:
        said += f"; {lines[1].name} {lines[1].y[-1]:.4g}"
    return line_chart(
        lines,
        keys or [Key(line.name, index) for index, line in enumerate(lines)],
        quantity.unit,
        f"{quantity.title}, {quantity.unit}, by step",
        title=quantity.title,
        last=said,
    )
