"""One process at a time writes into a run, an evaluation or a comparison; readers are let in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import thence.pipeline.folder as folders
import thence.pipeline.run as running
from tests.compare.small import Quiet
from tests.compare.small import tables as comparison_tables
from tests.folders import content
from tests.recipes import Tables, changed
from thence.cli import main
from thence.compare.engine import compare
from thence.compare.recipe import load_comparison
from thence.errors import UserError
from thence.evaluate.run import evaluate
from thence.evaluate.store import Settings
from thence.locks import LOCK, held, refuse_if_held
from thence.pipeline.run import run

HOLDER = "import sys, time; from pathlib import Path; from thence.locks import held\n"
HOLDER += "with held(Path(sys.argv[1]), 'runs this recipe'): print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.0)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_number_and_host_of_the_first(
    finished: Tables,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(finished["folder"])
    process = holder(folder)
    before = content(folder)
    try:
        for options in ({}, {"restart": True}, {"repeat": ["eval"]}):
            with pytest.raises(UserError) as error:
                run(changed(finished, {"eval.samples": 2}), **options)
            assert f"process {process.pid} on {os.uname().nodename}" in str(error.value)
        assert content(folder) == before
        assert main(["report", str(folder)]) == 0, "readers are let in"
        assert main(["sample", str(folder)]) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert f'"pid": {process.pid}' in (folder / LOCK).read_text()
    run(finished)  # what the killed process has left names it, and holds nobody off


def test_two_runs_at_once_in_one_process_write_every_step_once(
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, inside, said = changed(tables, {"stages": ["sft"], "sft.steps": 3}), threading.Event(), []
    original = running.run_sft

    def slowly(context: Any, stage: Any) -> Any:
        inside.set()
        while not said:
            time.sleep(0.01)
        return original(context, stage)

    def second() -> None:
        inside.wait(30)
        try:
            run(recipe)
        except UserError as error:
            said.append(str(error))
        else:
            said.append("it ran")

    monkeypatch.setattr(running, "run_sft", slowly)
    other = threading.Thread(target=second)
    other.start()
    run(recipe)
    other.join()
    assert "another process runs this recipe" in said[0]
    lines = [json.loads(line) for line in (Path(recipe["folder"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_runs_one_after_the_other_in_one_process_do_not_hold_each_other_off(
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = changed(tables, {"stages": ["sft"]})

    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(running, "run_sft", fails)
        run(recipe)
    run(recipe)
    run(recipe, restart=True)


def test_a_dry_run_and_a_refused_run_leave_no_lock(tables: Tables, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(changed(tables, {"rl.reward": "mth"}))
    assert not Path(tables["folder"]).exists()
    refuse_if_held(tmp_path / "absent", "runs this recipe")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("text", ["", "{", "[3]", '{"pid": 1}', "\x00", '{"pid": "x", "host": [], "since": 3}'])
def test_whatever_a_lock_file_says_it_holds_nobody_off_and_breaks_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with held(tmp_path, "runs this recipe"):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(UserError, match="another process runs this recipe"), held(tmp_path, "runs this recipe"):
            pass


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("ten years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="a link"), held(tmp_path / "run", "runs this recipe"):
        pass
    assert (tmp_path / "precious").read_text() == "ten years of work"


def test_an_evaluation_and_a_comparison_name_their_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import thence.compare.engine as engine

    monkeypatch.setattr(engine, "LOCK_SECONDS", 0.0)
    recipe = load_comparison(comparison_tables(tmp_path))
    here = f"process {os.getpid()} on {os.uname().nodename}"
    with held(tmp_path / "evaluation", "x"), pytest.raises(UserError, match="adding to this evaluation") as error:
        evaluate(Settings(model="m", suite="s", tasks={}), {}, tmp_path / "evaluation", lambda: pytest.fail("opened"))
    assert here in str(error.value)
    with held(recipe.path(), "x"), pytest.raises(UserError, match="runs this comparison") as error:
        compare(recipe, watcher=Quiet())
    assert here in str(error.value)
