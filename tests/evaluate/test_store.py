"""The store of an evaluation survives crashes and refuses mixtures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.evaluate.counting import Counting, run, settings_of
from thence.errors import UserError
from thence.evaluate.store import Store
from thence.evaluate.summary import summarise


def test_a_finished_evaluation_is_not_sampled_again(tmp_path: Path, data: Path) -> None:
    settings = settings_of(data)
    first, second = Counting(), Counting()
    run(tmp_path / "e", settings, first)
    store = run(tmp_path / "e", settings, second)
    assert len(first.asked) == 18 and second.asked == []
    assert len(store.samples("sums")) == len(store.grades("sums")) == 18


def test_ctrl_c_keeps_every_sample_and_the_rest_follows(tmp_path: Path, data: Path) -> None:
    settings = settings_of(data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e", settings, Counting(stop_after=7))
    assert len(Store(tmp_path / "e").samples("sums")) == 7
    rest = Counting()
    store = run(tmp_path / "e", settings, rest)
    assert len(rest.asked) == 11
    whole = run(tmp_path / "whole", settings, Counting())
    assert store.samples("sums") == whole.samples("sums")


SLOW_CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.evaluate.counting import Counting, settings_of, run

class Slow(Counting):
    def generate(self, requests, task):
        for pair in super().generate(requests, task):
            yield pair
            time.sleep(0.05)

run(Path(sys.argv[2]), settings_of(Path(sys.argv[3])), Slow())
"""


def test_kill_minus_nine_loses_no_sample_and_resuming_gives_the_same(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "e"
    arguments = [sys.executable, "-c", SLOW_CHILD, str(ROOT), str(folder), str(data)]
    child = subprocess.Popen(arguments)
    kept = folder / "samples" / "sums.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not kept.exists() or kept.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = len(Store(folder).samples("sums"))
    assert 4 <= before < 18
    settings = settings_of(data)
    rest = Counting()
    store = run(folder, settings, rest)
    assert len(rest.asked) == 18 - before
    assert store.samples("sums") == run(tmp_path / "whole", settings, Counting()).samples("sums")


def test_an_evaluation_killed_while_it_writes_its_settings_goes_on(tmp_path: Path, data: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / ".evaluation.toml.writing").write_text("model = ")
    settings = settings_of(data)
    store = run(tmp_path / "e", settings, Counting())
    assert store.samples("sums") == run(tmp_path / "whole", settings, Counting()).samples("sums")


def test_a_line_cut_by_a_crash_is_sampled_again(tmp_path: Path, data: Path) -> None:
    settings = settings_of(data)
    store = run(tmp_path / "e", settings, Counting())
    for name in ("samples", "grades"):
        path = store.folder / name / "sums.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
    assert len(store.samples("sums")) == 17
    rest = Counting()
    run(store.folder, settings, rest)
    assert len(rest.asked) == 1
    assert len({sample.place for sample in store.samples("sums")}) == 18
    assert summarise(store).missing == 0


def test_a_damaged_line_is_named_set_aside_and_sampled_again(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(data)
    store = run(tmp_path / "e", settings, Counting())
    path = store.folder / "samples" / "sums.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:20], *lines[5:]]) + "\n")
    assert len(store.samples("sums")) == 17 and summarise(store).missing == 1
    assert f"{path}:5" in caplog.text
    rest = Counting()
    run(store.folder, settings, rest)
    assert len(rest.asked) == 1 and summarise(store).missing == 0
    assert path.with_name("sums.jsonl.damaged").read_text() == lines[4][:20] + "\n"


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"max_tokens": 9}, {"seed": 1}, {"template": "boxed"}])
def test_samples_of_other_settings_are_not_mixed_in(tmp_path: Path, data: Path, change: dict[str, Any]) -> None:
    run(tmp_path / "e", settings_of(data), Counting())
    other = Counting()
    with pytest.raises(UserError, match=next(iter(change))):
        run(tmp_path / "e", settings_of(data, **change), other)
    assert other.asked == []


def test_more_problems_and_samples_may_be_added_but_not_taken_away(tmp_path: Path, data: Path) -> None:
    run(tmp_path / "e", settings_of(data, limit=2), Counting())
    more = Counting()
    store = run(tmp_path / "e", settings_of(data, limit=4, samples=5), more)
    assert len(more.asked) == 4 * 5 - 2 * 3
    assert summarise(store).tasks[0].task.samples == 5
    with pytest.raises(UserError, match="limit"):
        run(tmp_path / "e", settings_of(data, limit=3, samples=5), Counting())


def test_changed_weights_and_changed_problems_are_refused(tmp_path: Path, data: Path) -> None:
    run(tmp_path / "e", settings_of(data, limit=3), Counting())
    with pytest.raises(UserError, match="model has changed"):
        run(tmp_path / "e", settings_of(data), Counting(weights="w1"))
    data.write_text(data.read_text().replace('"answer": "2"', '"answer": "3"'))
    with pytest.raises(UserError, match="data of sums have changed"):
        run(tmp_path / "e", settings_of(data), Counting())


def test_two_processes_cannot_add_to_one_folder(tmp_path: Path, data: Path) -> None:
    store = Store(tmp_path / "e")
    with store.held(), pytest.raises(UserError, match="another process"):
        run(store.folder, settings_of(data), Counting())


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, data: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no evaluation"):
        run(tmp_path, settings_of(data), Counting())


def test_seeds_belong_to_the_sample_and_not_to_the_order(tmp_path: Path, data: Path) -> None:
    few, many = Counting(), Counting()
    run(tmp_path / "few", settings_of(data, samples=1, limit=2), few)
    run(tmp_path / "many", settings_of(data, samples=3), many)
    assert set(few.asked) < set(many.asked)
    assert len({seed for _, _, seed in many.asked}) == 18
