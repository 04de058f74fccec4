"""Trackers: TensorBoard and trackio read back from their files, Weights & Biases offline, and trackers that fail."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import thence.pipeline.trackers as trackers
from tests.recipes import Tables, file_recipe
from tests.runs import metrics, stop_in_rl, weights
from thence.errors import RecipeError
from thence.pipeline.progress import NullWatcher
from thence.pipeline.run import run
from thence.recipe import load_recipe


def tracking(folder: Path, *to: str) -> Tables:
    recipe = file_recipe(folder)
    return {**recipe, "trackers": {"to": list(to)}, "sft": {**recipe["sft"], "steps": 2}}


def events(folder: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard" / stage))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_has_what_the_metrics_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    recipe = tracking(tmp_path, "tensorboard")
    stop_in_rl(recipe, monkeypatch)
    folder = run(recipe)  # a stage that is done is not sent again
    for stage in ("sft", "rl"):
        written = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics(folder, stage)]
        assert events(folder, stage)["loss"] == written and written
    [row] = json.loads((folder / "stages/eval/result.json").read_text())["rows"]
    cell = f"test/T={row['temperature']:g}/accuracy"
    assert events(folder, "eval")[cell] == [(0, pytest.approx(row["accuracy"]))]
    run(recipe, restart=True)  # what a tracker wrote belongs to the run: it is removed, not refused
    assert len(events(folder, "sft")["loss"]) == 2


class Fake:
    """A tracker that keeps what it is told, and fails where it is asked to."""

    told: list[Any]
    fails = ""

    def __init__(self, folder: Path, recipe: Any):
        self._maybe("open")

    def _maybe(self, where: str, *given: Any) -> None:
        if self.fails == where:
            raise RuntimeError("no network, api_key=S3cretS3cretS3cret")
        Fake.told.append((where, *given))

    def begin(self, *given: Any) -> None:
        self._maybe("begin", *given)

    def log(self, *given: Any) -> None:
        self._maybe("log", *given)

    def close(self) -> None:
        self._maybe("close")


@pytest.mark.parametrize("where", ["open", "begin", "log", "close"])
def test_a_tracker_that_fails_changes_nothing_and_is_named_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Fake.told = []
    monkeypatch.setattr(Fake, "fails", where)
    monkeypatch.setitem(trackers.KNOWN, "wandb", ("json", Fake))
    recipe = {**tracking(tmp_path, "wandb"), "stages": ["sft"]}
    del recipe["rl"], recipe["eval"]
    folder = run(recipe)
    plain = run({**recipe, "trackers": {}, "folder": str(tmp_path / "plain")})
    for name, tensor in weights(folder, "sft").items():
        assert tensor.equal(weights(plain, "sft")[name])
    said = [record.getMessage() for record in caplog.records if "tracker wandb failed" in record.getMessage()]
    assert len(said) == 1 and "the run continues" in said[0] and "S3cret" not in said[0]


def test_wandb_works_offline_and_a_resumed_run_is_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for part in ("first", "second"):
        (tmp_path / part).mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "first"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    recipe = tracking(tmp_path, "wandb")
    stop_in_rl(recipe, monkeypatch)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "second"))  # wandb names its folder by the second
    folder = run(recipe)
    name = json.loads((folder / "trackers.json").read_text())["wandb"]
    kept = list(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))
    assert len(kept) == 2 and all(file.name == f"run-{name}.wandb" for file in kept)
    sent, until = (b"sft/loss", b"rl/reward", b"eval/test/T="), time.monotonic() + 30
    while True:  # wandb's own process writes the files, a moment after the run has ended
        content = b"".join(file.read_bytes() for file in kept)
        if not (missing := [name for name in sent if name not in content]) or time.monotonic() > until:
            break
        time.sleep(0.1)
    assert not missing
    for file in [*folder.rglob("*"), *tmp_path.glob("*/wandb/**/*")]:
        assert not file.is_file() or b"0123456789" * 4 not in file.read_bytes(), file


def test_trackio_keeps_every_step_and_a_resumed_run_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for name, module in list(sys.modules.items()):
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    recipe = tracking(tmp_path, "trackio")
    stop_in_rl(recipe, monkeypatch)
    folder = run(recipe)
    (name,) = SQLiteStorage.get_runs("thence")
    assert name == f"run-{json.loads((folder / 'trackers.json').read_text())['trackio']}"
    lines = SQLiteStorage.get_logs("thence", name)
    for stage in ("sft", "rl"):
        kept = {line["step"]: line["loss"] for line in metrics(folder, stage)}
        assert {line[f"{stage}/step"]: line[f"{stage}/loss"] for line in lines if f"{stage}/loss" in line} == kept
    [row] = json.loads((folder / "stages/eval/result.json").read_text())["rows"]
    cell = f"eval/test/T={row['temperature']:g}/accuracy"
    assert [line[cell] for line in lines if cell in line] == [row["accuracy"]]
    assert "rackio" not in capsys.readouterr().out
    assert trackio.context_vars.current_run.get() is None  # else it would finish it once more at the end


def test_a_package_that_is_missing_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.KNOWN, "wandb", ("no_such_package", Fake))
    with pytest.raises(RecipeError, match=r"no_such_package is not installed[\s\S]*thence\[trackers\]"):
        run(tracking(tmp_path, "wandb"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_only_the_first_rank_has_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.told = []
    monkeypatch.setitem(trackers.KNOWN, "wandb", ("json", Fake))
    recipe = load_recipe(tracking(tmp_path, "wandb"))
    for leads, count in ((False, 0), (True, 2)):
        with trackers.tracked(recipe, tmp_path, NullWatcher(), leads):
            pass
        assert len(Fake.told) == count


def test_trackers_are_off_and_import_nothing(tmp_path: Path) -> None:
    assert load_recipe(file_recipe(tmp_path)).trackers.to == []
    assert trackers.numbers_of({"step": 3, "a": 1, "b": True, "c": float("nan"), "d": {"e": 2.5}, "f": "x"}) == {
        "a": 1,
        "d/e": 2.5,
    }
    assert "wandb" not in vars(sys.modules["thence.pipeline.trackers"])
