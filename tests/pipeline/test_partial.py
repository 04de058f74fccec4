"""RL whose batches hold the groups that end first: none is lost, pieces fit together, and a run resumes its bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import thence.pipeline.partial as partial
import thence.pipeline.rl_stage as rl_stage
from tests.recipes import Tables, changed
from tests.runs import metrics, trained
from thence.errors import CheckpointError, RecipeError
from thence.pipeline.partial import Begun, Group, Partial
from thence.pipeline.run import run
from thence.rollout.native import Response, sample
from thence.train.checkpoint import newest_checkpoint

UNTIMED = {"seconds", "sample_seconds", "train_seconds", "tokens_per_s", "eval_seconds", "time"}


@pytest.fixture
def own(rl_recipe: Tables) -> Tables:
    """Six steps of two prompts, seven in flight, four tokens a chunk; responses have up to 60 tokens."""
    flags = {"rl.steps": 6, "rl.prompts": 2, "rl.rollouts": 3, "rl.checkpoint_every": 2, "rl.max_tokens": 60}
    return changed(rl_recipe, {**flags, "rl.partial": {"in_flight": 7, "chunk_tokens": 4}})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Group], list[Group]]]:
    """Of every batch: its step, its groups, and the pool that it left; with the weights under ``weights``."""
    seen: list[tuple[int, list[Group], list[Group]]] = []
    trajectories, take = Partial._trajectories, Partial.take

    def make(self: Partial, group: Group, place: int) -> Any:
        seen[-1][1].append(group)
        return trajectories(self, group, place)

    def taking(self: Partial, step: int) -> Any:
        seen.append((step, [], []))
        batch = take(self, step)
        seen[-1][2].extend(copy.deepcopy(self.pool))
        return batch

    monkeypatch.setattr(Partial, "_trajectories", make)
    monkeypatch.setattr(Partial, "take", taking)
    return seen


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in UNTIMED} for line in metrics(folder)]


def test_every_group_that_is_begun_is_trained_once_and_the_last_step_leaves_nothing(
    own: Tables, tmp_path: Path, taken: Any
) -> None:
    _, lines = trained(own, tmp_path / "run")
    numbers = [[group.number for group in groups] for _, groups, _ in taken]
    assert [len(own) for own in numbers] == [2] * 6
    assert sorted(number for own in numbers for number in own) == list(range(12))
    assert numbers != [[2 * step, 2 * step + 1] for step in range(6)]  # some were overtaken
    assert [line["carried"] for line in lines] == [5, 5, 5, 4, 2, 0]
    assert all(line["sequences"] == 6 for line in lines)
    assert not any("wasted_tokens" in line for line in lines)


def test_of_the_groups_that_have_ended_the_oldest_are_the_batch(own: Tables, tmp_path: Path, taken: Any) -> None:
    trained(own, tmp_path / "run")
    for _, groups, pool in taken:
        waiting = [group.number for group in pool if group.has_ended]
        assert not waiting or max(group.number for group in groups) < min(waiting)


def test_a_response_in_pieces_is_the_one_that_a_single_call_gives(
    own: Tables, tmp_path: Path, taken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    begin = Partial.begin

    def beginning(self: Partial, done: int, tensors: Any) -> None:
        begin(self, done, tensors)
        found.update(model=self.context.model, prompts=self.prompts, sampling=self.sampler.sampling)

    monkeypatch.setattr(Partial, "begin", beginning)
    trained(own, tmp_path / "run", lr=1e-12)  # the policy stands still
    groups = [group for _, own, _ in taken for group in own]
    pieces = [(group, response) for group in groups for response in group.responses]
    assert any(len(response.versions) > 1 for _, response in pieces)
    asked = [found["prompts"][group.index].token_ids for group, _ in pieces]
    whole = sample(found["model"], asked, [response.seed for _, response in pieces], found["sampling"])
    for (_, response), one in zip(pieces, whole, strict=True):
        assert (response.token_ids, response.finish) == (one.token_ids, one.finish)
        assert response.logps == pytest.approx(one.logps, abs=1e-5)


def test_every_token_has_the_log_probability_and_the_version_of_the_weights_that_sampled_it(
    own: Tables, tmp_path: Path, taken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: dict[int, Any] = {}
    prompts: dict[int, Any] = {}
    fill = Partial._fill

    def filling(self: Partial, step: int) -> None:
        weights[step] = copy.deepcopy(self.context.model)
        prompts.update(self.prompts)
        fill(self, step)

    monkeypatch.setattr(Partial, "_fill", filling)
    trained(own, tmp_path / "run", lr=5e-2)
    several = [(group, r) for _, own, _ in taken for group in own for r in group.responses if len(r.versions) > 1]
    assert several
    for group, response in several:
        prompt, at = list(prompts[group.index].token_ids), 0
        for version, size in response.versions:
            row = torch.tensor([prompt + response.token_ids[: at + size]])
            with torch.no_grad():
                logp = torch.log_softmax(weights[version](input_ids=row).logits[0].double(), -1)
            for token in range(at, at + size):
                expected = float(logp[len(prompt) + token - 1, response.token_ids[token]])
                assert response.logps[token] == pytest.approx(expected, abs=1e-4)
            at += size
        assert at == len(response.token_ids) == len(response.logps)


def test_tokens_of_an_earlier_policy_are_weighed_and_the_line_and_the_samples_say_their_age(
    own: Tables, tmp_path: Path
) -> None:
    _, lines = trained(own, tmp_path / "run", lr=5e-2)
    assert all("importance" in line for line in lines)
    assert lines[0]["staleness"] == lines[0]["resumed"] == 0
    assert max(line["staleness"] for line in lines) > 0 and max(line["resumed"] for line in lines) > 0
    kept = [json.loads(line) for line in (tmp_path / "run/stages/rl/samples.jsonl").read_text().splitlines()]
    resumed = [line for line in kept if "versions" in line]
    assert resumed
    for line in resumed:
        assert sum(size for _, size in line["versions"]) == line["tokens"]
        assert line["version"] == line["versions"][0][0] < line["versions"][-1][0] < line["step"]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("stop", range(6))
def test_a_run_that_ended_at_any_step_resumes_with_the_same_bits(
    own: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    undisturbed, _ = trained(own, tmp_path / "undisturbed")
    take = rl_stage.Loop.step

    def step(loop: Any, at: int) -> Any:
        line = take(loop, at)
        if at == stop:
            raise KeyboardInterrupt
        return line

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_stage.Loop, "step", step)
        trained(own, tmp_path / "run")
    again, _ = trained(own, tmp_path / "run")
    assert all(torch.equal(again[name], undisturbed[name]) for name in undisturbed)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "undisturbed")


def test_a_response_that_its_engine_cannot_continue_ends_there() -> None:
    begun = Begun(1)
    begun.take(Response([5, 6, 7, 8], [-0.1] * 4, "length"), 0, longest=60, asked=4)
    assert begun.finish is None
    begun.take(Response([9, 10], [-0.1] * 2, "length"), 1, longest=60, asked=4)  # vllm.max_model_len is reached
    assert begun.finish == "length" and begun.versions == [[0, 4], [1, 2]]


def test_a_stage_that_is_given_fewer_steps_says_what_the_pool_still_held(
    own: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: Any
) -> None:
    take = rl_stage.Loop.step

    def step(loop: Any, at: int) -> Any:
        line = take(loop, at)
        if at == 2:
            raise KeyboardInterrupt
        return line

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_stage.Loop, "step", step)
        trained(own, tmp_path / "run")
    _, lines = trained(changed(own, {"rl.steps": 3}), tmp_path / "run")
    left = sum(len(response.token_ids) for group in taken[-1][2] for response in group.responses)
    assert len(lines) == 3 and lines[-1]["wasted_tokens"] == left > 0


def test_a_stage_that_a_budget_ends_says_what_the_pool_still_held(own: Tables, tmp_path: Path, taken: Any) -> None:
    _, lines = trained(own, tmp_path / "run", tokens=30)
    assert len(lines) < 6
    left = sum(len(response.token_ids) for group in taken[-1][2] for response in group.responses)
    assert lines[-1]["wasted_tokens"] == left > 0
    done = json.loads((tmp_path / "run/stages/rl/done.json").read_text())
    assert done["wasted_tokens"] == left and done["wasted_flops"] > 0


def test_a_pool_is_dealt_anew_to_another_number_of_ranks(own: Tables, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_stage.Loop, "_state", _after(rl_stage.Loop._state, 2))
        trained(own, tmp_path / "run")
    found = newest_checkpoint(tmp_path / "run/stages/rl/checkpoints")
    assert found is not None
    tensors = partial_tensors(found.folder)
    every = dict.fromkeys(range(20), object())
    one: Any = Of(0, 1)
    whole, drawn = partial.unpacked(tensors, every, one)  # type: ignore[arg-type]
    parts = [partial.unpacked(tensors, every, Of(rank, 2))[0] for rank in range(2)]  # type: ignore[arg-type]
    assert drawn == 9 and len(whole) == 5
    assert sorted(group.number for part in parts for group in part) == sorted(group.number for group in whole)
    assert [len(part) for part in parts] == [3, 2]
    with pytest.raises(CheckpointError, match="none of the stage's"):
        partial.unpacked(tensors, {}, one)


class Of:
    """A rank of so many."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world


def _after(state: Any, steps: int) -> Any:
    calls = []

    def counted(self: Any, *given: Any) -> Any:
        calls.append(None)
        if len(calls) == steps:
            raise KeyboardInterrupt
        return state(self, *given)

    return counted


def partial_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from thence.train.state import named_tensors

    return named_tensors(folder, f"{partial.PLACE}/")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rl.method": "dapo"}, "composes its batches itself"),
        ({"rl.method": "exgrpo"}, "replays responses"),
        ({"rl.ahead": 1}, "set ahead = 0"),
        ({"rl.partial.in_flight": 2}, "not more than prompts 2"),
        ({"rl.fault": {"names": ["mean-of-means"], "accumulation": 2}}, "a fault is a change"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_before_anything_is_sampled(
    own: Tables, tmp_path: Path, flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        run({**changed(own, flags), "folder": str(tmp_path / "run")})
    assert not (tmp_path / "run/stages/rl").exists()
