"""What moves on a terminal is lines where output is piped."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from thence.evaluate.progress import EvaluationDisplay
from thence.pipeline.panel import RunDisplay
from thence.terminal import make_console


def train(console: Any) -> None:
    with RunDisplay(console, seconds=0.0) as display:
        display.begin("mine", ["sft", "rl"])
        display.doing("trying")
        display.stage("sft", 3, 1)
        display.step({"loss": 1.25, "tokens_per_s": 1e4})
        display.step({"loss": 1.0})


def evaluate(console: Any) -> None:
    with EvaluationDisplay(console) as display:
        display.begin(2)
        display.sampling("sums", 2, 0)
        display.sampled(SimpleNamespace(tokens=None))  # type: ignore[arg-type]
        display.refused(SimpleNamespace())  # type: ignore[arg-type]
        display.grading("sums", 2)


@pytest.mark.parametrize(
    "act, lines, on_the_bar",
    [
        (
            train,
            "trying ...\nsft: resumed after step 1 of 3\nsft 2/3  loss 1.250  10,000 tok/s  about 0 s and rl left\n"
            "sft 3/3  loss 1.000\n",
            ("stage 1 of 2: sft", "3/3", "loss\u00a01.000"),
        ),
        (evaluate, "sums: 2 samples\nsums 2/2  0 s left\nsums: grading 2 samples\n", ("sums", "2/2", "0 s left")),
    ],
)
def test_a_bar_on_a_terminal_is_lines_where_output_is_piped(
    act: Callable[[Any], None], lines: str, on_the_bar: tuple[str, ...]
) -> None:
    piped, shown = io.StringIO(), io.StringIO()
    act(make_console(file=piped, width=100))
    assert piped.getvalue() == lines
    act(make_console(file=shown, width=100, force_terminal=True, color_system=None))
    assert all(part in shown.getvalue() for part in on_the_bar)
    assert "resumed" not in shown.getvalue() and "grading" not in shown.getvalue()
