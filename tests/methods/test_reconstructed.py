"""RED and BREAD: known numbers, gradients against the formulas, what they sample, resuming."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thence.pipeline.rl_stage as rl_stage
from tests.oracle import advantages, gradient, relative, row_statistics, weights_of
from tests.recipes import world_recipe
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.methods.base import Method, TokenFacts, bare_row, make_batch
from thence.methods.bread import Bread, prefix_of
from thence.methods.red import Red, accuracy_factor, entropy_weight
from thence.methods.registry import methods
from thence.objective import local_counts
from thence.pipeline.run import run
from thence.pipeline.sampler import RolloutSampler
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients
from thence.train.trainer import Trainer

WAYS = [(1000, False), (1000, True), (25, False), (1, True)]  # tokens of a micro-batch, packing
SIZES = [(2, 4), (3, 9), (2, 6), (4, 12), (3, 3), (2, 7), (5, 5), (2, 10)]  # tokens of prompt and response


def test_they_are_listed_as_reconstructions():
    assert all(methods()[name].exactness == "reconstruction" for name in ("red", "bread"))
    assert all(field.description for m in (Red, Bread) for field in m.Options.model_fields.values())


# RED: numbers of its port.


@pytest.mark.parametrize(
    ("expert", "own", "weight"),
    [(0.2, 0.05, 4.0), (-0.2, 0.05, 4.0), (0.2, 0.5, 1.0), (0.2, 0.0, 5.0), (0.0, 0.0, 1.0)],
)
def test_the_entropy_weight_is_the_known_one(expert, own, weight):
    assert entropy_weight(expert, own, 5.0) == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize(("accuracy", "factor"), [(0.0, 5.0), (0.5, 1.0), (1.0, 0.2)])
def test_the_accuracy_factor_is_the_known_one(accuracy, factor):
    assert accuracy_factor(accuracy, 5.0) == pytest.approx(factor)


def group(index: int, scores: Sequence[float], shown: bool = True) -> list[Trajectory]:
    prompt = Prompt(index, (2, 3))
    rows = [Trajectory(prompt, (4, 5, 6), score=score) for score in scores]
    return [*rows, Trajectory(prompt, (7, 8), origin="demonstration", score=1.0)] if shown else rows


def entropies(rows: Sequence[Trajectory], own: float, expert: float) -> list[TokenFacts]:
    value = {"rollout": own, "demonstration": expert}
    return [TokenFacts(-torch.ones(n), torch.full((n,), value[t.origin])) for t in rows for n in [len(t.response_ids)]]


def test_demonstrations_weigh_more_where_own_entropy_is_slower_and_accuracy_lower():
    rows = [*group(0, [0.0, 0.0]), *group(1, [1.0, 0.0]), *group(2, [1.0, 1.0])]
    method = Red({"entropy": 0, "smoothing": 0})
    shown = [2, 5, 8]
    first = weights_of(method, rows, entropies(rows, 1.0, 2.0))
    assert [first[i][:, 0].tolist() for i in shown] == [
        pytest.approx([0, 0.1 * factor]) for factor in (5.0, 1.0, 0.2)
    ]  # no change is known yet
    assert [w[0, 0].item() for w in first[3:5]] == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert all(not first[i].any() for i in (0, 1, 6, 7))
    method.took_step("main", 1.0)
    changed = entropies(rows, 0.9, 2.3)
    second = weights_of(method, rows, changed)
    assert second[5][1, 0].item() == pytest.approx(0.1 * 3, rel=1e-5)  # 0.3 against 0.1
    again = weights_of(method, rows, changed)  # asked twice, the same
    assert all(a.equal(b) for a, b in zip(second, again, strict=True))
    method.took_step("main", 1.0)
    assert weights_of(method, rows, changed)[5][1, 0].item() == pytest.approx(0.1)


def test_averages_of_entropies_are_smoothed_and_survive_json():
    rows = group(0, [1.0, 0.0])
    method = Red({"smoothing": 0.9})
    method.weigh(rows, entropies(rows, 1.0, 2.0))
    method.took_step("main", 1.0)
    method.weigh(rows, entropies(rows, 2.0, 2.0))
    method.took_step("main", 1.0)
    assert method.entropies == pytest.approx({"own": 1.1, "expert": 2.0})
    again = Red({"smoothing": 0.9})
    again.restore(json.loads(json.dumps(method.state())))
    facts = entropies(rows, 1.5, 2.4)
    assert all(a.equal(b) for a, b in zip(weights_of(again, rows, facts), weights_of(method, rows, facts), strict=True))
    own_only = group(0, [1.0, 0.0], shown=False)  # the average of what is not there stays
    method.weigh(own_only, entropies(own_only, 1.1, 0.0))
    assert method.weighed["expert"] == pytest.approx(2.0)


# BREAD: the search.


class Desk:
    """A sampler whose rollouts fail, and whose continuations succeed as often as ``rates`` says of their prefix."""

    def __init__(self, prompts: Sequence[Prompt], rates: Any, solved: Sequence[int] = ()):
        self.step, self.steps, self.rank, self.world = 0, 10, 0, 1
        self.prompts, self.rates, self.solved = list(prompts), rates, solved
        self.asked: list[list[tuple[int, int]]] = []

    def next_prompts(self, count: int) -> list[Prompt]:
        return self.prompts[:count]

    def made(self, prompt: Prompt, begin: Sequence[int], right: bool) -> Trajectory:
        return Trajectory(prompt, (*begin, 30, 1), score=float(right), prefix=len(begin))

    def rollouts(self, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
        return [self.made(p, (), p.index in self.solved and j == 0) for p in prompts for j in range(n)]

    def continuations(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int) -> list[Trajectory]:
        self.asked.append([(p.index, len(b)) for p, b in zip(prompts, prefixes, strict=True)])
        return [
            self.made(p, b, j < round(n * self.rates(p.index, len(b))))
            for p, b in zip(prompts, prefixes, strict=True)
            for j in range(n)
        ]

    def expert_prompts(self, count: int) -> list[Prompt]:
        raise AssertionError("BREAD asks for no other prompts")

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        raise AssertionError("BREAD trains no demonstration")

    def uniform(self, *key: object) -> float:
        raise AssertionError("BREAD's search is not random")

    def total(self, count: int) -> int:
        return count

    def gather(self, value: Any) -> list[Any]:
        return [value]


def shown(index: int, tokens: int = 20) -> Prompt:
    return Prompt(index, (2, 3), tuple(range(40, 40 + tokens)) if tokens else None)


def test_a_failed_prompt_branches_from_the_prefix_that_bisection_finds():
    desk = Desk([shown(0)], lambda _, prefix: min(1.0, max(0.0, (prefix - 10) / 8)))
    found = Bread().compose(desk, 1, 8)
    assert desk.asked == [[(0, 10)], [(0, 14)]]  # episodes 5 of 1 ... 9: never; then 7 of 6 ... 9: half of them
    assert {t.prefix for t in found} == {14} and [t.score for t in found] == [1.0] * 4 + [0.0] * 4
    assert all(t.response_ids[:14] == tuple(range(40, 54)) for t in found)


def test_a_prompt_that_is_solved_once_keeps_its_rollouts_in_its_place():
    desk = Desk([shown(0), shown(1), shown(2, 0), shown(3)], lambda _, prefix: 0.5, solved=[0])
    found = Bread().compose(desk, 4, 4)
    assert [t.prompt.index for t in found] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert [t.prefix for t in found] == [0] * 4 + [10] * 4 + [0] * 4 + [10] * 4  # prompt 2 has no demonstration
    assert desk.asked == [[(1, 10), (3, 10)]]  # searched side by side


def test_a_search_that_misses_the_band_takes_the_shortest_prefix_that_teaches_something():
    jump = Desk([shown(0)], lambda _, prefix: 0.125 if prefix < 14 else 1.0)
    found = Bread().compose(jump, 1, 8)
    assert jump.asked == [[(0, 10)], [(0, 14)], [(0, 12)]]
    assert {t.prefix for t in found} == {10}  # one of eight, below the band: tried at 10 and 12
    hopeless = Desk([shown(0)], lambda _, prefix: 0.0)
    assert {t.prefix for t in Bread().compose(hopeless, 1, 8)} == {0}
    assert len(hopeless.asked) == 4  # 5, 7, 8, 9 of 1 ... 9


@pytest.mark.parametrize(("tokens", "episodes", "length"), [(20, 1, 2), (20, 9, 18), (3, 1, 1), (3, 2, 2), (2, 1, 1)])
def test_a_prefix_is_whole_episodes_and_never_the_whole_demonstration(tokens, episodes, length):
    assert len(prefix_of(shown(0, tokens), episodes, 10)) == length


def test_a_band_without_room_is_refused():
    with pytest.raises(RecipeError, match="least is above most"):
        Bread({"least": 0.8, "most": 0.2})


# Both: gradients, and whole runs.


def rows_of(method: Method, model: Any) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i, (prompt, response) in enumerate(SIZES):
        ids = torch.randint(model.config.vocab_size, (prompt + response,), generator=generator).tolist()
        t = Trajectory(Prompt(i // 4, tuple(ids[:prompt])), tuple(ids[prompt:]), score=float(i in (0, 3, 5)))
        if isinstance(method, Bread):
            t = replace(t, prefix=(0, 3)[i // 4])
        elif i in (3, 7):
            t = replace(t, origin="demonstration")
        rows.append(t)
    return rows


def restated(method: Method, model: Any, rows: list[Trajectory], old: list[Tensor], before: dict[str, float]) -> Tensor:
    """The loss of the formula, row by row; ``before``: entropies at the step before, if there was one."""
    o, expert = method.options, [t for t in rows if t.origin == "demonstration"]
    own = [t for t in rows if t.origin != "demonstration"]
    stats = {id(t): row_statistics(model, t) for t in rows}
    gains = dict(zip(map(id, own), advantages(own, o.std), strict=True))
    n = sum(len(t.response_ids) for t in rows)
    n_sft = sum(len(t.response_ids) for t in expert)
    written = n - sum(t.prefix for t in rows)
    z = {"clean": n, "code": 8 * 8192, "paper": n if isinstance(method, Red) else written}[o.normaliser]
    means = {k: torch.cat([stats[id(t)][1] for t in r]).mean().item() for k, r in (("own", own), ("sft", expert)) if r}
    w = 1.0
    if expert and before:
        w = min(max(abs(means["sft"] - before["sft"]) / (abs(means["own"] - before["own"]) + 1e-8), 1.0), 5.0)
    loss = torch.zeros((), dtype=torch.float64)
    for t, b in zip(rows, old, strict=True):
        logp, entropy = stats[id(t)]
        if t.origin == "demonstration":
            scores = [s.score or 0.0 for s in own if s.prompt.index == t.prompt.index]
            v = 0.1 * w * 5 ** (1 - 2 * sum(scores) / len(scores))
            loss = loss - v * logp.sum() / (n_sft if o.normaliser == "code" else n)
        else:
            ratio, a = (logp - b).exp(), gains[id(t)]
            loss = loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)[t.prefix :].sum() / z
        loss = loss - o.entropy * entropy.sum() / n
    before.update(means)
    return loss


@pytest.mark.parametrize("normaliser", ["clean", "code", "paper"])
@pytest.mark.parametrize(("made", "options"), [(Red, {"smoothing": 0}), (Bread, {"entropy": 0.1, "std": False})])
def test_gradients_of_two_steps_are_those_of_the_formula_however_cut(tiny_model, made, options, normaliser):
    model, method = tiny_model(), made({**options, "normaliser": normaliser})
    rows = rows_of(method, model)
    trainer = Trainer(model, 3e-2, StepSettings(1000, False, 0.0, torch.float64))
    blank = [bare_row(t) for t in rows]
    old = [logp for logp, _ in trainer.statistics(blank)]
    before: dict[str, float] = {}
    for _ in range(2):
        facts = [TokenFacts(*f) for f in trainer.statistics(blank)] if method.uses_facts else ()
        batch = make_batch(method, rows, facts)
        batch = replace(batch, rows=tuple(replace(r, behaviour=b) for r, b in zip(batch.rows, old, strict=True)))
        expected = gradient(model, restated(method, model, rows, old, before))
        assert expected.norm() > 0
        for budget, packing in WAYS:
            settings = StepSettings(budget, packing, 0.0, torch.float64)
            nothing = torch.optim.SGD(model.parameters(), lr=0.0)
            accumulate_gradients(Policy(model), nothing, batch, local_counts(batch), settings)
            got = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert relative(got, expected) <= 1e-10
        trainer.step(batch)
        method.took_step("main", 1.0)


@pytest.mark.parametrize("name", ["red", "bread"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a random model hardly ever begins with the prompt's own number, as the expert often does
    value = "float(response[:2] == prompt.strip('$')[:2] and len(set(response)) % 2)"
    rl = {"method": name, "steps": 3, "mini_batch": 2, "max_tokens": 24, "checkpoint_every": 1}
    recipe = world_recipe(tmp_path, ["rl"], value, seed=3, data={"limit": 12}, rl=rl)
    branched: list[Sequence[int]] = []
    continuations = RolloutSampler.continuations

    def listened(self: RolloutSampler, prompts: Any, prefixes: Any, n: int) -> list[Trajectory]:
        branched.extend(prefixes)
        return continuations(self, prompts, prefixes, n)

    monkeypatch.setattr(RolloutSampler, "continuations", listened)
    whole = run(recipe, {"folder": str(tmp_path / "whole")})
    assert bool(branched) == (name == "bread")
    original = rl_stage.Loop.step

    def cut_off(loop: rl_stage.Loop, step: int) -> dict[str, Any]:
        if step == 2:
            raise InterruptedError
        return original(loop, step)

    with monkeypatch.context() as patch:
        patch.setattr(rl_stage.Loop, "step", cut_off)
        with pytest.raises(InterruptedError):
            run(recipe, {"folder": str(tmp_path / "cut")})
    resumed = run(recipe, {"folder": str(tmp_path / "cut")})
    model = Path("stages/rl/model/model.safetensors")
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any("demonstration" in line.get("shares", {}) for line in lines) == (name == "red")
    assert all(line["grad_norm"] > 0 for line in lines)
