"""Curves of training."""

from __future__ import annotations

from dataclasses import dataclass

from thence.pages.figure import PAGE, Figure, drawing_settings, fitted_canvas, inline, plain_axes
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
    ),
}


def measured_on(training: StageMetrics) -> tuple[Curve, ...]:
    """A curve for each test set that the stage was measured on while it trained."""
    keys = dict.fromkeys(key for step in training.steps for key in step if key.startswith("eval/"))
    return tuple(Curve(key, f"Test set {key.removeprefix('eval/')}", "accuracy or mean reward") for key in keys)


def curves(training: StageMetrics) -> list[Figure]:
    """The curves of a stage, each with its last value as a note; a quantity that was never measured is left out."""
    drawn = []
    for index, quantity in enumerate((*measured_on(training), *QUANTITIES.get(training.kind, QUANTITIES["sft"]))):
        xs, ys = training.series(quantity.key)
        if not xs:
            continue
        second = training.series(quantity.second) if quantity.second else ([], [])
        svg = _draw(quantity, (xs, ys), second, salt=f"{training.stage}-{index}")
        drawn.append(Figure(quantity.title, svg, notes=(f"{ys[-1]:.4g} at step {xs[-1]:,.0f}",)))
    return drawn


def _draw(quantity: Curve, main: tuple[list, list], second: tuple[list, list], salt: str) -> str:
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(drawing_settings(salt)):
        figure = fitted_canvas(4.0, 2.3)
        axes = figure.subplots()
        plain_axes(axes, PAGE, "step", quantity.unit)
        style = {"marker": "o", "markersize": 3} if len(main[0]) < 3 else {}
        axes.plot(*main, color=PAGE.series[0], linewidth=1.1, solid_joinstyle="round", **style)
        if second[0]:
            other = {"color": PAGE.series[1], "linewidth": 1.1, "marker": "o", "markersize": 3}
            axes.plot(*second, **other)
            place = {"textcoords": "offset points", "xytext": (0, 6), "ha": "right", "color": PAGE.series[1]}
            axes.annotate(quantity.second_label, (second[0][-1], second[1][-1]), **place)
        if min(main[1]) == max(main[1]):  # a flat line, not noise blown up to the height of the chart
            low, high = sorted((0.0, 1.5 * main[1][0] or 1.0))
            axes.set_ylim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return inline(figure, f"{quantity.title}, {quantity.unit}, by step")
