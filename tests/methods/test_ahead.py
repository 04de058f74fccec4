"""What each method says of composing its batches ahead is compared with what it does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.pipeline.made_rollouts import MadeRollouts
from thence.data.order import stable_seed
from thence.data.trajectory import Trajectory
from thence.errors import RecipeError
from thence.methods.ahead import why_not_ahead
from thence.methods.base import Method, TokenFacts
from thence.methods.grpo import Grpo
from thence.methods.luffy import Luffy
from thence.methods.registry import OWN
from thence.methods.unknown import leave_out
from thence.methods.weights import laid_out
from thence.pipeline.ahead import check_ahead
from thence.train.parallel import SingleProcess

BATCHES, PROMPTS, N = 4, 6, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "relift": {"sft_batch": 2},
    "sasr": {"warmup_steps": 1},
    "exgrpo": {"start": 0.0},
    "srft": {"entropy_level": "batch"},
    "chord_mu": {"decay": 3},
    "red": {"smoothing": 0.5},
}
REFUSED = {"relift", "sasr", "exgrpo", "prefix_rft", "uft", "bread", "trapo"}
METHODS = [method for method in OWN if method.stage == "rl"]


class Rollouts(MadeRollouts):
    """Asks nothing of other ranks once its batch is composed, if ``ended``: another thread's ranks are asked then."""

    ended = False

    def continuations(self, *given: Any, **named: Any) -> list[Trajectory]:
        """Every second one is right, whatever the prompt."""
        found = super().continuations(*given, **named)
        return [replace(t, score=float(i % 2), verdict=("wrong", "right")[i % 2]) for i, t in enumerate(found)]

    def total(self, count: int) -> int:
        assert not self.ended, "the thread that composes is asked by the optimizer steps"
        return super().total(count)

    def gather(self, value: Any) -> list[Any]:
        assert not self.ended, "the thread that composes is asked by the optimizer steps"
        return super().gather(value)


def made(method: type[Method]) -> Method:
    found = method(OPTIONS.get(method.name))
    found.prepare(N, 20)
    return found


def following(sampler: Rollouts, step: int) -> Rollouts:
    """The sampler of the next batch: it goes on in the data."""
    again = copy.copy(sampler)
    again.begin(step, "ragged")
    return again


def facts_of(method: Method, trajectories: Sequence[Trajectory], step: int) -> list[TokenFacts]:
    """Made-up facts, of another policy at every step."""
    found = []
    for i, (trajectory, solution) in enumerate(zip(trajectories, method.solutions(trajectories), strict=True)):
        generator = torch.Generator().manual_seed(stable_seed(step, i) % 2**31)
        logp, entropy, old, taught = -torch.rand(4, len(trajectory.response_ids), generator=generator)
        teacher = taught if solution is not None and method.teacher is not None else None
        found.append(TokenFacts(logp, -entropy, old, None, 0, teacher, teacher is not None))
    return found


def weighed(method: Method, composed: Sequence[Trajectory], step: int) -> list[Tensor]:
    """The weights of a batch; the step on it is taken."""
    kept = leave_out(method, composed)
    given = method.weigh(kept, facts_of(method, kept, step))
    method.took_step("main", 1.0 + step)
    return [laid_out(method.terms, w, len(t.response_ids)) for t, w in zip(kept, given, strict=True)]


Run = list[tuple[list[Trajectory], list[Tensor]]]


def in_turn(method: type[Method]) -> Run:
    """Every batch is composed, trained, and then the next one."""
    own, sampler, found = made(method), Rollouts(SingleProcess(), BATCHES), []
    for step in range(BATCHES):
        sampler = following(sampler, step)
        composed = own.compose(sampler, PROMPTS, N)
        found.append((composed, weighed(own, composed, step)))
        for extra in own.side_steps(sampler):
            own.took_step(extra.name, 5.0 + step)
    return found


def ahead(method: type[Method], by: int = 2) -> Run:
    """The same with batches composed so many steps ahead, by another object of the method."""
    own, composer, sampler = made(method), made(method), Rollouts(SingleProcess(), BATCHES)
    due: list[tuple[Rollouts, list[Trajectory]]] = []
    found: Run = []
    for step in range(BATCHES + by):
        if step < BATCHES:
            sampler = following(sampler, step)
            composed = composer.compose(sampler, PROMPTS, N)
            due.append((copy.copy(sampler), composed))
            sampler.ended = True
            sampler = copy.copy(sampler)
            sampler.ended = False
        if step >= by:
            theirs, composed = due[step - by]
            own.take_up(theirs)
            found.append((composed, weighed(own, composed, step - by)))
    return found


def carries(method: type[Method]) -> list[str]:
    """What of a method forbids to compose ahead, by what it does."""
    found = []
    composer, sampler = made(method), Rollouts(SingleProcess(), BATCHES)
    before, composed = copy.deepcopy(composer.state()), []
    for step in range(BATCHES):
        sampler = following(sampler, step)
        composed += composer.compose(sampler, PROMPTS, N)
    if composer.state() != before:
        found.append("composing changes what a checkpoint keeps")
    if method.side_steps is not Method.side_steps:
        found.append("steps of another kind")
    own = [t for t in composed if t.origin == "rollout" and t.sampled_tokens]
    if any(t.sampler_logps is None for t in own):
        found.append("sampled tokens without log-probabilities")
    if any(t.origin == "replay" for t in composed):
        found.append("replays")
    return found


@pytest.mark.parametrize("method", [m for m in METHODS if m.name not in REFUSED], ids=lambda m: m.name)
def test_a_method_that_may_be_composed_ahead_trains_the_same_tokens_with_the_same_weights(
    method: type[Method],
) -> None:
    assert why_not_ahead(method) is None
    assert carries(method) == []
    for (composed, weights), (expected, theirs) in zip(ahead(method), in_turn(method), strict=True):
        assert composed == expected
        assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))
    assert any(w.any() for _, weights in in_turn(method) for w in weights)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name in REFUSED], ids=lambda m: m.name)
def test_a_method_that_may_not_says_why_and_has_a_reason(method: type[Method]) -> None:
    why = why_not_ahead(method)
    assert why and "does not state" not in why
    assert carries(method)
    stage: Any = SimpleNamespace(ahead=1, method=method.name, fault=None)
    with pytest.raises(RecipeError, match=r"rl.ahead.*cannot sample ahead: ") as refused:
        check_ahead("rl", stage, made(method))
    assert why in str(refused.value)
    check_ahead("rl", SimpleNamespace(ahead=0, method=method.name, fault=None), made(method))  # type: ignore[arg-type]


class Silent(Grpo):
    """Of another package: composes in a way of its own and says nothing of it."""

    pool: ClassVar[list[Trajectory]] = []

    def compose(self, sampler: Any, prompts: int, n: int) -> list[Trajectory]:
        self.pool.extend(super().compose(sampler, prompts, n))
        return self.pool[:]


class Stating(Silent):
    not_ahead = ""


class Remembering(Luffy):
    """Composes as LUFFY does, and keeps something from step to step."""

    def took_step(self, kind: str, grad_norm: float) -> None:
        self.norm = grad_norm


class Renamed(Luffy):
    """LUFFY with other terms."""


@pytest.mark.parametrize("method", [Silent, Remembering])
def test_what_a_class_above_states_does_not_hold_for_one_that_composes_or_remembers_otherwise(
    method: type[Method],
) -> None:
    assert "does not state" in (why_not_ahead(method) or "")


@pytest.mark.parametrize("method", [Stating, Renamed])
def test_a_method_of_another_package_states_it_or_inherits_it_with_what_it_composes(method: type[Method]) -> None:
    assert why_not_ahead(method) is None
