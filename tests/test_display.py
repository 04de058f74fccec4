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


def screen_of(display: Any, width: int) -> str:
    """The panel of a display, as a terminal of this width shows it."""
    console = make_console(width=width)
    with console.capture() as captured:
        console.print(display.picture.get_renderable())
    return captured.get()


def test_the_panel_begins_at_the_left_before_the_run_has_a_name() -> None:
    display = RunDisplay(make_console(file=io.StringIO(), width=80, force_terminal=True))
    assert screen_of(display, 80).strip() == ""
    display.doing("trying what the recipe names")
    assert screen_of(display, 80) == "trying what the recipe names ...\n"
    display.begin("mine", ["sft"])
    assert screen_of(display, 80) == "mine  trying what the recipe names ...\n"


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_quantity_stays_with_its_unit_at_every_width(width: int) -> None:
    display = RunDisplay(make_console(file=io.StringIO(), width=width, force_terminal=True))
    display.begin("mine", ["rl", "eval"])
    display.stage("rl", 40, 0)
    facts = {"loss": -0.002, "reward": 0.051, "entropy": 0.5, "response_tokens": 21, "grad_norm": 0.04}
    display.step(facts | {"tokens_per_s": 12561})
    lines = screen_of(display, width).replace("\u00a0", " ").splitlines()
    for part in ("loss -0.002", "reward 0.051", "length 21", "12,561 tok/s"):
        assert any(part in line for line in lines), part
    assert max(map(len, lines)) <= width


def test_a_task_that_has_ended_leaves_a_line_and_no_time_left() -> None:
    shown = io.StringIO()
    with EvaluationDisplay(make_console(file=shown, width=80, force_terminal=True, color_system=None)) as display:
        display.begin(4)
        display.sampling("sums", 2, 0)
        for _ in range(2):
            display.sampled(SimpleNamespace(tokens=5))  # type: ignore[arg-type]
        display.grading("sums", 2)
        assert "sums" in screen_of(display, 80) and "checking 2 answers" in screen_of(display, 80)
        display.graded("sums")
        display.sampling("products", 2000, 0)
        panel = screen_of(display, 40).replace("\u00a0", " ")
        assert "products" in panel and "0/2,000" in panel and " left" in panel and "sums" not in panel
    left = [line for line in shown.getvalue().replace("\u00a0", " ").splitlines() if "sums 2/2" in line]
    assert len(left) == 1 and "5 tok each  in " in left[0] and " left" not in left[0]


def test_what_goes_on_before_the_first_task_is_said() -> None:
    display = EvaluationDisplay(make_console(file=io.StringIO(), width=80), doing="opening the model ...")
    assert screen_of(display, 80) == "opening the model ...\n"
