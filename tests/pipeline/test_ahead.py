"""RL whose rollout batches are sampled ahead: from which weights, resumed with the same bits, and ended without a hang.

The engine here samples in the thread that composes, with a copy of the weights; that of a process is tried in
``tests/rollout/test_child.py``.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import thence.pipeline.rl_stage as rl_stage
from tests.recipes import Tables, changed
from tests.runs import metrics, trained
from thence.errors import RecipeError, UserError
from thence.methods.registry import stage_method
from thence.pipeline.ahead import check_ahead
from thence.pipeline.run import run
from thence.recipe import Rl
from thence.rollout.native import Response, Sampling, sample
from thence.train.checkpoint import newest_checkpoint

UNTIMED = {
    "seconds", "sample_seconds", "train_seconds", "tokens_per_s", "eval_seconds", "waited_share", "time",
}  # fmt: skip


class Copies:
    """Samples with copies of the weights. Remembers which, and what it was asked for."""

    def __init__(self, context: Any):
        self.policy = context.policy
        self.model: Any = None
        self.loaded: list[int] = []
        self.versions: dict[int, Any] = {}
        self.asked: list[tuple[int, Any, list[Response]]] = []
        self.closed = threading.Event()
        self.fails_at: int | None = None
        self.waits_at: int | None = None

    def prepare(self, version: int) -> int:
        self.versions[version] = copy.deepcopy(self.policy.model)
        return version

    def take(self, handed: int) -> None:
        self.model = self.versions[handed]
        self.loaded.append(handed)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        if self.loaded[-1] == self.waits_at:
            self.closed.wait(60)
            raise UserError("the process that samples has ended", remedy="run again")
        if self.loaded[-1] == self.fails_at:
            raise UserError("the engine ended", remedy="run again")
        found = sample(self.model, prompts, seeds, sampling)
        self.asked.append((self.loaded[-1], (prompts, seeds, sampling), found))
        return found

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Copies]]:
    """The engines of the runs of a test, in their order; what is in ``settings`` is set on the next one."""
    made: list[Copies] = []

    @contextmanager
    def engine(context: Any, stage: Any, trainer: Any, threads: Any) -> Iterator[Copies]:
        found = Copies(context)
        found.__dict__.update(settings)
        made.append(found)
        yield found
        found.close()

    settings: dict[str, Any] = {}
    monkeypatch.setattr(rl_stage, "engine_ahead", engine)
    made_settings: Any = made
    yield made_settings
    assert not [t for t in threading.enumerate() if t.name == "thence-ahead"], "a thread is left"


@pytest.fixture
def own(rl_recipe: Tables) -> Tables:
    """Five steps of two optimizer steps, with a reward that differs, and a checkpoint every second step."""
    return changed(rl_recipe, {"rl.steps": 5, "rl.mini_batch": 2, "rl.checkpoint_every": 2})


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in UNTIMED} for line in metrics(folder)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_batch_is_sampled_from_the_weights_of_so_many_steps_before(
    own: Tables, tmp_path: Path, engines: list[Copies], monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    begun: dict[int, Any] = {}
    take = rl_stage.Loop.step

    def step(loop: Any, at: int) -> Any:
        begun[at] = copy.deepcopy(loop.context.model)
        return take(loop, at)

    monkeypatch.setattr(rl_stage.Loop, "step", step)
    _, lines = trained(own, tmp_path / "run", ahead=ahead)
    wanted = [max(0, at - ahead) for at in range(5)]
    assert [version for version, _, _ in engines[0].asked] == wanted
    assert [line["staleness"] for line in lines] == [at - version for at, version in enumerate(wanted)]
    for version, (prompts, seeds, sampling), found in engines[0].asked:
        assert found == sample(begun[version], prompts, seeds, sampling)
    kept = [json.loads(row) for row in (tmp_path / "run/stages/rl/samples.jsonl").read_text().splitlines()]
    assert {(row["step"] - 1, row["version"]) for row in kept} == set(enumerate(wanted))


@pytest.mark.parametrize(
    "method", [{"method": "grpo"}, {"method": "chord_mu", "options": {"decay": 3}}], ids=["grpo", "chord_mu"]
)
def test_the_prompts_and_random_numbers_are_those_of_a_run_that_samples_in_the_step(
    own: Tables, tmp_path: Path, engines: list[Copies], method: dict[str, Any]
) -> None:
    # the policy stands still, so that all versions sample the same
    slow = {"lr": 1e-12, "importance_bound": 2.0, **method}
    still, lines = trained(own, tmp_path / "in-step", **slow)
    ahead, others = trained(own, tmp_path / "ahead", ahead=2, **slow)
    assert [line["reward"] for line in others] == [line["reward"] for line in lines]
    assert max(float((ahead[name] - still[name]).abs().max()) for name in still) < 1e-9
    # a schedule of the method follows the step of the batch that is trained
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in lines], rel=1e-5, abs=1e-7)
    assert [line["flops"] for line in others] == [line["flops"] for line in lines]
    assert [line["executed_flops"] for line in others] == [line["executed_flops"] for line in lines]
    assert all(line["importance"] == pytest.approx(1, abs=1e-6) and not line["importance_cut"] for line in others)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_a_run_that_ended_at_any_step_goes_on_with_the_same_bits(
    own: Tables, tmp_path: Path, engines: list[Copies], monkeypatch: pytest.MonkeyPatch, ahead: int, stop: int
) -> None:
    settings = {"ahead": ahead, "eval_every": None}
    undisturbed, _ = trained(own, tmp_path / "undisturbed", **settings)
    take = rl_stage.Loop.step

    def step(loop: Any, at: int) -> Any:
        line = take(loop, at)
        if at == stop:
            raise KeyboardInterrupt
        return line

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_stage.Loop, "step", step)
        trained(own, tmp_path / "run", **settings)
    again, _ = trained(own, tmp_path / "run", **settings)
    assert same(again, undisturbed)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "undisturbed")
    # nothing that the checkpoint holds is sampled anew
    kept = stop // 2 * 2
    first = kept + ahead if kept else 0
    assert len(engines[2].asked) == 5 - min(first, 5)


def test_a_checkpoint_holds_the_batches_that_are_due_and_their_versions(
    own: Tables, tmp_path: Path, engines: list[Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = rl_stage.Loop.step

    def step(loop: Any, at: int) -> Any:
        if at == 2:
            raise KeyboardInterrupt
        return take(loop, at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_stage.Loop, "step", step)
        trained(own, tmp_path / "run", ahead=2)
    found = newest_checkpoint(tmp_path / "run/stages/rl/checkpoints")
    assert found is not None and found.step == 2
    facts = json.loads(bytes(found.tensors["ahead/0/facts"].tolist()))
    assert [(batch["step"], batch["version"]) for batch in facts] == [(2, 0), (3, 1)]
    assert found.plain["stage"]["drawn"][0] == facts[-1]["drawn"][0] == 16


# What is sampled and never trained.


@pytest.mark.parametrize("ahead", [1, 2])
def test_what_a_budget_leaves_untrained_is_counted_as_waste_and_trained_where_the_budget_grows(
    own: Tables, tmp_path: Path, engines: list[Copies], ahead: int
) -> None:
    whole, lines = trained(own, tmp_path / "whole", ahead=ahead)
    budget = sum(line["trained_tokens"] for line in lines[:2])
    settings = {"ahead": ahead, "tokens": budget}
    _, short = trained(own, tmp_path / "short", **settings)
    assert [line["step"] for line in short] == [1, 2]
    assert short[-1]["wasted_batches"] == ahead and "wasted_batches" not in short[0]
    wasted = sum(line["sampled_tokens"] for line in lines[2 : 2 + ahead]) if ahead == 1 else short[-1]["wasted_tokens"]
    assert short[-1]["wasted_tokens"] == wasted > 0
    assert short[-1]["wasted_flops"] > 0
    done = json.loads((tmp_path / "short/stages/rl/done.json").read_text())
    assert (done["steps"], done["wasted_batches"], done["wasted_tokens"]) == (2, ahead, wasted)
    longer, more = trained(own, tmp_path / "short", **{**settings, "tokens": 10**9})
    assert same(longer, whole)
    assert [line["reward"] for line in more] == [line["reward"] for line in lines]


def test_nothing_is_sampled_beyond_the_last_step(own: Tables, tmp_path: Path, engines: list[Copies]) -> None:
    _, lines = trained(own, tmp_path / "run", ahead=2, steps=1, mini_batch=None)
    assert len(lines) == 1 and len(engines[0].asked) == 1
    assert "wasted_batches" not in lines[0]
    done = json.loads((tmp_path / "run/stages/rl/done.json").read_text())
    assert "wasted_batches" not in done


def test_a_stage_that_is_made_longer_begins_its_next_batches_from_the_newest_weights(
    own: Tables, tmp_path: Path, engines: list[Copies]
) -> None:
    trained(own, tmp_path / "run", ahead=1, steps=2)
    _, lines = trained(own, tmp_path / "run", ahead=1, steps=4)
    assert [line["staleness"] for line in lines] == [0, 1, 0, 1]


# What cannot be done ahead, and what fails.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "exgrpo"}, "exgrpo cannot sample ahead: it replays"),
        ({"method": "prefix_rft"}, "prefix_rft cannot sample ahead"),
        ({"fault": "advantage-negated"}, "fault"),
        ({"ahead": 3}, "ahead"),
        ({"ahead": -1}, "ahead"),
        ({"ahead": True}, "ahead"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused_before_anything_is_computed(
    own: Tables, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        run({**own, "folder": str(tmp_path / "run"), "rl": {**own["rl"], "ahead": 1, **changes}})
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_rollouts_of_several_turns_are_not_sampled_ahead() -> None:
    """A checkpoint of batches that are due would lose what an environment said between the turns."""
    stage = Rl.model_validate({"environment": "calculator.py:Calculator", "ahead": 1})
    with pytest.raises(RecipeError, match="turns are not sampled ahead") as caught:
        check_ahead("rl", stage, stage_method(stage, "rl"))
    assert caught.value.field == "rl.ahead"


def test_ranks_that_share_an_engine_do_not_sample_ahead() -> None:
    """One rank would load weights while another one samples."""
    stage = Rl.model_validate({"engine": "vllm", "vllm": {"ranks_per_engine": 2}, "ahead": 1})
    with pytest.raises(RecipeError, match="ranks that share an engine cannot sample ahead") as caught:
        check_ahead("rl", stage, stage_method(stage, "rl"))
    assert caught.value.field == "rl.ahead"


def test_vllm_does_not_sample_ahead_of_weights_that_come_in_chunks() -> None:
    """They would be loaded under the responses that it samples meanwhile."""
    stage = Rl.model_validate({"engine": "vllm", "vllm": {"transfer": "ipc"}, "ahead": 1})
    with pytest.raises(RecipeError, match="in chunks while it samples ahead") as caught:
        check_ahead("rl", stage, stage_method(stage, "rl"))
    assert caught.value.field == "rl.vllm.transfer"


def test_weights_are_on_where_responses_are_sampled_ahead_and_the_run_folder_says_so(
    own: Tables, tmp_path: Path, engines: list[Copies]
) -> None:
    _, lines = trained(own, tmp_path / "run", ahead=1)
    assert "importance_bound = 2.0" in (tmp_path / "run/recipe.toml").read_text()
    assert lines[0]["importance"] == pytest.approx(1, abs=1e-6)  # float32 rounds in two ways
    assert all(0.5 < line["importance"] < 1.5 and line["importance"] != 1 for line in lines[1:])
    assert lines[0]["mismatch_kl"] < 1e-6 < lines[1]["mismatch_kl"]  # the policy has moved since


def test_an_engine_that_ends_is_an_error_and_the_run_goes_on_with_another_one(
    own: Tables, tmp_path: Path, engines: list[Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = trained(own, tmp_path / "undisturbed", ahead=1)
    monkeypatch.setattr(Copies, "fails_at", 3, raising=False)
    monkeypatch.setattr(Copies, "prepare", _failing(3))
    with pytest.raises(UserError, match="the engine ended"):
        trained(own, tmp_path / "run", ahead=1)
    monkeypatch.undo()
    monkeypatch.setattr(rl_stage, "engine_ahead", _plain_engine)
    weights, lines = trained(own, tmp_path / "run", ahead=1)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert same(weights, undisturbed)


def _failing(version: int) -> Any:
    prepare = Copies.prepare

    def prepared(engine: Copies, at: int) -> int:
        engine.fails_at = version
        return prepare(engine, at)

    return prepared


@contextmanager
def _plain_engine(context: Any, stage: Any, trainer: Any, threads: Any) -> Iterator[Copies]:
    found = Copies(context)
    yield found
    found.close()


def test_an_error_of_the_reward_in_the_thread_is_the_error_of_the_run(
    own: Tables, tmp_path: Path, engines: list[Copies]
) -> None:
    file = tmp_path / "failing.py"
    file.write_text("def share(prompt, response, answer):\n    raise ValueError('no such table')\n")
    recipe = changed(own, {"rl.reward": f"{file}:share"})
    with pytest.raises(UserError, match="no such table"):
        trained(recipe, tmp_path / "run", ahead=1)


def test_ctrl_c_while_a_batch_is_waited_for_ends_the_run_soon(
    own: Tables, tmp_path: Path, engines: list[Copies], monkeypatch: pytest.MonkeyPatch
) -> None:
    import _thread

    prepare = Copies.prepare

    def prepared(engine: Copies, at: int) -> int:
        engine.waits_at = 1
        if at == 1:  # the batch that is ordered now never comes
            threading.Timer(2.0, _thread.interrupt_main).start()
        return prepare(engine, at)

    monkeypatch.setattr(Copies, "prepare", prepared)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trained(own, tmp_path / "run", ahead=1)
    assert engines[0].closed.is_set()
    assert time.monotonic() - start < 60, "the thread was not interrupted"


def test_a_setting_may_not_change_once_the_stage_has_begun(own: Tables, tmp_path: Path, engines: list[Copies]) -> None:
    trained(own, tmp_path / "run", ahead=1, steps=2)
    with pytest.raises(UserError, match=r"rl\.ahead was 1, now 2"):
        trained(own, tmp_path / "run", ahead=2, steps=4)


def test_threads_are_dealt_to_both_on_a_cpu_unless_the_user_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from thence.cores import beside
    from thence.pipeline.ahead import sharing_cores

    assert beside({}, 8) == (4, 4) and beside({}, 5) == (3, 2) and beside({}, 1) == (1, 1)
    assert beside({"OMP_NUM_THREADS": "3"}, 3) == (3, 3)
    assert beside({"OMP_NUM_THREADS": "4", "THENCE_THREADS": "chosen"}, 4) == (2, 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    context: Any = SimpleNamespace(device=torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with sharing_cores(context, SimpleNamespace(ahead=1)) as theirs:  # type: ignore[arg-type]
            assert (torch.get_num_threads(), theirs) == (1, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
