"""Prefix-RFT, UFT, CHORD and ExGRPO: published numbers, gradients against the formulas, and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import thence.pipeline.rl_stage as rl_stage
from tests.methods.prefix_cases import flat_facts, trajectory
from tests.oracle import advantages, gradient, relative, row_statistics, weights_of
from tests.recipes import world_recipe
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.methods import registry
from thence.methods.base import Method, TokenFacts, bare_row, make_batch
from thence.methods.chord import ChordMu, ChordPhi, share_of_sft
from thence.methods.exgrpo import ExGrpo
from thence.methods.prefix_rft import PrefixRft, keep_highest, lowest_fraction
from thence.methods.uft import Uft, slice_probability, stage_slices
from thence.objective import Context, local_counts
from thence.pipeline.run import run
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients
from thence.train.trainer import Trainer

METHODS: tuple[type[Method], ...] = (PrefixRft, Uft, ChordMu, ChordPhi, ExGrpo)


def test_prefix_fractions_are_the_published_ones() -> None:
    assert [lowest_fraction(s, 500) for s in (0, 250, 500, 600)] == pytest.approx([0.95, 0.5, 0.05, 0.05])


def test_the_entropy_mask_is_the_published_one() -> None:
    assert keep_highest(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), 0.2).tolist() == [False] * 4 + [True]
    assert keep_highest(torch.tensor([0.3, 0.1, 0.2]), 0.2).tolist() == [True, False, False]
    assert keep_highest(torch.rand(10), 0.9).sum() == 9
    assert keep_highest(torch.rand(10), 1.0).all()
    assert keep_highest(torch.empty(0), 0.2).shape == (0,)


def test_hint_probabilities_and_stages_are_the_published_ones() -> None:
    assert [slice_probability(s, 300) for s in (0, 150, 300)] == pytest.approx([0.95, 0.5, 0.05])
    assert [stage_slices(s, 5, 300) for s in (0, 49, 50, 250, 300, 301)] == [5, 5, 4, 0, 0, 0]


def test_the_share_of_sft_is_the_published_one() -> None:
    assert [share_of_sft(s, 0.9, 0.05, 0, 200) for s in (0, 100, 200, 999)] == pytest.approx([0.9, 0.475, 0.05, 0.05])
    mixed = [share_of_sft(s, 0.5, 0.02, 200, 400) for s in (0, 100, 200, 400, 600)]
    assert mixed == pytest.approx([0, 0.25, 0.5, 0.26, 0.02])
    o = ChordPhi().options
    assert {share_of_sft(s, o.peak, o.valley, o.warmup, o.decay) for s in (0, 1, 200, 10_000)} == {0.1}


def test_the_weight_of_an_experts_token_is_p_times_one_minus_p() -> None:
    facts = TokenFacts(torch.tensor([0.5, 0.9, 1.0]).double().log(), torch.zeros(3))
    assert ChordPhi().phi(facts, 3).tolist() == pytest.approx([0.25, 0.09, 0])
    assert ChordPhi({"token_weight": "p"}).phi(facts, 3).tolist() == pytest.approx([0.5, 0.9, 1])
    expert = Trajectory(Prompt(0, (1,)), (2, 3, 4), origin="demonstration")
    counted = weights_of(ChordPhi({"normaliser": "code"}), [expert], [facts])[0][1]
    assert (counted != 0).all()  # in the mean over expert tokens, although it vanishes
    assert counted.float()[2] == 0


@pytest.mark.parametrize(("ratio", "value"), [(1.0, 0.909091), (0.1, 0.5)])
def test_a_replayed_token_acts_through_its_shaped_ratio(ratio: float, value: float) -> None:
    term = {term.name: term for term in ExGrpo().terms}["replay"]
    context = Context(torch.ones(1), torch.tensor([-2.0]))
    assert term.surrogate.value(torch.tensor([-2.0 + math.log(ratio)]), context).item() == pytest.approx(
        value, rel=1e-5
    )


@pytest.mark.parametrize(
    ("ratio", "weight", "value", "slope"),
    [(1.5, 1, 1.2, 0), (0.5, 1, 0.5, 0.5), (0.5, -1, 0.8, 0), (1.5, -1, 1.5, 1.5), (4, -1, 3, 0)],
)
def test_prefix_rft_clips_own_and_prefix_tokens_alike(ratio: float, weight: int, value: float, slope: float) -> None:
    context = Context(torch.tensor([float(weight)]), torch.tensor([-2.0]))
    for term in PrefixRft().terms[:2]:
        assert term.surrogate.value(torch.tensor([-2 + math.log(ratio)]), context).item() == pytest.approx(value)
        assert term.surrogate.slope(torch.tensor([-2 + math.log(ratio)]), context).item() == pytest.approx(slope)


def test_prefix_estimators() -> None:
    group = [trajectory(0, s) for s in (1.0, 0.0, 0.0)] + [trajectory(0, 1.0, prefix=2)]
    alone = [trajectory(1, s) for s in (1.0, 0.0)]
    facts = flat_facts(group + alone)
    joint = weights_of(PrefixRft({"keep_ratio": 1.0}), group + alone, facts)
    assert [w[0].tolist() for w in joint[:3]] == [[0.5] * 4, [-0.5] * 4, [-0.5] * 4]
    assert joint[3].tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0], [0, 0, 0.001, 0.001]]
    split = weights_of(PrefixRft({"keep_ratio": 1.0, "estimator": "dr_grpo_prefix"}), group + alone, facts)
    assert [w[0, 0].item() for w in split[:3]] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert split[3][:2].flatten().tolist() == pytest.approx([0, 0, 1, 1, 2 / 3, 2 / 3, 0, 0])
    assert [w[0].tolist() for w in split[4:]] == [w[0].tolist() for w in joint[4:]] == [[0.5] * 4, [-0.5] * 4]
    with pytest.raises(RecipeError, match="std goes with"):
        PrefixRft({"estimator": "dr_grpo_prefix", "std": True})


def test_the_mask_ranks_the_prefix_tokens_of_the_whole_step_and_no_others() -> None:
    low, high = trajectory(0, 1.0, 10, prefix=5), trajectory(1, 1.0, 10, prefix=5)
    rows = [low, trajectory(0, 0.0, 10), high, trajectory(1, 0.0, 10)]
    entropies = [torch.arange(10.0), torch.full((10,), 99.0), torch.arange(10.0) + 4.5, torch.full((10,), 99.0)]
    weights = weights_of(PrefixRft(), rows, [TokenFacts(-torch.ones(10), e) for e in entropies])
    assert weights[0][1].nonzero()[:, 0].tolist() == []
    assert weights[2][1].nonzero()[:, 0].tolist() == [3, 4]  # two of ten
    for weight in weights:
        assert weight.shape == (3, 10)
    assert weights[0][0].tolist() == [0.0] * 5 + [0.5] * 5
    assert weights[1][0].tolist() == [-0.5] * 10
    everywhere = weights_of(
        PrefixRft({"entropy_mode": "all"}), rows, [TokenFacts(-torch.ones(10), e) for e in entropies]
    )
    assert everywhere[0][2].tolist() == pytest.approx([0.001] * 10)


def test_hint_tokens_have_their_likelihood_and_nothing_else() -> None:
    group = [trajectory(0, 1.0, prefix=2), trajectory(0, 0.0, prefix=2)]
    first, second = weights_of(Uft(), group)
    sign = 0.5 / (math.sqrt(0.5) + 1e-6)
    expected = [[0, 0, sign, sign], [0.001, 0.001, 0, 0], [0, 0, 0.001, 0.001], [0, 0, 0.001, 0.001]]
    assert first.flatten().tolist() == pytest.approx([x for row in expected for x in row])
    assert second[0].tolist() == pytest.approx([0, 0, -sign, -sign])
    assert weights_of(Uft({"hints": "r3"}), group)[0][1].tolist() == [0] * 4
    assert weights_of(Uft({"hints": "stage"}), group)[0][1].tolist() == [0.001, 0.001, 0, 0]
    assert [t.name for t in Uft({"kl": 0.0, "entropy": 0.0}).terms] == ["policy", "hint"]
    equal = [trajectory(0, 1.0, prefix=2)] * 2
    batch = make_batch(Uft(), equal)
    assert local_counts(batch)[2:] == [4, 4, 4, 4]  # tokens without an advantage count as the policy's
    assert batch.rows[0].weights.float()[0].tolist() == [0] * 4


def test_expert_rows_are_outside_of_every_group() -> None:
    rows = [trajectory(0, 1.0), trajectory(0, 0.0), trajectory(0, 1.0, 8, origin="demonstration")]
    method = ChordMu({"std": False})
    weights = weights_of(method, rows)
    assert [w[:, 0].tolist() for w in weights] == [
        pytest.approx([0.05, 0]),
        pytest.approx([-0.05, 0]),
        pytest.approx([0, 0.9]),
    ]


SIZES = [(3, 7), (2, 9), (3, 5), (4, 6), (2, 8), (3, 4), (2, 11), (3, 6)]


def rows_of(method: Method, model: Any) -> list[Trajectory]:
    """Two groups of four with the tokens that the method mixes, random ids; CHORD's experts collide with a group."""
    generator = torch.Generator().manual_seed(3)
    vocabulary = model.config.vocab_size
    rows = []
    for i, (prompt, response) in enumerate(SIZES):
        ids = torch.randint(vocabulary, (prompt + response,), generator=generator).tolist()
        t = Trajectory(Prompt(i // 4, tuple(ids[:prompt])), tuple(ids[prompt:]), score=float(i in (0, 3, 5)))
        if isinstance(method, Uft):
            t = replace(t, prefix=(0, 3)[i // 4])
        elif isinstance(method, PrefixRft) and i % 4 == 3:
            t = replace(t, prefix=response - 2)
        elif isinstance(method, ExGrpo) and i == 3:
            past = row_statistics(model, t)[0].detach() + torch.linspace(-1, 1, response)
            t = replace(t, origin="replay", behaviour=tuple(past.tolist()))
        elif isinstance(method, ChordMu) and i in (3, 7):
            t = replace(t, prompt=replace(t.prompt, index=(0, 9)[i // 4]), origin="demonstration")
        rows.append(t)
    return rows


def ppo(ratio: torch.Tensor, gain: float, dual: float = math.inf) -> torch.Tensor:
    """min(r A, clip(r, 0.8, 1.2) A), not below dual A."""
    least = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    return torch.maximum(least, torch.full_like(least, dual * gain)) if gain < 0 and math.isfinite(dual) else least


def restated(method: Method, model: Any, rows: list[Trajectory], old: Sequence[Any], reference: Any) -> torch.Tensor:
    """The loss of the formula, row by row."""
    o = method.options
    stats = [row_statistics(model, t) for t in rows]
    ratios = [(logp - (logp.detach() if b is None else b)).exp() for (logp, _), b in zip(stats, old, strict=True)]
    n_all = sum(len(t.response_ids) for t in rows)
    z = 8 * 8192 if o.normaliser == "code" else n_all
    loss = torch.zeros((), dtype=torch.float64)
    own = [t for t in rows if t.origin != "demonstration"]
    gains = dict(zip(map(id, own), advantages(own, o.std), strict=True))
    if isinstance(method, PrefixRft):
        pooled = sorted(h for t, (_, e) in zip(rows, stats, strict=True) for h in e[: t.prefix].tolist())
        threshold = pooled[int(0.8 * len(pooled))]
        of_policy = sum(len(t.response_ids) - t.prefix for t in rows)
        for t, (logp, entropy), ratio in zip(rows, stats, ratios, strict=True):
            rest, prefix = gains[id(t)], gains[id(t)]
            if o.estimator == "dr_grpo_prefix":
                plain = [s.score or 0.0 for s in rows if s.prompt.index == t.prompt.index and not s.prefix]
                prefix = (t.score or 0.0) - sum(plain) / len(plain)
                rest = (t.score or 0.0) if t.prefix else prefix
            kept = (entropy[: t.prefix].detach() >= threshold).double()
            begun = {"clip": ppo(ratio, prefix, 3.0), "ratio": ratio * prefix, "logp": logp * prefix}[
                o.prefix_surrogate
            ]
            loss -= ((begun[: t.prefix] * kept).sum() + ppo(ratio, rest, 3.0)[t.prefix :].sum()) / z
            every = o.entropy_mode == "all"
            loss -= o.entropy * entropy[0 if every else t.prefix :].sum() / (n_all if every else of_policy)
    elif isinstance(method, Uft):
        hinted = sum(t.prefix for t in rows)
        z = n_all if o.normaliser == "clean" else n_all - hinted
        for t, (logp, entropy), ratio, base in zip(rows, stats, ratios, reference, strict=True):
            k3 = (base - logp).exp() - (base - logp) - 1
            loss -= (ppo(ratio, gains[id(t)]) + 0.001 * entropy - 0.001 * k3)[t.prefix :].sum() / z
            loss -= 0.001 * logp[: t.prefix].sum() / hinted
    elif isinstance(method, ChordMu):
        mu = share_of_sft(method.step, o.peak, o.valley, o.warmup, o.decay)
        expert = sum(len(t.response_ids) for t in rows if t.origin == "demonstration")
        for t, (logp, _), ratio in zip(rows, stats, ratios, strict=True):
            p = logp.detach().exp()
            phi = p * (1 - p) if isinstance(method, ChordPhi) else 1.0
            if t.origin == "demonstration":
                loss -= mu * (phi * logp).sum() / (n_all if o.normaliser == "clean" else expert)
            else:
                mine = len(own) * len(logp) if o.normaliser == "paper" else z
                loss -= (1 - mu) * ppo(ratio, gains[id(t)]).sum() / mine
    else:
        for t, (_, entropy), ratio in zip(rows, stats, ratios, strict=True):
            value = ratio / (ratio + 0.1) if t.origin == "replay" else ratio
            loss -= gains[id(t)] * value.sum() / z + 0.001 * entropy.sum() / n_all
    return loss


VARIANTS = [
    PrefixRft(),
    PrefixRft({"estimator": "dr_grpo_prefix", "normaliser": "code", "entropy_mode": "all"}),
    PrefixRft({"prefix_surrogate": "ratio", "std": True}),
    PrefixRft({"prefix_surrogate": "logp", "normaliser": "paper"}),
    Uft(),
    Uft({"normaliser": "code"}),
    ChordMu(),
    ChordMu({"normaliser": "paper", "peak": 0.4}),
    ChordPhi(),
    ChordPhi({"normaliser": "code"}),
    ExGrpo(),
    ExGrpo({"normaliser": "code", "std": True}),
]


@pytest.mark.matrix(6)
@pytest.mark.parametrize(
    "method",
    VARIANTS,
    ids=lambda m: "-".join([m.name, *map(str, m.options.model_dump(exclude_defaults=True).values())]),
)
def test_gradients_of_two_optimizer_steps_are_those_of_the_formula_however_cut(tiny_model: Any, method: Method) -> None:
    model = tiny_model()
    rows = rows_of(method, model)
    trainer = Trainer(model, 2e-2, StepSettings(1000, False, 0.0, torch.float64))
    blank = [bare_row(t) for t in rows]
    old = [
        stat[0] if t.behaviour is None else torch.tensor(t.behaviour).double()
        for t, stat in zip(rows, trainer.statistics(blank), strict=True)
    ]
    reference = [row_statistics(tiny_model(seed=1), t)[0].detach() for t in rows]
    for step in range(2):
        facts = [TokenFacts(*f) for f in trainer.statistics(blank)]
        whole = make_batch(method, rows, facts if method.uses_facts else ())
        made = [replace(r, behaviour=b, reference=f) for r, b, f in zip(whole.rows, old, reference, strict=True)]
        batch = replace(whole, rows=tuple(made))
        expected_loss = restated(method, model, rows, old, reference)
        expected = gradient(model, expected_loss)
        assert expected.norm() > 0
        whole = None
        for tokens, packing in ((1000, False), (1000, True), (25, False), (1, True)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            cut = StepSettings(tokens, packing, 0.0, torch.float64)
            sums = accumulate_gradients(Policy(model), optimizer, batch, local_counts(batch), cut)
            got = torch.cat([p.grad.flatten() for p in model.parameters()])
            whole = got if whole is None else whole
            assert sums.passes == {1000: 1, 1: len(rows)}.get(tokens, sums.passes)
            assert sums.loss.item() == pytest.approx(expected_loss.item(), rel=1e-10, abs=1e-14)
            assert relative(got, expected) <= 1e-10
            assert relative(got, whole) <= 1e-12
        if step == 0:
            trainer.step(batch)
        else:
            moved = torch.cat([row_statistics(model, t)[0].detach() - b for t, b in zip(rows, old, strict=True)])
            assert ((moved > math.log(1.2)) | (moved < math.log(0.8))).any()
            assert isinstance(method, ExGrpo) or sums.clipped > 0  # the clip holds something back


def make_recipe(folder: Path, name: str, method: type[Method], options: dict[str, Any]) -> dict[str, Any]:
    rl = {"method": method.name, "options": options, "steps": 4, "mini_batch": 2, "max_tokens": 60}
    rl |= {"checkpoint_every": 1}
    value, place = "float(response.count('1') % 2)", str(folder / name)
    return world_recipe(folder, ["rl"], value, folder=place, seed=3, data={"limit": 12}, rl=rl)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("method", "options", "kinds"),
    [
        (PrefixRft, {}, {"rollout", "prefix"}),
        (Uft, {"hint_steps": 4}, {"rollout", "prefix"}),
        (ChordMu, {"decay": 4}, {"rollout", "demonstration"}),
        (ChordPhi, {}, {"rollout", "demonstration"}),
        (ExGrpo, {"start": 0.1}, {"rollout", "replay"}),
    ],
    ids=lambda value: value.name if isinstance(value, type) else "",
)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    method: type[Method], options: dict[str, Any], kinds: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "OWN", (*registry.OWN, *METHODS))
    whole = run(make_recipe(tmp_path, "whole", method, options))
    original = rl_stage.Loop.step

    def cut_off(loop: rl_stage.Loop, step: int) -> dict[str, Any]:
        if step == 2:
            raise InterruptedError
        return original(loop, step)

    recipe = make_recipe(tmp_path, "cut", method, options)
    with monkeypatch.context() as patch:
        patch.setattr(rl_stage.Loop, "step", cut_off)
        with pytest.raises(InterruptedError):
            run(recipe)
    resumed = run(recipe)
    model = Path("stages/rl/model/model.safetensors")
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()
    found, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (resumed, whole)
    )
    untimed = [
        [{k: v for k, v in line.items() if "second" not in k and k != "tokens_per_s"} for line in lines]
        for lines in (found, expected)
    ]
    assert untimed[0] == untimed[1]
    assert {kind for line in expected for kind in line.get("shares", {})} == kinds
    assert all(line["grad_norm"] > 0 and math.isfinite(line["loss"]) for line in expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_says_what_it_is(method: type[Method]) -> None:
    assert method.stage == "rl"
    assert method.formula
    assert method.source
    assert all(field.description for field in method.Options.model_fields.values())
    given = method().weigh([trajectory(0, 1.0)], flat_facts([trajectory(0, 1.0)]))
    assert set(given[0]) == {term.name for term in method().terms}
