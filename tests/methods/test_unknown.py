"""Responses that nobody can judge, and settings with which nothing would be learned."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.gates_cases import FakeSampler
from tests.oracle import weights_of
from tests.runs import trained
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError, UserError
from thence.methods import registry
from thence.methods.bread import Bread
from thence.methods.dapo import Dapo
from thence.methods.exgrpo import ExGrpo
from thence.methods.grpo import Grpo
from thence.methods.hpt import Hpt
from thence.methods.luffy import Luffy
from thence.methods.on_policy import OnPolicy
from thence.methods.prefix_rft import PrefixRft
from thence.methods.red import Red
from thence.methods.relift import Relift
from thence.methods.rl_sft_loss import RlSftLoss
from thence.methods.srft import Srft
from thence.methods.superrl import SuperRl
from thence.methods.unknown import leave_out
from thence.objective.kl import kl_estimate
from thence.objective.surrogates import Context, NegativeKl, log_ratio
from thence.pipeline.lessons import DEAD_STEPS, Watch
from thence.recipe import Eval, Rl, load_recipe
from thence.rollout.native import Sampling


def group(scores: list[float | None], index: int = 0) -> list[Trajectory]:
    return [Trajectory(Prompt(index, (2, 3), (5, 6)), (4, 5, 6), score=score) for score in scores]


def demonstration(score: float | None, index: int = 0) -> Trajectory:
    return Trajectory(Prompt(index, (2, 3), (5, 6)), (5, 6), origin="demonstration", score=score)


@pytest.mark.parametrize("method", [Grpo(), OnPolicy({"entropy": 0}), Relift({"entropy": 0})], ids=lambda m: m.name)
def test_an_unknown_reward_is_in_no_mean_and_has_no_row(method):
    kept = leave_out(method, group([1.0, None, 0.0, None]))
    assert [t.score for t in kept] == [1.0, 0.0]
    assert [w[0, 0].item() for w in weights_of(method, kept)] == [0.5, -0.5]


@pytest.mark.parametrize("method", [Grpo(), OnPolicy(), Grpo({"singleton": "reward"})], ids=["grpo", "own", "reward"])
def test_a_response_that_is_left_alone_is_not_trained_on_its_bare_reward(method):
    others = group([1.0, 0.0], index=1)
    assert leave_out(method, [*group([1.0, None, None]), *others]) == others
    alone = group([1.0])
    assert leave_out(method, alone) == alone  # one rollout a prompt was asked for


def test_an_unknown_demonstration_stays_where_its_reward_does_not_matter():
    rows = [*group([1.0, 0.0]), demonstration(None)]
    assert leave_out(RlSftLoss(), rows) == rows
    assert leave_out(Luffy(), rows) == rows[:2]
    assert leave_out(Srft(), rows) == rows[:2]
    nothing_known = [*group([None, None]), demonstration(1.0)]
    assert leave_out(Luffy(), nothing_known) == []
    assert leave_out(RlSftLoss(), nothing_known) == nothing_known[2:]


def test_srft_does_not_push_an_unknown_response_down():
    rows = leave_out(Srft(), [*group([1.0, None]), demonstration(1.0)])
    assert [(t.origin, t.score) for t in rows] == [("rollout", 1.0), ("demonstration", 1.0)]


def test_a_prefix_needs_two_plain_rollouts_for_its_own_baseline():
    method = PrefixRft({"estimator": "dr_grpo_prefix"})
    hybrid = Trajectory(Prompt(0, (2, 3), (5, 6)), (5, 6), score=1.0, prefix=1)
    assert leave_out(method, [*group([1.0, None]), hybrid]) == []
    assert len(leave_out(method, [*group([1.0, 0.0, None]), hybrid])) == 3
    assert len(leave_out(PrefixRft(), [*group([1.0, None]), hybrid])) == 2


def test_red_does_not_take_unknown_accuracy_for_failure():
    assert Red({"std": False}).options.largest == 5
    from thence.methods.base import TokenFacts

    facts = [TokenFacts(torch.zeros(2), torch.ones(2))]
    (weight,) = weights_of(Red({"entropy": 0}), [demonstration(None)], facts)
    assert weight[1].tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    ("scores", "imitated"), [([None, None], False), ([None, 0.0], True), ([None, 1.0], False), ([0.0, 0.0], True)]
)
def test_gates_look_at_what_is_known(scores, imitated):
    for method in (Hpt(), SuperRl()):
        found = method.compose(FakeSampler({0: scores}), 1, 2)
        assert ([t.origin for t in found] == ["demonstration"]) is imitated
    relift = Relift()
    relift.compose(FakeSampler({0: scores}), 1, 2)
    assert bool(relift.buffer) is imitated


def test_superrl_has_no_verdict_where_nothing_is_known():
    assert not SuperRl({"gate": "advantage"}).imitates(group([None, None]))


def test_dapo_keeps_no_group_for_an_unknown_reward_and_does_not_penalise_it():
    sampler = FakeSampler({0: [1.0, None, None], 1: [None] * 3, 2: [1.0, 0.0, None]})
    assert [t.prompt.index for t in Dapo().compose(sampler, 1, 3)] == [2, 2, 2]
    unsifted = Dapo({"dynamic_sampling": False}).compose(FakeSampler({0: [None, 1.0]}), 1, 2)
    assert [t.score for t in unsifted] == [None, 1.0]


def test_bread_does_not_search_for_a_prompt_that_nobody_can_judge():
    class Sampler(FakeSampler):
        def continuations(self, prompts, prefixes, n):
            self.searched = [p.index for p in prompts]
            begun = zip(prompts, prefixes, strict=True)
            return [Trajectory(p, (*x, 1), score=None, prefix=len(x)) for p, x in begun for _ in range(n)]

    sampler = Sampler({0: [None, None], 1: [0.0, None]})
    found = Bread().compose(sampler, 2, 2)
    assert sampler.searched == [1]  # one round: what it found is unknown too, and ends the search
    assert [t.prompt.index for t in found] == [0, 0, 1, 1]


def test_exgrpo_starts_by_the_rate_among_known_responses():
    sampler = FakeSampler({0: [1.0, None], 1: [None, None]})
    plain = sampler.rollouts
    sampler.rollouts = lambda prompts, n: [  # type: ignore[method-assign]
        Trajectory(t.prompt, t.response_ids, score=t.score, verdict="right" if t.score else "unknown",
                   sampler_logps=(-1.0,) * len(t.response_ids))
        for t in plain(prompts, n)
    ]  # fmt: skip
    method = ExGrpo()
    method.compose(sampler, 2, 2)
    assert method.started  # 1 of 1, not 1 of 4
    assert not method.retired  # an unknown response may have been wrong


def test_an_unknown_reward_never_becomes_a_number_on_its_way_to_a_weight():
    for method in (Grpo(), OnPolicy(), Luffy()):
        with pytest.raises(ValueError, match="no reward"):
            weights_of(method, group([1.0, None]))


def own_reward(folder: Path, body: str) -> str:
    (folder / "judge.py").write_text(f"def judge(prompt, response, answer):\n    {body}\n")
    return f"{folder / 'judge.py'}:judge"


def test_a_run_counts_unknown_responses_and_trains_the_others_only(rl_recipe, tmp_path, caplog):
    reward = own_reward(tmp_path, "return None if response.count('2') % 2 else response.count('1') / 9")
    with caplog.at_level(logging.WARNING):
        _, lines = trained(rl_recipe, tmp_path / "out", reward=reward, steps=2)
    first = lines[0]
    assert first["unknown"] > 0 and first["unknown_share"] == first["unknown"] / 16
    assert first["sequences"] <= 16 - first["unknown"]
    assert caplog.text.count("nobody could judge") == 1 and "left out" in caplog.text
    _, zero = trained(rl_recipe, tmp_path / "zero", reward=reward, steps=2, unknown="zero")
    assert zero[0]["sequences"] == 16 and zero[0]["unknown"] == first["unknown"]
    assert zero[0]["reward"] < first["reward"]
    samples = [json.loads(line) for line in (tmp_path / "out/stages/rl/samples.jsonl").read_text().splitlines()]
    assert {s["score"] is None for s in samples if s["verdict"] == "unknown"} <= {True}


def test_the_update_is_that_of_the_known_responses_alone(rl_recipe, tmp_path):
    """With `unknown = "zero"` the same responses pull the mean down and are pushed down themselves."""
    reward = own_reward(tmp_path, "return None if response.count('2') % 2 else response.count('1') / 9")
    out, _ = trained(rl_recipe, tmp_path / "out", reward=reward, steps=1)
    zero, _ = trained(rl_recipe, tmp_path / "zero", reward=reward, steps=1, unknown="zero")
    assert any(not torch.equal(out[name], zero[name]) for name in out)


def test_a_run_of_unknown_responses_alone_takes_no_step(rl_recipe, tmp_path):
    _, lines = trained(rl_recipe, tmp_path / "out", reward=own_reward(tmp_path, "return None"), steps=2)
    assert [(line["unknown_share"], line["dead_groups"], line["sequences"]) for line in lines] == [(1.0, 1.0, 0)] * 2


def test_dead_groups_and_kl_are_logged(rl_recipe, tmp_path):
    _, lines = trained(rl_recipe, tmp_path / "kl", options={"kl": 0.1})
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 1e-6
    assert all(0 <= line["dead_groups"] < 1 for line in lines)
    _, equal = trained(rl_recipe, tmp_path / "equal", reward=own_reward(tmp_path, "return 1.0"), steps=1)
    assert equal[0]["dead_groups"] == 1.0 and "kl" not in equal[0]


def test_many_dead_steps_in_a_row_are_warned_of(caplog):
    watch = Watch("rl", "leave-out")
    with caplog.at_level(logging.WARNING):
        for step in range(DEAD_STEPS - 1):
            watch.look(step, {"dead_groups": 1.0, "reward": 0.0})
        watch.look(50, {"dead_groups": 0.9, "reward": 0.1})
        for step in range(DEAD_STEPS - 1):
            watch.look(step, {"dead_groups": 1.0, "reward": 0.0})
        assert not caplog.text
        watch.look(99, {"dead_groups": 1.0, "reward": 0.0})
    assert f"last {DEAD_STEPS} steps" in caplog.text


NEED_TWO = {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "dppo", "ipo"}
NEED_TWO |= {"rl_sft_loss", "mixed_policy", "luffy", "srft", "red", "exgrpo", "bread", "trapo", "sdpo"}
OF_TWO = {"trapo": {"groups": [1, 1], "thresholds": [0.5], "fractions": [1.0]}}
"""Options with which a method that has sizes of its own takes two rollouts."""


@pytest.mark.parametrize("name", [name for name, m in registry.methods().items() if m.stage == "rl"])
def test_one_rollout_is_refused_by_the_methods_that_learn_nothing_from_it(name):
    stage = Rl(method=name, rollouts=1)
    if name in NEED_TWO:
        with pytest.raises(RecipeError) as caught:
            registry.stage_method(stage, "rl-late")
        assert caught.value.field == "rl-late.rollouts" and "rollouts to 2" in caught.value.remedy
    else:
        registry.stage_method(stage, "rl-late")
    registry.stage_method(Rl(method=name, rollouts=2, options=OF_TWO.get(name, {})), "rl-late")


def test_a_lone_response_that_gets_its_reward_is_fine():
    registry.stage_method(Rl(rollouts=1, options={"singleton": "reward"}), "rl")
    dapo = {"singleton": "reward", "dynamic_sampling": False}
    registry.stage_method(Rl(method="dapo", rollouts=1, options=dapo), "rl")
    with pytest.raises(RecipeError):
        registry.stage_method(Rl(method="dapo", rollouts=1, options={"singleton": "reward"}), "rl")


@pytest.mark.parametrize(
    ("options", "max_tokens", "overlong"),
    [({}, 20480, (20480, 4096)), ({}, 1000, (1000, 200)), ({"overlong_buffer": 10}, 1000, (1000, 10)),
     ({"overlong_tokens": 800}, 1000, (800, 160)), ({"overlong_tokens": 8, "overlong_buffer": 4}, 8, (8, 4))],
)  # fmt: skip
def test_dapos_penalty_follows_max_tokens(options, max_tokens, overlong):
    method: Any = registry.stage_method(Rl(method="dapo", options=options, max_tokens=max_tokens), "rl")
    assert method.overlong == overlong


@pytest.mark.parametrize(
    ("options", "field"),
    [({"overlong_tokens": 20480}, "tokens"), ({"overlong_tokens": 20480, "overlong_buffer": 4096}, "tokens"),
     ({"overlong_buffer": 2000}, "buffer")],
)  # fmt: skip
def test_a_penalty_of_dapo_that_can_never_act_is_refused(options, field):
    with pytest.raises(RecipeError) as caught:
        registry.stage_method(Rl(method="dapo", options=options, max_tokens=1000), "rl")
    assert caught.value.field == f"rl.options.overlong_{field}"
    registry.stage_method(Rl(method="dapo", options={**options, "overlong_buffer": 0}, max_tokens=1000), "rl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("difference", [-1000.0, -100.0, -20.5, -19.5, -1.0, 0.0, 3.0, 100.0])
def test_k3_and_its_slope_are_finite_and_never_let_go(difference, dtype):
    logp = torch.tensor([difference], dtype=dtype, requires_grad=True)
    context = Context(torch.ones(1, dtype=dtype), reference_T=torch.zeros(1, dtype=dtype))
    (-NegativeKl("k3").value(logp, context).sum()).backward()
    assert torch.isfinite(kl_estimate(logp, torch.zeros(1, dtype=dtype))).all()
    assert logp.grad is not None and torch.isfinite(logp.grad).all()
    slope = NegativeKl("k3").slope(logp.detach(), context)
    assert torch.allclose(-logp.grad, slope)
    assert torch.sign(slope).item() == -torch.sign(torch.tensor(difference)).item()  # pulls towards the reference
    assert torch.isfinite(log_ratio(logp, torch.zeros(1, dtype=dtype)).exp()).all()
    if difference > -20:
        assert kl_estimate(logp, torch.zeros(1, dtype=dtype)).item() == pytest.approx(
            float(torch.tensor(-difference, dtype=torch.float64).exp()) + difference - 1, rel=1e-4
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0),
     ("top_p", 1.5), ("top_p", float("nan")), ("top_k", -1), ("max_tokens", 0), ("rows", 0)],
)  # fmt: skip
def test_what_cannot_be_sampled_with_is_refused(name, value):
    with pytest.raises(UserError) as caught:
        Sampling(**{"max_tokens": 4, name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("temperatures", [[-1.0], [float("nan")], [float("inf")], []])
def test_an_evaluation_refuses_temperatures_that_cannot_be(temperatures):
    with pytest.raises(ValueError):
        Eval(temperatures=temperatures)
    with pytest.raises(RecipeError):
        load_recipe({"model": {"path": "m"}, "stages": ["eval"], "eval": {"temperatures": temperatures}})


@pytest.mark.parametrize("field", ["lr", "temperature", "reward_seconds", "eps"])
def test_no_field_of_a_recipe_is_infinite(field):
    with pytest.raises(ValueError):
        Rl(**{field: float("inf")})
