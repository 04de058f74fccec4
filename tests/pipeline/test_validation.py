"""Validation while training: what is measured, what it changes (nothing), the best model, early stopping, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.on_ranks import drive, lines
from tests.recipes import Tables, changed, file_recipe
from thence.errors import CheckpointError, UserError
from thence.pages.run.page import write_page
from thence.pipeline import rl_stage, sft_stage
from thence.pipeline.preflight import preflight
from thence.pipeline.run import run
from thence.pipeline.validation import Best
from thence.recipe import load_recipe

OWN = "len(set(response)) / 8"
EVERY = {"sft.eval_every": 2, "rl.eval_every": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Tables:
    """SFT of 5 steps, RL of 4, and an evaluation by a reward that gives degrees, so that values move."""
    base = changed(file_recipe(tmp_path), {"sft.steps": 5, "rl.steps": 4, "rl.lr": 1e-2, "sft.lr": 1e-2})
    (tmp_path / "own.py").write_text(f"def share(prompt, response, answer):\n    return {OWN}\n")
    return changed(base, {"eval.reward": base["rl"]["reward"], "eval.samples": 2})


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("stages/*/model/*.safetensors")}


def measured(folder: Path, stage: str) -> dict[int, float]:
    return {line["step"]: line["eval/test"] for line in lines(folder) if line["stage"] == stage and "eval/test" in line}


def done(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "stages" / stage / "done.json").read_text())


def test_it_measures_every_so_many_steps_and_at_the_end_and_changes_no_bit(recipe: Tables, tmp_path: Path) -> None:
    plain = run(changed(recipe, {"folder": str(tmp_path / "plain")}))
    folder = run(changed(recipe, EVERY))
    assert list(measured(folder, "sft")) == [2, 4, 5] and list(measured(folder, "rl")) == [2, 4]
    assert weights(folder) == weights(plain) != {}
    trained = [[line[key] for key in ("loss", "grad_norm")] for line in lines(plain)]
    assert trained == [[line[key] for key in ("loss", "grad_norm")] for line in lines(folder)]
    assert not any(key.startswith("eval") for line in lines(plain) for key in line)


def test_the_value_after_the_last_step_is_that_of_an_evaluation_of_the_model(recipe: Tables) -> None:
    folder = run(changed(recipe, EVERY))
    (row,) = json.loads((folder / "stages" / "eval" / "result.json").read_text())["rows"]
    assert measured(folder, "rl")[4] == pytest.approx(row["reward"], abs=0) and row["reward"] > 0
    assert [line["eval"] for line in lines(folder) if "eval" in line] == [
        line["eval/test"] for line in lines(folder) if "eval" in line
    ]


def test_a_test_set_is_chosen_by_name_and_cut_to_a_limit(recipe: Tables) -> None:
    """The page of the run has a curve for each."""
    splits = {"one": {"limit": 1}, "all": {}}
    flags = {"eval.splits": splits, "sft.eval_every": 5, "sft.eval_on": "all", "sft.eval_limit": 1, "rl.eval_every": 4}
    folder = run(changed(recipe, flags))
    sft, rl = ([line for line in lines(folder) if line["stage"] == stage][-1] for stage in ("sft", "rl"))
    assert "eval/all" in sft and "eval/one" not in sft
    assert rl["eval"] == pytest.approx((rl["eval/one"] + rl["eval/all"]) / 2)
    page = write_page(folder).read_text()
    assert "Test set one" in page and page.count("Test set all, accuracy or mean reward") == 2


def best_step(values: dict[int, float]) -> int:
    return max(values, key=lambda step: (values[step], -step))


def test_the_model_of_the_best_step_is_the_stages_model(recipe: Tables, tmp_path: Path) -> None:
    only = changed(recipe, {"stages": ["sft", "eval"], "sft.eval_every": 1, "sft.steps": 8, "sft.lr": 0.3})
    folder = run(changed(only, {"sft.keep_best": "eval/test"}))
    values = measured(folder, "sft")
    best = best_step(values)
    assert best < 8, "the fixture has to get worse again, or this test says nothing"
    assert done(folder, "sft")["best_step"] == best and done(folder, "sft")["best"] == {"eval/test": values[best]}
    short = changed(only, {"folder": str(tmp_path / "short"), "sft.schedule": "constant", "sft.warmup": 0.0})
    long = run(changed(short, {"folder": str(tmp_path / "long"), "sft.keep_best": "eval"}))
    best = done(long, "sft")["best_step"]
    assert best < 8 and weights(long) == weights(run(changed(short, {"sft.steps": best})))
    kept = sorted(path.name for path in (long / "stages" / "sft" / "checkpoints").iterdir())
    assert kept == [f"step-{best:06d}", "step-000008"], "the best, and the newest to go on from"


def test_patience_ends_a_stage_that_gets_no_better(recipe: Tables) -> None:
    flags = {"rl.eval_every": 1, "rl.keep_best": "eval", "rl.patience": 2, "rl.steps": 40, "stages": ["rl", "eval"]}
    folder = run(changed(recipe, {**flags, "rl.lr": 1e-9}))  # nothing moves: the first value stays the best
    assert list(measured(folder, "rl")) == [1, 2, 3]
    assert done(folder, "rl")["steps"] == 3 and done(folder, "rl")["best_step"] == 1
    resumed = run(changed(recipe, {**flags, "rl.lr": 1e-9}))
    assert list(measured(resumed, "rl")) == [1, 2, 3], "a finished stage is not begun again"


def test_held_out_loss_counts_as_a_metric_and_less_is_better(recipe: Tables) -> None:
    flags = {"stages": ["sft"], "sft.held_out": 2, "sft.held_out_every": 1, "sft.keep_best": "held_out_loss"}
    folder = run(changed(recipe, {**flags, "sft.steps": 6, "sft.lr": 0.5}))
    values = {line["step"]: line["held_out_loss"] for line in lines(folder)}
    assert done(folder, "sft")["best_step"] == min(values, key=lambda step: values[step]) < 6


def test_keep_last_keeps_the_newest_also_when_the_stage_is_done(recipe: Tables) -> None:
    flags = {"sft.keep_last": 3, "sft.checkpoint_every": 1, "rl.checkpoint_every": 1, "rl.keep_last": 9}
    folder = run(changed(recipe, flags))
    steps = {
        stage: sorted(int(path.name[5:]) for path in (folder / "stages" / stage / "checkpoints").iterdir())
        for stage in ("sft", "rl")
    }
    assert steps == {"sft": [3, 4, 5], "rl": [1, 2, 3, 4]}


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_stopped_run_ends_with_the_same_bits_and_the_same_best_model(
    stage: str, recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {f"{stage}.keep_best": "eval", f"{stage}.checkpoint_every": 3, f"{stage}.lr": 0.1, f"{stage}.eval_every": 1}
    whole = changed(recipe, {**flags, "sft.steps": 8, "rl.steps": 8, "stages": [stage, "eval"]})
    undisturbed = run(changed(whole, {"folder": str(tmp_path / "undisturbed")}))
    with monkeypatch.context() as patch:
        stop(patch, stage, 4)
        with pytest.raises(KeyboardInterrupt):
            run(whole)
    folder = run(whole)
    assert measured(folder, stage) == measured(undisturbed, stage)
    assert done(folder, stage) == done(undisturbed, stage)
    assert weights(folder) == weights(undisturbed)


def stop(patch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    take, draw = rl_stage.Loop.step, sft_stage.batch_at

    def stopping_rl(loop: rl_stage.Loop, at: int) -> dict[str, Any]:
        if at == step:
            raise KeyboardInterrupt
        return take(loop, at)

    def stopping(n: int, batch: int, seed: int, at: int) -> list[int]:
        if at == step:
            raise KeyboardInterrupt
        return draw(n, batch, seed, at)

    patch.setattr(sft_stage, "batch_at", stopping)
    patch.setattr(rl_stage.Loop, "step", stopping_rl)


KILLED = """
import json, os, signal, sys
from thence.pipeline.folder import RunFolder
from thence.pipeline.run import run

log, at = RunFolder.log, int(sys.argv[2])

def logged(folder, line):
    log(folder, line)
    if line["step"] == at:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.log = logged
run(json.loads(open(sys.argv[1]).read()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [6, 4])
@pytest.mark.matrix(1)
def test_a_run_killed_by_sigkill_ends_with_the_same_bits_and_the_same_best_model(
    at: int, recipe: Tables, tmp_path: Path
) -> None:
    flags = {"rl.keep_best": "eval", "rl.checkpoint_every": 3, "rl.lr": 0.1, "rl.eval_every": 1, "rl.patience": 5}
    whole = changed(recipe, {**flags, "rl.steps": 8, "stages": ["rl", "eval"]})
    undisturbed = run(changed(whole, {"folder": str(tmp_path / "undisturbed")}))
    (tmp_path / "recipe.json").write_text(json.dumps(whole))
    (tmp_path / "driver.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "recipe.json"), str(at)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    folder = run(whole)
    assert measured(folder, "rl") == measured(undisturbed, "rl")
    assert (done(folder, "rl"), weights(folder)) == (done(undisturbed, "rl"), weights(undisturbed))


def test_a_best_checkpoint_that_is_gone_is_an_error_and_not_another_model(
    recipe: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = changed(recipe, {"stages": ["sft"], "sft.held_out": 2, "sft.held_out_every": 1, "sft.lr": 0.5})
    only = changed(only, {"sft.keep_best": "held_out_loss", "sft.steps": 6})
    with monkeypatch.context() as patch:
        patch.setattr("thence.pipeline.run.take_best", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(only)
    checkpoints = sorted((Path(only["folder"]) / "stages" / "sft" / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    file = checkpoints[0] / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is the best of stage sft, and its checkpoint is not as it was written"):
        run(only)


def stopped(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_two_ranks_measure_and_choose_what_one_does(recipe: Tables, tmp_path: Path) -> None:
    flags = {**EVERY, "sft.keep_best": "eval", "rl.keep_best": "eval", "rl.patience": 2}
    base = changed(recipe, flags)
    cases = [{"recipe": {**base, "folder": str(tmp_path / f"on-{w}")}, "world": w} for w in (1, 2)]
    drive(tmp_path, cases)
    errors = [path.read_text() for path in tmp_path.glob("on-*-notes/error-*")]
    assert not errors, errors[0]
    alone, both = tmp_path / "on-1", tmp_path / "on-2"
    for stage in ("sft", "rl"):
        assert measured(both, stage) == pytest.approx(measured(alone, stage))
        assert done(both, stage)["best_step"] == done(alone, stage)["best_step"]


# What is refused before the first step.


@pytest.mark.parametrize(
    ("flags", "says", "field"),
    [
        ({"sft.eval_every": 1, "stages": ["sft"]}, "no test set to measure on", "sft.eval_every"),
        ({"sft.eval_every": 1, "sft.eval_on": ["hard"]}, "no test set 'hard'", "sft.eval_on"),
        ({"sft.eval_on": ["test"]}, "eval_on is for measurements", "sft.eval_on"),
        ({"rl.eval_limit": 3}, "eval_limit is for measurements", "rl.eval_limit"),
        ({"rl.patience": 3}, "patience waits for a better value", "rl.patience"),
        ({"rl.keep_best": "eval"}, "does not measure 'eval'", "rl.keep_best"),
        ({"sft.keep_best": "held_out_loss"}, "does not measure 'held_out_loss'", "sft.keep_best"),
        ({"sft.eval_every": 1, "sft.keep_best": "loss"}, "does not measure 'loss'", "sft.keep_best"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(flags: Tables, says: str, field: str, recipe: Tables) -> None:
    with pytest.raises(UserError, match=says) as refused:
        run(changed(recipe, flags))
    assert refused.value.field == field and refused.value.remedy
    assert not Path(recipe["folder"]).exists()


def test_the_test_sets_are_tried_before_the_first_step(recipe: Tables, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("{broken\n")
    tables = changed(recipe, {"stages": ["eval", "sft"], "sft.eval_every": 1})
    found = {finding.part: finding.state for finding in preflight(load_recipe(tables))}
    assert found["sft, measured on test: data"] == "refused"


# The best value, without a run.


def test_of_equal_values_the_first_is_the_best_and_what_is_no_number_is_none() -> None:
    best = Best("eval", 2, "this")
    assert [best.look(step, value) for step, value in ((1, 0.5), (2, 0.5), (3, 0.7), (4, None), (5, float("nan")))] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert best.step == 3 and best.ended
    again = Best("eval", None, "this")
    again.restore(best.state(), None)  # type: ignore[arg-type]
    assert (again.step, again.value, again.since, again.ended) == (3, 0.7, 2, False)
