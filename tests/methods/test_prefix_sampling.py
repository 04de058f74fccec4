"""What Prefix-RFT, UFT, CHORD and ExGRPO sample: prefixes, hints, expert rows and replays."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.prefix_cases import trajectory
from tests.oracle import weights_of
from thence.data.order import stable_seed
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.chord import ChordMu, spread_evenly
from thence.methods.exgrpo import ExGrpo, bucket_weight, lesson
from thence.methods.prefix_rft import PrefixRft, prefix_length
from thence.methods.uft import Uft
from thence.pipeline.dealing import mini_batches


class Desk:
    """A sampler without a model: the j-th rollout of a prompt is right if ``right`` says so."""

    rank, world = 0, 1

    def __init__(self, prompts: Sequence[Prompt], step: int = 0, steps: int = 500):
        self.prompts, self.step, self.steps, self.drawn, self.expert = list(prompts), step, steps, 0, 0
        self.right: Any = lambda prompt, j: j == 0

    def next_prompts(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [self.prompts[i % len(self.prompts)] for i in range(self.drawn - count, self.drawn)]

    def expert_prompts(self, count: int) -> list[Prompt]:
        self.expert += count
        return [self.prompts[-1 - i % len(self.prompts)] for i in range(self.expert - count, self.expert)]

    def made(self, prompt: Prompt, j: int, **fields: Any) -> Trajectory:
        right = self.right(prompt, j)
        ids = (*fields.pop("begin", ()), 30 + j, 1)
        logps = tuple(-0.1 * (j + 1) for _ in ids)
        verdict = "right" if right else "wrong"
        return Trajectory(prompt, ids, score=float(right), verdict=verdict, sampler_logps=logps, **fields)

    def rollouts(self, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
        return [self.made(prompt, j) for prompt in prompts for j in range(n)]

    def continuations(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int) -> list[Trajectory]:
        pairs = zip(prompts, prefixes, strict=True)
        return [self.made(p, j, begin=tuple(b), prefix=len(b)) for p, b in pairs for j in range(n)]

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        return [Trajectory(p, p.demonstration_ids or (), origin="demonstration", score=1.0) for p in prompts]

    def uniform(self, *key: object) -> float:
        return stable_seed(self.step, *key) / 2**63

    def total(self, count: int) -> int:
        return count

    def gather(self, value: Any) -> list[Any]:
        return [value]


def with_demonstrations(count: int, tokens: int = 21, without: Sequence[int] = ()) -> list[Prompt]:
    demonstration = (*range(2, tokens + 1), 1)
    return [Prompt(i, (2, 3, i), None if i in without else demonstration, answer="x") for i in range(count)]


def indices(trajectories: Sequence[Trajectory]) -> list[tuple[int, int]]:
    return [(index, len(list(group))) for index, group in groupby(trajectories, key=lambda t: t.prompt.index)]


def test_one_rollout_of_a_group_goes_on_from_the_demonstration() -> None:
    desk = Desk(with_demonstrations(6, without=(1, 4)))
    found = PrefixRft().compose(desk, 6, 8)
    assert indices(found) == [(i, 8) for i in range(6)]
    for i in range(6):
        group = found[8 * i : 8 * i + 8]
        assert [t.prefix > 0 for t in group] == [False] * 7 + [i not in (1, 4)]
        if i not in (1, 4):
            assert group[7].prefix == int(0.95 * 21) == 19
            assert group[7].response_ids[:19] == (group[7].prompt.demonstration_ids or ())[:19]
    desk.step = 500
    lengths = {t.prefix for t in PrefixRft().compose(Desk(with_demonstrations(200), 500), 200, 8) if t.prefix}
    assert min(lengths) == 1
    assert max(lengths) == 19
    short = PrefixRft().compose(Desk(with_demonstrations(1, 1)), 1, 3)
    assert [t.prefix for t in short] == [0] * 3


@given(fraction=st.floats(0, 1), tokens=st.integers(0, 50), least=st.integers(0, 60))
def test_a_prefix_never_holds_the_whole_demonstration(fraction: float, tokens: int, least: int) -> None:
    length = prefix_length(fraction, tokens, least)
    assert 0 <= length <= max(tokens - 1, 0)
    assert length in (min(least, max(tokens - 1, 0)), max(tokens - 1, 0)) or length == math.floor(fraction * tokens)


def test_the_rollouts_of_a_prompt_share_one_hint_of_whole_slices() -> None:
    desk = Desk(with_demonstrations(300, without=(2,)), step=150)
    found = Uft().compose(desk, 300, 4)
    assert indices(found) == [(i, 4) for i in range(300)]
    given_slices = []
    for i in range(300):
        group = found[4 * i : 4 * i + 4]
        assert len({t.prefix for t in group}) == 1
        assert group[0].prefix % 4 == 0  # 20 tokens before the end token, in five slices
        assert all(t.response_ids[: t.prefix] == (*range(2, 22),)[: t.prefix] for t in group)
        given_slices.append(group[0].prefix // 4)
    assert given_slices[2] == 0
    mean = sum(given_slices) / 299
    assert abs(mean - 2.5) < 0.3  # binomial with p = 0.5: standard error 0.065
    spread_of = sum((k - mean) ** 2 for k in given_slices) / 299
    assert 0.9 < spread_of < 1.6  # 5 p (1 - p) = 1.25; uniform 2.9


def test_hints_end_and_other_schedules_have_their_own() -> None:
    prompts = with_demonstrations(60)
    assert {t.prefix for t in Uft().compose(Desk(prompts, 301), 60, 2)} == {0}
    assert {t.prefix for t in Uft({"hints": "stage"}).compose(Desk(prompts, 60), 60, 2)} == {16}
    uniform = [t.prefix // 4 for t in Uft({"hints": "r3"}).compose(Desk(prompts, 60), 60, 1)]
    assert set(uniform) == set(range(6))
    full = Uft({"hints": "stage"}).compose(Desk(prompts), 1, 1)[0]
    assert full.response_ids[: full.prefix] == (prompts[0].demonstration_ids or ())[:-1]  # never the end token


def test_expert_rows_are_a_fifth_and_each_optimizer_step_has_its_share() -> None:
    desk = Desk(with_demonstrations(8))  # experts come from the other end, so that they meet their own prompt's group
    found = ChordMu().compose(desk, 8, 8)
    assert sum(t.origin == "demonstration" for t in found) == 16
    assert len(found) == 80
    for part in mini_batches(found, 4):
        chosen = [found[i] for i in part]
        assert sum(t.origin == "demonstration" for t in chosen) == 4
        assert sorted(len(list(g)) for _, g in groupby(chosen, key=lambda t: t.prompt.index)) == [1] * 4 + [8] * 2


def test_expert_rows_are_spread_evenly_and_none_is_lost() -> None:
    groups = [[trajectory(i, 1.0)] * 2 for i in range(4)]
    for count in range(12):
        experts = [trajectory(i % 6, 1.0, origin="demonstration") for i in range(count)]
        found = spread_evenly(groups, experts)
        assert sorted(t.prompt.index for t in found if t.origin == "demonstration") == sorted(
            i % 6 for i in range(count)
        )
        starts = [i for i, t in enumerate(found) if t.origin == "rollout"][::2]
        between = [b - a - 2 for a, b in zip(starts, [*starts[1:], len(found)], strict=True)]
        assert max(between) - min(between) <= 1


def test_the_share_of_sft_follows_the_rollout_batches() -> None:
    method = ChordMu()
    for step, mu in ((0, 0.9), (100, 0.475), (300, 0.05)):
        found = method.compose(Desk(with_demonstrations(4), step), 4, 4)
        expert = [w for t, w in zip(found, weights_of(method, found), strict=True) if t.origin == "demonstration"]
        assert len(expert) == 4
        assert all(w[1].tolist() == pytest.approx([mu] * 21) for w in expert)
        assert all((w[0] == 0).all() for w in expert)


def test_successes_are_pooled_and_replayed_and_solved_prompts_retired() -> None:
    desk, method = Desk(with_demonstrations(40)), ExGrpo()
    rights = {0: 0, 1: 4, 2: 2, 3: 3}  # by index modulo 4: never, always, and in between
    desk.right = lambda prompt, j: j < rights[prompt.index % 4]
    first = method.compose(desk, 8, 4)
    assert {t.origin for t in first} == {"rollout"}
    assert method.started  # 9 of 16
    assert {i: e.successes for i, e in method.pool.items()} == {2: 2, 3: 3, 6: 2, 7: 3}
    assert method.retired == {1, 5}
    assert all(e.entropy == pytest.approx(0.1) for e in method.pool.values())  # the surest of the right ones
    desk.step = 1
    second = method.compose(desk, 8, 4)
    assert all(size == 4 for _, size in indices(second))
    replays = [t for t in second if t.origin == "replay"]
    assert {t.prompt.index for t in replays} == {2, 3, 6, 7}
    assert len(indices(second)) == 8
    assert all(t.behaviour == pytest.approx([-0.1, -0.1]) for t in replays)
    assert method.pool[2].successes == 3  # two fresh ones and the replay
    assert 3 in method.retired  # three fresh ones and the replay: all four
    assert 3 not in method.pool


def test_replay_waits_for_enough_right_responses() -> None:
    desk, method = Desk(with_demonstrations(40)), ExGrpo({"start": 0.5})
    desk.right = lambda prompt, j: j < 2  # exactly half
    for _ in range(2):
        assert {t.origin for t in method.compose(desk, 4, 4)} == {"rollout"}
    assert len(method.pool) == 8


def test_a_prompt_is_never_fresh_and_replayed_in_one_batch() -> None:
    desk, method = Desk(with_demonstrations(5)), ExGrpo({"start": 0.0})
    for step in range(12):
        desk.step = step
        found = method.compose(desk, 4, 4)
        assert len(found) == 16
        fresh = {t.prompt.index for t in found if t.origin == "rollout"}
        for replay in [t for t in found if t.origin == "replay"]:
            assert sum(t.prompt.index == replay.prompt.index for t in found) == 4
        assert len(fresh) == 4


def test_buckets_are_drawn_by_their_normal_distribution() -> None:
    assert bucket_weight(4, 8) == 1
    assert bucket_weight(2, 8) == bucket_weight(6, 8) == pytest.approx(math.exp(-2))
    assert bucket_weight(2, 8, of="fractions") == pytest.approx(math.exp(-0.5 * 0.25**2))
    desk, method = Desk(with_demonstrations(9)), ExGrpo()
    for index, k in ((0, 4), (1, 6), (2, 6), (3, 6)):
        desk.right = lambda prompt, j, k=k: j < k
        method.learn(lesson(desk.rollouts([desk.prompts[index]], 8)))
    drawn = []
    for step in range(2000):
        desk.step = step
        found = method.draw(desk, 0, set(), 8)
        assert found is not None
        drawn.append(found.trajectory.prompt.index)
    assert drawn.count(0) / 2000 == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03)
    assert min(drawn.count(i) for i in (1, 2, 3)) > 40  # 79 each
    assert method.draw(desk, 0, {0, 1, 2, 3}, 8) is None


def test_the_pool_survives_json() -> None:
    desk, method, again = Desk(with_demonstrations(8)), ExGrpo(), ExGrpo()
    desk.right = lambda prompt, j: j <= prompt.index % 4
    method.compose(desk, 8, 4)
    again.restore(json.loads(json.dumps(method.state())))
    assert (again.pool, again.retired, again.started) == (method.pool, method.retired, True)
    desk.step = 1
    drawn = desk.drawn
    expected = method.compose(desk, 8, 4)
    desk.drawn = drawn
    assert again.compose(desk, 8, 4) == expected
