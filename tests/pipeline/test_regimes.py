"""When to leave SFT: the regimes of a held-out loss, the stage that ends by it, and what its page says."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pipeline.on_ranks import drive, lines
from tests.pipeline.test_validation import KILLED, done, stop, weights
from tests.recipes import Tables, changed, file_recipe
from thence.errors import UserError
from thence.pages.run.page import write_page
from thence.pipeline.regimes import SEVERE, STABLE, regimes
from thence.pipeline.run import run
from thence.pipeline.validation import Best

PUBLISHED = [1.00, 0.60, 0.50, 0.505, 0.515, 0.54, 0.56]


def named(losses: list[float]) -> list[str]:
    return [found.regime for found in regimes(list(range(1, len(losses) + 1)), losses)]


def test_the_regimes_of_the_golden_vector() -> None:
    assert named(PUBLISHED) == ["adaptive"] * 2 + ["stable"] * 2 + ["mild"] * 2 + ["severe"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 0.5, 0.6, 0.5], "adaptive stable stable stable"),  # an excursion between stable points
        ([0.5, 0.56, 0.54], "stable severe severe"),  # severe from there on
        ([0.5], "stable"),
        ([2.0, 1.0], "adaptive stable"),
        ([1.0, math.inf, math.nan], "stable severe severe"),
        ([math.inf, 1.0], "adaptive stable"),
        ([math.inf, math.nan], ""),
        ([], ""),
        ([0.0, 0.0, 1e-9], "stable stable severe"),
    ],
)
def test_other_regimes(losses: list[float], expected: str) -> None:
    assert named(losses) == expected.split()


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30))
def test_regimes_come_in_their_order_and_hold_their_bounds(losses: list[float]) -> None:
    found, least = named(losses), min(losses)
    order = [["adaptive", "stable", "mild", "severe"].index(regime) for regime in found]
    assert order == sorted(order)
    assert found[losses.index(least)] == "stable"
    for loss, regime in zip(losses, found, strict=True):
        assert regime != "mild" or STABLE * least < loss < SEVERE * least
        assert regime != "adaptive" or loss > STABLE * least


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30))
def test_a_stage_ends_at_the_first_loss_of_a_tenth_more_than_the_least_so_far(losses: list[float]) -> None:
    best, taken = Best("held_out_loss", None, "this", SEVERE), []
    for step, loss in enumerate(losses, 1):
        best.look(step, loss)
        taken.append(loss)
        if best.ended:
            break
    assert best.value == min(taken) and best.step == taken.index(min(taken)) + 1
    beyond = [i for i, loss in enumerate(losses) if loss >= SEVERE * min(losses[: i + 1])]
    assert len(taken) == (beyond[0] + 1 if beyond else len(losses))


def test_a_held_out_loss_that_is_not_finite_ends_the_stage_once_there_was_a_finite_one() -> None:
    best = Best("held_out_loss", None, "this", SEVERE)
    best.look(1, math.inf)
    assert not best.ended
    best.look(2, 1.0)
    best.look(3, math.inf)
    assert best.ended and best.step == 2


@pytest.fixture
def recipe(tmp_path: Path) -> Tables:
    """SFT at a rate at which its held-out loss soon rises, and a step of RL."""
    sft = {"sft.held_out": 2, "sft.held_out_every": 1, "sft.lr": 0.1, "sft.schedule": "constant", "sft.warmup": 0.0}
    return changed(file_recipe(tmp_path), {**sft, "sft.steps": 40, "sft.stop": "held-out", "stages": ["sft", "rl"]})


def test_the_stage_ends_when_its_held_out_loss_is_severe_and_hands_over_the_least(
    recipe: Tables, tmp_path: Path
) -> None:
    folder = run(recipe)
    losses = [line["held_out_loss"] for line in lines(folder) if line["stage"] == "sft"]
    steps, best = len(losses), losses.index(min(losses)) + 1
    assert 1 < best < steps < 40, "the fixture has to get better and worse again, or this test says nothing"
    assert losses[-1] >= 1.10 * min(losses) > losses[-2]
    assert (done(folder, "sft")["steps"], done(folder, "sft")["best_step"]) == (steps, best)
    short = changed(recipe, {"folder": str(tmp_path / "short"), "sft.steps": best, "stages": ["sft", "rl"]})
    del short["sft"]["stop"]
    assert weights(folder) == weights(run(short)), "RL begins from the model of the least held-out loss"


def test_the_page_says_the_regimes_and_which_model_is_left(recipe: Tables) -> None:
    folder = run(changed(recipe, {"stages": ["sft"]}))
    page, best = write_page(folder).read_text(), done(folder, "sft")["best_step"]
    assert "When to leave sft" in page
    assert f"leaves the model of step {best} (stable, the smallest held-out loss)" in page
    assert "The learning rate changes while the loss is measured" not in page
    (stage,) = json.loads((folder / "report.json").read_text())["training"]
    found = [measured["regime"] for measured in stage["held_out_regimes"]]
    assert stage["best_step"] == best and found[best - 1] == "stable" and found[-1] == "severe"


def test_the_page_of_a_stage_that_trained_on_names_the_better_step(recipe: Tables) -> None:
    whole = changed(recipe, {"stages": ["sft"], "sft.steps": 12, "sft.schedule": "cosine"})
    del whole["sft"]["stop"]
    page = write_page(run(whole)).read_text()
    assert "leaves the model of step 12 (severe, " in page
    assert "stop = &#34;held-out&#34; leaves that model" in page
    assert "The learning rate changes while the loss is measured" in page


def test_a_stage_with_few_measurements_has_no_regimes(recipe: Tables) -> None:
    page = write_page(run(changed(recipe, {"stages": ["sft"], "sft.steps": 2}))).read_text()
    assert "When to leave sft" not in page


def test_an_interrupted_stage_ends_at_the_same_step_with_the_same_bits(
    recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(changed(recipe, {"folder": str(tmp_path / "undisturbed")}))
    steps = done(undisturbed, "sft")["steps"]
    for at in (1, steps - 1):
        again = changed(recipe, {"folder": str(tmp_path / f"at-{at}"), "sft.checkpoint_every": 3})
        with monkeypatch.context() as patch:
            stop(patch, "sft", at)
            with pytest.raises(KeyboardInterrupt):
                run(again)
        folder = run(again)
        assert done(folder, "sft") == done(undisturbed, "sft") and weights(folder) == weights(undisturbed)


@pytest.mark.slow
def test_a_stage_killed_at_its_last_step_is_not_trained_further(recipe: Tables, tmp_path: Path) -> None:
    undisturbed = run(changed(recipe, {"folder": str(tmp_path / "undisturbed")}))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "driver.py").write_text(KILLED)
    last = str(done(undisturbed, "sft")["steps"])
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "recipe.json"), last]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    folder = run(recipe)
    assert done(folder, "sft") == done(undisturbed, "sft") and weights(folder) == weights(undisturbed)


@pytest.mark.slow
def test_two_ranks_leave_at_the_same_step(recipe: Tables, tmp_path: Path) -> None:
    cases = [{"recipe": {**recipe, "folder": str(tmp_path / f"on-{w}")}, "world": w} for w in (1, 2)]
    drive(tmp_path, cases)
    errors = [path.read_text() for path in tmp_path.glob("on-*-notes/error-*")]
    assert not errors, errors[0]
    one, two = (done(tmp_path / f"on-{w}", "sft") for w in (1, 2))
    assert (one["steps"], one["best_step"]) == (two["steps"], two["best_step"])


@pytest.mark.parametrize(
    ("flags", "says", "field"),
    [
        ({"sft.held_out": 0}, "looks at the loss of held-out examples, and there are none", "sft.stop"),
        ({"sft.eval_every": 1, "sft.keep_best": "eval/test", "stages": ["sft", "eval"]}, "smallest", "sft.keep_best"),
    ],
)
def test_what_does_not_go_with_it_is_refused(flags: Tables, says: str, field: str, recipe: Tables) -> None:
    with pytest.raises(UserError, match=says) as refused:
        run(changed(recipe, flags))
    assert refused.value.field == field and refused.value.remedy
    assert not Path(recipe["folder"]).exists()
