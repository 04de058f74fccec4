"""RL on 1, 2 and 4 ranks: the same prompts in the same order, the same random numbers, tokens and weights.

A driver imports everything once and forks the ranks of every run (gloo). Each rank writes down what it samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.pipeline.on_ranks import assert_same, assert_same_lines, case, drive, largest_difference, lines, sampled
from thence.errors import UserError
from thence.methods.base import Method
from thence.pipeline.dealing import resume_position, same_or_each
from thence.pipeline.folder import RunFolder
from thence.toml import to_toml

QUICK = {
    "grpo": {"method": "grpo", "mini_batch": 2},
    "gspo": {"method": "gspo", "mini_batch": 2, "options": {"clip_low": 0.01, "clip_high": 0.02}},
    "dapo": {"method": "dapo", "mini_batch": 2, "options": {"overlong_tokens": 12, "overlong_buffer": 4}},
}
SLOW = {
    "luffy": {"method": "luffy"},
    "srft": {"method": "srft", "options": {"entropy_level": "batch"}},
    "relift": {"method": "relift", "rollouts": 2, "options": {"sft_batch": 3}},
    "prefix_rft": {"method": "prefix_rft"},
    "hpt": {"method": "hpt", "options": {"gate": 0.3}},
    "superrl": {"method": "superrl"},
    "chord": {"method": "chord_phi", "rollouts": 3, "options": {"normaliser": "paper"}},
    "uft": {"method": "uft"},
    "sasr": {"method": "sasr", "options": {"warmup_steps": 1}},
    "cispo": {"method": "cispo", "prompts": 8, "mini_batch": 4, "options": {"cap": 1.02}},
    "dppo": {"method": "dppo", "prompts": 8, "mini_batch": 4, "options": {"low": 0.001, "high": 0.001}},
    "ipo": {"method": "ipo", "prompts": 8, "mini_batch": 4, "options": {"bound": 0.001}},
    "exgrpo": {"method": "exgrpo", "steps": 5, "options": {"start": 0.0}},
    "red": {"method": "red"},
    "bread": {"method": "bread", "rollouts": 2},
    "trapo": {"method": "trapo", "rollouts": 8, "options": {"fractions": [0.2, 0.5, 1.0]}},
    "sdft": {"method": "sdft", "prompts": 8, "mini_batch": 4, "options": {"form": "{solution};{prompt}"}},
    "sdpo": {
        "method": "sdpo",
        "prompts": 8,
        "mini_batch": 4,
        "options": {"form": "{solution};{prompt}", "average_rate": 0.5},
    },
    "sdft-jsd": {
        "method": "sdft",
        "prompts": 8,
        "mini_batch": 4,
        "options": {"form": "{solution};{prompt}", "divergence": "jsd", "top_k": 6, "tail": True},
    },
    "sdpo-whole": {
        "method": "sdpo",
        "prompts": 8,
        "mini_batch": 4,
        "options": {"form": "{solution};{prompt}", "divergence": "reverse-kl", "average_rate": 0.5},
    },
    "reference": {"method": "grpo", "options": {"kl": 0.05}},
    "trust": {"method": "grpo", "importance_bound": 2.0},
    "partial": {
        "method": "grpo",
        "max_tokens": 48,
        "lr": 1e-3,
        "steps": 5,
        "partial": {"in_flight": 9, "chunk_tokens": 5},
    },
    "given-up": {
        "method": "dapo",
        "rollouts": 4,
        "options": {"over_sampling": 1.5, "first_rollouts": 2, "overlong_buffer": 0},
    },
}

MOVED = ("relift", "exgrpo", "red", "sasr", "sdpo", "sdpo-whole", "partial")


def pairs(base: dict[str, Any], folder: Path, names: list[str]) -> list[dict[str, Any]]:
    return [case(base, folder / f"{name}-{w}", w, QUICK[name]) for name in names for w in (1, 2)]


@pytest.fixture(scope="module")
def others(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    drive(folder, pairs(base, folder, [name for name in QUICK if name != "grpo"]))
    return folder


@pytest.fixture(scope="module")
def quick(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    cases = pairs(base, folder, ["grpo"])
    moved = folder / "moved"
    cases += [case(base, moved, 1, QUICK["grpo"], stop=2), case(base, moved, 2, QUICK["grpo"], suffix="-more")]
    sft = {**base, "stages": ["sft"], "sft": {"lr": 1e-2, "batch": 3, "steps": 6, "checkpoint_every": 1}}
    cases += [case(sft, folder / "sft-alone", 1, {}), case(sft, folder / "sft", 2, {}, stop=4)]
    cases += [case(sft, folder / "sft", 1, {}, suffix="-more")]
    drive(folder, cases)
    return folder


def test_sft_of_two_ranks_is_resumed_by_one(quick: Path) -> None:
    assert not list(quick.glob("sft*-notes/error-*"))
    assert largest_difference(quick / "sft", quick / "sft-alone", "sft") < 1e-6


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_sample_and_train_what_one_does(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("quick" if name == "grpo" else "others")
    assert_same(folder / f"{name}-2", folder / f"{name}-1")
    drawn = sorted({(index, draw) for index, draw, *_ in sampled(folder / f"{name}-1")})
    assert len(drawn) > 4


def test_a_run_of_one_rank_is_resumed_by_two(quick: Path) -> None:
    assert sampled(quick / "moved") + sampled(quick / "moved", "-more")  # no error in either
    assert len(lines(quick / "moved")) == 4
    assert largest_difference(quick / "moved", quick / "grpo-1") < 1e-6


@pytest.fixture(scope="module")
def slow(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The runs of the tests that were chosen."""
    folder = tmp_path_factory.mktemp("slow")
    asked = {(item.originalname, item.callspec.params["name"]) for item in request.session.items if _is_slow(item)}
    cases: dict[str, dict[str, Any]] = {}
    for test, name in sorted(asked):
        own = {"mini_batch": 4} if name in QUICK else {}
        rl = {**(QUICK | SLOW)[name], **own}
        cases[f"{name}-1"] = case(base, folder / f"{name}-1", 1, rl)
        if test == TWO:
            cases[f"{name}-2"] = case(base, folder / f"{name}-2", 2, rl)
        if test == FOUR:
            cases[f"{name}-4"] = case(base, folder / f"{name}-4", 4, {**rl, "mini_batch": 4})
        if test == ANOTHER:
            moved = folder / f"{name}-moved"
            cases[f"{name}-moved"] = case(base, moved, 2, rl, stop=2)
            cases[f"{name}-more"] = case(base, moved, 1, rl, suffix="-more")
    drive(folder, list(cases.values()), 1800)
    return folder


TWO, FOUR = "test_two_ranks_are_as_one_with_every_method", "test_four_ranks_are_as_one_with_every_method"
ANOTHER = "test_methods_with_a_state_of_their_own_are_resumed_by_another_number_of_ranks"


def _is_slow(item: Any) -> bool:
    return getattr(item, "originalname", "") in (TWO, FOUR, ANOTHER) and item.path == Path(__file__)


@pytest.mark.slow
@pytest.mark.matrix(3)
@pytest.mark.parametrize("name", SLOW)
def test_two_ranks_are_as_one_with_every_method(name: str, slow: Path) -> None:
    assert_same(slow / f"{name}-2", slow / f"{name}-1")


@pytest.mark.slow
@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", QUICK | SLOW)
def test_four_ranks_are_as_one_with_every_method(name: str, slow: Path) -> None:
    assert_same(slow / f"{name}-4", slow / f"{name}-1")


@pytest.mark.slow
@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", MOVED)
def test_methods_with_a_state_of_their_own_are_resumed_by_another_number_of_ranks(name: str, slow: Path) -> None:
    sampled(slow / f"{name}-moved"), sampled(slow / f"{name}-moved", "-more")
    assert largest_difference(slow / f"{name}-moved", slow / f"{name}-1") < 1e-6


# The whole command, as a user starts it.


@pytest.mark.slow
def test_the_run_command_under_torchrun_does_what_one_process_does(base: dict[str, Any], tmp_path: Path) -> None:
    evaluation = {"samples": 2, "max_tokens": 12, "reward": base["rl"]["reward"], "data": {"split": "dev", "limit": 5}}
    recipe = {
        **base,
        "stages": ["sft", "rl", "eval"],
        "sft": {"lr": 1e-2, "batch": 4, "steps": 4},
        "rl": {**base["rl"], "prompts": 2, "steps": 3},
        "eval": evaluation,
    }
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder, launcher in ((alone, []), (both, torchrun)):
        command = [sys.executable, *launcher, "-m", "thence", "run", str(tmp_path / "recipe.toml")]
        done = subprocess.run([*command, "--folder", str(folder)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report: ") == 1, "one rank speaks"
    for stage in ("sft", "rl"):
        assert largest_difference(both, alone, stage) < 1e-6
    assert len(lines(alone)) == 4 + 3
    assert_same_lines(both, alone)
    found, expected = (responses(folder, "rl") for folder in (both, alone))
    assert found == [row for row in expected if row in found] and len(found) == len(expected) / 2  # the first rank's
    assert responses(both, "eval") == responses(alone, "eval") != []


def responses(folder: Path, stage: str) -> list[tuple[Any, ...]]:
    """What a stage kept of its responses, in order."""
    rows = [json.loads(line) for line in (folder / "stages" / stage / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["index"], row["response"], row["score"]) for row in rows]


# What a checkpoint of other ranks says.


class Stateful(Method):
    name, stage = "mine", "rl"
    terms = ()

    def weigh(self, trajectories: Any, facts: Any = ()) -> list[torch.Tensor]:
        return []

    def restore(self, state: Any) -> None:
        self.taken = state


def resumed(world: int, own: dict[str, Any]) -> tuple[Any, Stateful]:
    ranks: Any = SimpleNamespace(rank=world - 1, world=world)
    context: Any = SimpleNamespace(ranks=ranks, name="rl", folder=RunFolder(Path("run")))
    sampler, method = SimpleNamespace(), Stateful()
    resume_position(context, own, sampler, method)  # type: ignore[arg-type]
    return sampler, method


def test_a_state_that_all_ranks_share_is_kept_once_and_any_number_takes_it_up() -> None:
    state = same_or_each([{"seen": 3}, {"seen": 3}])
    assert state == [{"seen": 3}]
    sampler, method = resumed(4, {"drawn": [12, 5], "method": state})
    assert (sampler.drawn, sampler.expert_drawn, method.taken) == (12, 5, {"seen": 3})


def test_states_of_each_rank_go_back_to_them_and_another_number_of_ranks_is_refused() -> None:
    states = same_or_each([{"seen": 3}, {"seen": 4}])
    assert resumed(2, {"drawn": [12, 5], "method": states})[1].taken == {"seen": 4}
    with pytest.raises(UserError, match=r"2 ranks wrote the checkpoint, and now there are 3[\s\S]*nproc-per-node 2"):
        resumed(3, {"drawn": [12, 5], "method": states})


def test_an_older_checkpoint_of_one_process_is_taken_up_and_one_of_several_ranks_is_refused() -> None:
    sampler, _ = resumed(2, {"drawn": [[12, 5]], "method": [{}]})
    assert (sampler.drawn, sampler.expert_drawn) == (12, 5)
    for world in (1, 2):
        with pytest.raises(UserError, match="2 ranks of an older version"):
            resumed(world, {"drawn": [[6, 5], [6, 5]], "method": [{}, {}]})
