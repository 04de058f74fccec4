"""The methods: published numbers, gradients against their formulas written out, and what they sample."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.oracle import VARIANTS, contributions, gradient, make_case, make_method, relative, weights_of
from tests.oracle import make_batch as batch_of
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError, UserError
from thence.methods import registry
from thence.methods.base import Method, make_batch, make_rows
from thence.methods.dapo import Dapo, overlong_penalty
from thence.methods.dr_grpo import DrGrpo
from thence.methods.grpo import Grpo
from thence.methods.sft import SftMethod
from thence.objective import Clip, Context, Logp, Normaliser, Term, local_counts
from thence.pipeline.rehearsal import rehearse
from thence.recipe import Rl
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients

LENGTHS = [(3, 7), (3, 12), (2, 4), (4, 1), (5, 9), (1, 20)]


def group(scores, index=0, length=3) -> list[Trajectory]:
    return [Trajectory(Prompt(index, (2, 3)), tuple(range(4, 4 + length)), score=score) for score in scores]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_loss_and_gradient_are_those_of_the_formula_written_out(tiny_model, variant, packing):
    model = tiny_model()
    case = make_case(model, variant, LENGTHS, 3, 1)
    parts, clipped = contributions(model, case, variant)
    expected = gradient(model, parts.sum())
    batch = batch_of(case, variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    chosen = StepSettings(40, packing, 0.0, torch.float64)
    sums = accumulate_gradients(Policy(model), optimizer, batch, local_counts(batch), chosen)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert variant.moved == (int(clipped.sum()) > 0)  # the clips are tried where the policy moved
    assert int(sums.clipped) == int(clipped.sum())
    assert abs(sums.loss.item() - parts.sum().item()) <= 1e-12 * parts.abs().sum().item()
    assert relative(got, expected) <= 1e-12


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(1, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (21504, -1.25)]
)
def test_overlong_penalty_golden_vectors(tokens, penalty):
    assert overlong_penalty(tokens, 20480, 4096) == pytest.approx(penalty)
    assert overlong_penalty(tokens, 20480, 4096, 0.5) == pytest.approx(penalty / 2)
    assert overlong_penalty(tokens, 20480, 0) == 0


@pytest.mark.parametrize(
    ("ratio", "weight", "value", "slope"),
    [(1.5, 1, 1.28, 0), (0.5, 1, 0.5, 0.5), (0.5, -1, 0.8, 0), (1.5, -1, 1.5, 1.5), (4, -1, 3, 0)],
)
def test_dapo_clips_as_published_with_its_defaults(ratio, weight, value, slope):
    context = Context(torch.tensor([float(weight)]), torch.tensor([-2.0]))
    logp = torch.tensor([-2.0 + math.log(ratio)])
    clip = Dapo().terms[0].surrogate
    assert clip.value(logp, context).item() == pytest.approx(value)
    assert clip.slope(logp, context).item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("method", "clip", "normaliser"),
    [
        (Grpo(), Clip(0.2, 0.28), Normaliser("tokens")),
        (Grpo({"aggregation": "sequence-mean", "clip_high": 0.2}), Clip(0.2, 0.2), Normaliser("sequences")),
        (DrGrpo({"constant_tokens": 3000}), Clip(0.2, 0.2), Normaliser("sequences", 3000.0)),
        (Dapo(), Clip(0.2, 0.28, 3.0), Normaliser("tokens")),
    ],
    ids=["grpo", "grpo as first published", "dr_grpo", "dapo"],
)
def test_clip_and_normaliser_of_each_method(method, clip, normaliser):
    assert [(term.surrogate, term.normaliser) for term in method.terms] == [(clip, normaliser)]


@pytest.mark.parametrize(
    ("method", "right", "wrong"),
    [
        (Grpo(), 0.875, -0.125),
        (DrGrpo(), 0.875, -0.125),
        (Grpo({"std": True}), 2.474867, -0.353552),
        (Dapo(), 2.474867, -0.353552),
    ],
)
def test_weights_are_golden_advantages_at_every_token_of_their_own_group(method, right, wrong):
    trajectories = [*group([0.0] * 7 + [1.0], index=4, length=5), *group([1.0, 1.0], index=9)]
    weights = weights_of(method, trajectories)
    assert [tuple(w.shape) for w in weights] == [(1, 5)] * 8 + [(1, 3)] * 2
    assert weights[7].tolist() == [pytest.approx([right] * 5, abs=1e-6)]
    assert weights[0].tolist() == [pytest.approx([wrong] * 5, abs=1e-6)]
    assert not weights[8].any()


def test_sequence_mean_shares_an_advantage_among_the_tokens_of_a_response():
    short, long = group([1.0], length=2) + group([0.0], length=8)
    weights = weights_of(Grpo({"aggregation": "sequence-mean", "kl": 0.04}), [short, long])
    assert weights[0].sum(1).tolist() == pytest.approx([0.5, 0.04])
    assert weights[1].sum(1).tolist() == pytest.approx([-0.5, 0.04])


@pytest.mark.parametrize(("singleton", "weight"), [("zero", 0.0), ("reward", 1.0)])
def test_a_response_alone_in_its_group(singleton, weight):
    assert weights_of(Grpo({"singleton": singleton}), group([1.0]))[0].tolist() == [[weight] * 3]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_response_without_tokens_gets_no_weights(variant):
    method = make_method(variant)
    weights = weights_of(method, [*group([1.0, 0.0]), *group([1.0], length=0)])
    assert [tuple(w.shape) for w in weights] == [(len(method.terms), n) for n in (3, 3, 0)]


WANTED = {"policy": 1.0, "kl": torch.tensor([1.0, 2.0, 3.0]), "entropy": torch.tensor(2.0)}


def laid(weights: dict[str, Any]) -> torch.Tensor:
    terms = Grpo({"kl": 1.0, "entropy": 1.0}).terms
    return make_rows(terms, group([1.0]), [weights])[0].weights


def test_weights_are_laid_out_by_the_names_of_the_terms_whatever_their_order():
    for names in itertools.permutations(WANTED):
        found = laid({name: WANTED[name] for name in names})
        assert found.tolist() == [[1, 1, 1], [1, 2, 3], [2, 2, 2]]
        assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"policy": 1.0, "kl": 1.0}, "terms 'policy', 'kl', 'entropy', and gives weights to 'policy', 'kl'"),
        ({**WANTED, "policiy": 0.0}, "weights to 'policy', 'kl', 'entropy', 'policiy'"),
        ({"policiy": 1.0, "kl": 1.0, "entropy": 0.0}, "weights to 'policiy', 'kl', 'entropy'"),
        ({}, "weights to none"),
        ({**WANTED, "policy": torch.ones(4)}, r"'policy' weights of shape \(4,\) for 3 response tokens"),
        ({**WANTED, "policy": torch.ones(1, 3)}, r"shape \(1, 3\)"),
    ],
)
def test_a_missing_or_wrong_term_and_weights_of_another_shape_are_refused(weights, said):
    with pytest.raises(UserError, match=said):
        laid(weights)


def test_two_terms_of_one_name_are_refused():
    terms = (Term("policy", Logp()), Term("policy", Logp()))
    with pytest.raises(UserError, match="'policy', 'policy'"):
        make_rows(terms, group([1.0]), [{"policy": 1.0}])


def test_a_method_whose_weights_do_not_fit_its_terms_is_refused_before_the_first_step():
    class Misspelt(Grpo):
        def weigh(self, trajectories, facts=()):
            return [{"polciy": 1.0} for _ in trajectories]

    stage = Rl(reward="exact", prompts=1, rollouts=2, max_tokens=4, steps=1)
    with pytest.raises(UserError, match="polciy"):
        rehearse(Misspelt(), stage, [Prompt(0, (2, 3))])


def test_rows_train_the_response_and_nothing_else():
    trajectory = Trajectory(Prompt(0, (7, 8, 9)), (4, 5))
    (row,) = make_batch(SftMethod(), [trajectory]).rows
    assert row.token_ids.tolist() == [7, 8, 9, 4, 5]
    assert row.trained.tolist() == [False, False, False, True, True]
    assert row.weights.tolist() == [[1.0, 1.0]]


class FakeSampler:
    """Prompts 0, 1, 2, ...; the scores of a prompt's group are looked up, and every response is ``length`` long."""

    rank = 0

    def __init__(self, scores: dict[int, list[float]], length: int = 3, prompts: int = 1000):
        self.scores, self.length, self.prompts, self.drawn, self.rounds = scores, length, prompts, 0, 0

    def next_prompts(self, count):
        chosen = [Prompt((self.drawn + i) % self.prompts, (2, 3)) for i in range(count)]
        self.drawn += count
        return chosen

    def gather(self, value):
        return [value]

    def rollouts(self, prompts, n):
        self.rounds += 1
        return [
            Trajectory(prompt, tuple(range(self.length)), score=score)
            for prompt in prompts
            for score in (self.scores[prompt.index] if prompt.index in self.scores else [0.0] * n)[:n]
        ]


def composed(sampler, prompts, n=2, **options):
    result = Dapo({"overlong_buffer": 0, **options}).compose(sampler, prompts, n)
    return [trajectory.prompt.index for trajectory in result]


def test_dynamic_sampling_refills_until_the_batch_is_full():
    sampler = FakeSampler({0: [1, 1], 1: [0, 1], 2: [0, 0], 3: [0, 0], 5: [1, 0]})
    assert composed(sampler, 2) == [1, 1, 5, 5]
    assert sampler.rounds == 3


def test_dynamic_sampling_cuts_the_surplus_off():
    sampler = FakeSampler({0: [1, 0], 3: [0, 1], 4: [0, 1], 5: [0, 1]})
    assert composed(sampler, 3) == [0, 0, 3, 3, 4, 4]


def test_dynamic_sampling_gives_up_at_its_bound_and_trains_what_it_found(caplog):
    sampler = FakeSampler({1: [0, 1]})
    with caplog.at_level(logging.WARNING):
        assert composed(sampler, 2, max_generations=4) == [1, 1]
    assert sampler.rounds == 4
    assert "1 of 2 groups" in caplog.text
    hopeless = FakeSampler({})
    assert composed(hopeless, 2) == []
    assert hopeless.rounds == 10


def test_without_dynamic_sampling_every_group_is_trained():
    sampler = FakeSampler({0: [1, 1], 1: [0, 1]})
    assert composed(sampler, 2, dynamic_sampling=False) == [0, 0, 1, 1]
    assert sampler.rounds == 1


def test_a_small_data_set_whose_prompts_repeat_does_not_enlarge_the_batch():
    sampler = FakeSampler({0: [1, 0]}, prompts=1)
    assert len(composed(sampler, 3)) == 3 * 2


def test_groups_are_dropped_for_their_answers_and_not_for_the_length_penalty():
    """All right, but of different lengths: the penalties differ, the answers do not."""
    sampler = FakeSampler({1: [1, 0]}, length=8)
    mixed = sampler.rollouts

    def rollouts(prompts, n):
        found = mixed(prompts, n)
        return [Trajectory(t.prompt, t.response_ids[: 8 - i % n], score=t.score) for i, t in enumerate(found)]

    sampler.rollouts = rollouts
    options = {"overlong_tokens": 8, "overlong_buffer": 4, "max_generations": 2}
    kept = Dapo(options).compose(sampler, 1, 2)
    assert [t.prompt.index for t in kept] == [1, 1]
    assert [t.score for t in kept] == pytest.approx([1 - 1.0, 0 - 0.75])


def test_penalties_reach_the_advantage():
    """Two right answers, one of them overlong: after the penalty the shorter one is the better."""
    short, long = Trajectory(Prompt(0, (2,)), (3,) * 4, score=1.0), Trajectory(Prompt(0, (2,)), (3,) * 8, score=1.0)
    sampler: Any = SimpleNamespace(
        rank=0,
        gather=lambda value: [value],
        next_prompts=lambda count: [short.prompt],
        rollouts=lambda prompts, n: [short, long],
    )
    method = Dapo({"overlong_tokens": 8, "overlong_buffer": 4, "dynamic_sampling": False, "std": False})
    weights = weights_of(method, method.compose(sampler, 1, 2))
    assert [w[0, 0].item() for w in weights] == pytest.approx([0.5, -0.5])


def test_other_methods_take_what_is_sampled_once():
    for method in (Grpo(), DrGrpo()):
        sampler = FakeSampler({0: [1, 1], 1: [0, 1]})
        assert [t.prompt.index for t in method.compose(sampler, 2, 2)] == [0, 0, 1, 1]
        assert sampler.rounds == 1


@pytest.mark.parametrize(
    ("name", "options", "stage", "field", "words"),
    [
        ("grop", {}, "rl", "rl.method", "grpo"),
        ("sft", {}, "rl", "rl.method", "belongs into a stage of kind sft"),
        ("grpo", {}, "sft", "sft.method", "use one of sft"),
        ("grpo", {"clip_hgih": 0.3}, "rl", "rl.options.clip_hgih", "clip_high"),
        ("dapo", {"clip_low": -1}, "rl", "rl.options.clip_low", "must be at least 0"),
        ("dapo", {"overlong_buffer": 9, "overlong_tokens": 8}, "rl", "rl.options", "longer than overlong_tokens"),
        ("sft", {"clip_low": 0.2}, "sft", "sft.options.clip_low", "method sft"),
    ],
)
def test_a_wrong_method_or_option_is_named_with_a_remedy(name, options, stage, field, words):
    with pytest.raises(RecipeError) as caught:
        registry.make_method(name, options, stage)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_another_package_can_add_a_method(monkeypatch):
    class Mine(Grpo):
        name = "mine"
        exactness = "exact"

    entry = SimpleNamespace(name="mine", load=lambda: Mine)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "thence.methods" else [])
    method = registry.make_method("mine", {"clip_low": 0.1}, "rl")
    assert isinstance(method, Mine)
    assert method.options.clip_low == 0.1


def test_a_method_with_the_name_of_another_is_refused(tmp_path, monkeypatch):
    def install(package: str, entry: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[thence.methods]\n{entry} = {package}:Other\n")
        (tmp_path / f"{package}.py").write_text(
            "from thence.methods.grpo import Grpo\nclass Other(Grpo):\n    exactness = 'exact'\n"
        )

    monkeypatch.syspath_prepend(str(tmp_path))
    install("clash_a", "clash")
    install("clash_b", "clash")
    with pytest.raises(UserError, match="two methods are called 'clash'") as caught:
        registry.methods()
    for package in ("clash_a", "clash_b"):
        assert f"{package}:Other of the package {package}" in caught.value.problem
        assert f"the package {package}" in caught.value.remedy
    for package in ("clash_a", "clash_b"):
        shutil.rmtree(tmp_path / f"{package}-1.0.dist-info")
    install("clash_c", "grpo")
    with pytest.raises(UserError, match="two methods are called 'grpo': clash_c:Other of the package clash_c, and one"):
        registry.make_method("grpo", {}, "rl")


class Silent(Grpo):
    name = "silent"


class Vague(Grpo):
    exactness = "nearly"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Silent, "method 'theirs' .* does not state its exactness .*Silent"),
        (Vague, "does not state its exactness"),
        (len, "'theirs' .* is not a method"),
        (dict, "'theirs' .* is not a method"),
    ],
)
def test_a_method_of_another_package_that_does_not_say_what_it_is_is_refused(monkeypatch, found, said):
    entry = SimpleNamespace(name="theirs", load=lambda: found)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(UserError, match=said) as caught:
        registry.make_method("theirs", {}, "rl")
    assert "exactness =" in caught.value.remedy or "subclass" in caught.value.remedy


def test_every_method_states_its_exactness_in_its_own_class():
    assert not hasattr(Method, "exactness")
    for method in registry.OWN:
        assert registry.checked_method(method.name, method) is method


def test_sft_can_count_every_response_the_same():
    from thence.data.trajectory import Prompt, Trajectory
    from thence.methods.sft import SftMethod

    method = SftMethod({"aggregation": "sequence-mean"})
    weights = weights_of(method, [Trajectory(Prompt(i, (1,)), (2,) * n) for i, n in enumerate((1, 4, 0))])
    assert [w.sum().item() for w in weights] == [1.0, 1.0, 0.0]
    assert [w.shape for w in weights] == [(1, 1), (1, 4), (1, 0)]
    assert method.terms[0].normaliser.of == "sequences"
    assert SftMethod().terms[0].normaliser.of == "tokens"
