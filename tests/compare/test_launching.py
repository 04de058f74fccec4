"""What a comparison does when a run dies, when its machine is lost, and when there is no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compare.small import Quiet, tables
from tests.launch.fake import Act, FakeLauncher
from thence.compare import engine
from thence.compare.engine import LOSSES, compare
from thence.compare.place import Place
from thence.compare.recipe import load_comparison
from thence.compare.result import Comparison, read_results
from thence.errors import UserError
from thence.launch.base import Needs, Order
from thence.pipeline.folder import RunFolder

DONE = [{"done": True}]
LOST = [{"lost": "node b was lost"}]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two arms from a base that is there, with two seeds; nothing that it names is tried."""
    monkeypatch.setattr(engine, "refuse_what_cannot_run", lambda *_: None)
    arms = {"sft": {"kind": "sft"}, "rl": {"kind": "rl"}, "sft-then-rl": {"after": "sft", "kind": "rl"}}
    return tables(tmp_path, arms=arms, bases={"small": {"path": "world:chain/rich"}})


def run(own: dict[str, Any], act: Act, room: int = 1, **more: Any) -> tuple[FakeLauncher, Quiet, Comparison]:
    launcher, watcher = FakeLauncher(act, room, **more), Quiet()
    place = Place(launcher=lambda folder, lock: launcher, needs=lambda job, folder: Needs(memory=len(job.run.arm)))
    only = [name for name in own["arms"] if name != "sft-then-rl"]
    return launcher, watcher, compare(load_comparison(own), place=place, only=only, watcher=watcher)


def names(orders: list[Order]) -> list[tuple[str, int]]:
    return [(order.key.arm, order.key.seed) for order in orders]  # type: ignore[attr-defined]


def test_every_run_is_started_once_with_its_needs_and_never_more_than_there_is_room_for(small) -> None:
    launcher, watcher, _ = run(small, lambda order, time: DONE, room=3)
    assert names(launcher.starts) == [("sft", 0), ("rl", 0), ("sft", 1), ("rl", 1)]
    assert [order.needs.memory for order in launcher.starts] == [3, 2, 3, 2]
    assert all(order.folder.is_absolute() for order in launcher.starts)
    assert launcher.most == 3 and not launcher.open
    assert len(watcher.finished_runs) == 4 and not watcher.failures


def test_a_run_whose_machine_is_lost_starts_again_and_is_said_to_start_anew(small) -> None:
    launcher, watcher, _ = run(small, lambda order, time: DONE if time > 1 or order.key.seed else LOST)
    assert names(launcher.starts) == [("sft", 0), ("sft", 0), ("rl", 0), ("rl", 0), ("sft", 1), ("rl", 1)]
    assert [what for _, what in watcher.notes] == ["node b was lost: starts anew, it has no checkpoint yet"] * 2
    assert len(watcher.finished_runs) == 4 and not watcher.failures


def test_a_run_that_left_a_checkpoint_is_said_to_resume_from_it(small) -> None:
    def act(order: Order, time: int) -> list[dict[str, Any]]:
        if time > 1 or order.key.arm != "rl":  # type: ignore[attr-defined]
            return DONE
        place = RunFolder(order.folder).stage("rl") / "checkpoints" / "step-000007"
        place.mkdir(parents=True)
        (place / "state.json").write_text("{}")
        return LOST

    _, watcher, _ = run(small, act)
    said = "node b was lost: resumes from its last checkpoint (rl, step-000007)"
    assert [what for _, what in watcher.notes] == [said] * 2


def test_a_run_whose_machines_are_lost_again_and_again_fails_and_the_others_go_on(small) -> None:
    launcher, watcher, results = run(small, lambda order, time: LOST if order.key.arm == "rl" else DONE)
    assert names(launcher.starts).count(("rl", 0)) == names(launcher.starts).count(("rl", 1)) == LOSSES + 1
    assert [(failure.arm, failure.seed) for failure in results.failures] == [("rl", 0), ("rl", 1)]
    assert "node b was lost; this was loss 4 of this run, and it is given up" in results.failures[0].why
    assert len(watcher.finished_runs) == 2


def test_a_run_whose_process_dies_is_tried_once_more_and_losses_do_not_count_as_deaths(small) -> None:
    died = [{"died": "code 9"}]
    launcher, _, results = run(small, lambda order, time: LOST if time == 1 else died if time == 2 else DONE)
    assert len(launcher.starts) == 3 * 4 and not results.failures
    launcher, _, results = run(small, lambda order, time: died)
    assert len(launcher.starts) == 2 * 4 and len(results.failures) == 4


def test_what_is_noted_and_where_a_run_is_reach_the_watcher(small) -> None:
    messages = [{"note": "waits for room in the cluster"}, {"placed": "on node a"}, {"progress": ["sft", 1, 2]}, *DONE]
    _, watcher, _ = run(small, lambda order, time: messages)
    assert [what for _, what in watcher.notes] == ["waits for room in the cluster", "on node a"] * 4


def test_needs_that_can_never_be_met_end_the_comparison_before_its_first_run(small) -> None:
    def check(needs: list[Needs]) -> None:
        assert {each.memory for each in needs} == {2, 3}
        raise UserError("too large", remedy="add a node")

    launcher = FakeLauncher(lambda order, time: DONE, check=check)
    place = Place(launcher=lambda folder, lock: launcher, needs=lambda job, folder: Needs(memory=len(job.run.arm)))
    recipe = load_comparison(small)
    with pytest.raises(UserError, match="too large"):
        compare(recipe, place=place, only=["sft", "rl"], watcher=Quiet())
    assert not launcher.starts and not launcher.open
    assert read_results(recipe.path()).pending > 0


def test_ctrl_c_ends_what_runs_and_keeps_what_is_done(small) -> None:
    def act(order: Order, time: int) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    launcher = FakeLauncher(act)
    place = Place(launcher=lambda folder, lock: launcher, needs=lambda job, folder: Needs())
    recipe = load_comparison(small)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, place=place, watcher=Quiet())
    assert len(launcher.starts) == 1 and not launcher.open
    assert read_results(recipe.path()).pending == 6
