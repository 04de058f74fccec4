"""What `thence watch` sees of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.pages.test_report import make_run
from thence.cli import main
from thence.cli.watch import screen, sparkline, where, whole_run
from thence.locks import held, is_held
from thence.pipeline.progress import NullWatcher, ProgressFile
from thence.pipeline.watching import look
from thence.terminal import make_console


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in its RL stage, after step 3 of 8."""
    folder = make_run(tmp_path / "trial", steps=3)
    for name in ("eval-base", "sft", "eval-sft"):
        (folder / "stages" / name).mkdir(parents=True, exist_ok=True)
        (folder / "stages" / name / "done.json").write_text("{}")
    (folder / "progress.json").write_text(json.dumps({"stage": "rl", "done": 3, "total": 8, "doing": None}))
    return folder


def test_a_run_that_runs_and_one_that_has_stopped(run: Path) -> None:
    with held(run, "runs this recipe"):
        seen = look(run)
        assert (seen.state, seen.stage, seen.step, seen.total) == ("running", "rl", 3, 8)
        assert seen.done == ("eval-base", "sft", "eval-sft")
        assert seen.seconds == pytest.approx(5.0)  # 5 steps of a second each
        assert where(seen) == "rl 3 of 8, about 5 s left of this stage"
    seen = look(run)
    assert seen.state == "stopped" and where(seen) == "stopped in rl 3 of 8"


def test_watching_ends_with_the_run_and_says_when_it_is_dead(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run)]) == 1
    said = capsys.readouterr()
    assert "stopped in rl 3 of 8  reward 0.300" in said.out
    assert "rl, eval-rl are not done" in said.err and f"thence run {run / 'recipe.toml'}" in said.err
    for name in ("rl", "eval-rl"):
        (run / "stages" / name).mkdir(exist_ok=True)
        (run / "stages" / name / "done.json").write_text("{}")
    assert main(["watch", str(run)]) == 0
    assert capsys.readouterr().out.startswith("done  reward 0.300")


def test_watching_changes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    look(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_screen_fits_and_shows_the_last_sample(run: Path, width: int) -> None:
    line = {"verdict": "right", "step": 3, "prompt": "12a+3?\n" * 99, "response": "\x1b[2Ja=15#15", "answer": "15"}
    torn = '{"verdict": "wrong", "prom'
    (run / "stages" / "rl").mkdir(exist_ok=True)
    (run / "stages" / "rl" / "samples.jsonl").write_text(f'{{"verdict": "wrong"}}\n{json.dumps(line)}\n{torn}')
    console = make_console(verbatim=True, width=width, record=True)
    with console.capture() as captured:
        console.print(screen(look(run), width))
    text = captured.get()
    assert max(map(len, text.splitlines())) <= width
    for part in ("trial", "stopped", "rl now", "eval-rl to come", "reward", "0.300", "last sample", "right", "a=15#15"):
        assert part in text.replace("\u00a0", " "), part
    assert "\x1b" not in text and "▁" in text


def test_the_time_that_the_whole_run_has_to_go_is_shown(run: Path) -> None:
    progress = {"stage": "rl", "done": 3, "total": 8, "doing": None, "at": time.time() - 10}
    told = {"left": {"seconds": 100.0, "unknown": ["eval-rl"]}}
    (run / "progress.json").write_text(json.dumps(progress | told))
    with held(run, "runs this recipe"):
        seen = look(run)
        assert whole_run(seen) == "whole run: about 1 min 30 s and eval-rl left"  # 10 s have gone by
        console = make_console(width=80)
        with console.capture() as captured:
            console.print(screen(seen, 80))
        assert "about 5 s left of this stage" in captured.get() and whole_run(seen) in captured.get()
    assert whole_run(look(run)) == "", "nothing runs"
    for odd in ({"left": 3}, {"left": {"seconds": "x"}}, {"left": {"seconds": 1.0, "unknown": 3}}, {"at": "x"}):
        (run / "progress.json").write_text(json.dumps(progress | told | odd))
        assert look(run).whole.unknown == ()


def test_a_run_keeps_what_it_has_to_go(tmp_path: Path) -> None:
    kept = ProgressFile(NullWatcher(), tmp_path)
    kept.begin("mine", ["sft", "rl"])
    kept.doing("sft: opening the model")
    assert json.loads((tmp_path / "progress.json").read_text())["left"] == {"seconds": None, "unknown": ["sft", "rl"]}
    kept.stage("sft", 1, 0)
    kept.step({})
    left = json.loads((tmp_path / "progress.json").read_text())["left"]
    assert left == {"seconds": 0.0, "unknown": ["rl"]}


def test_what_goes_on_before_the_first_step_is_said(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    (run / "progress.json").write_text(json.dumps({"stage": "sft", "doing": "rl: opening the model", "done": 48}))
    with held(run, "runs this recipe"):
        assert where(look(run)) == "rl: opening the model ..."


def test_a_damaged_progress_file_costs_nothing(run: Path) -> None:
    (run / "progress.json").write_text('{"stage": "rl", ')
    assert look(run).step == 3


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([2.0, 2.0], 10) == "▁▁"
    assert sparkline(list(map(float, range(1000))), 8) == "▁▂▃▄▅▆▇█"


def test_a_lock_is_seen_without_taking_it(tmp_path: Path) -> None:
    assert is_held(tmp_path) is False
    with held(tmp_path, "works here"):
        assert is_held(tmp_path) is True
    assert is_held(tmp_path) is False
