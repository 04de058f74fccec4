"""The step: one gradient whatever the cut, refused when it would harm, and an update that plain torch agrees with."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.oracle import (
    VARIANTS,
    contributions,
    gradient,
    make_batch,
    make_case,
    make_method,
    relative,
    row_statistics,
    weights_of,
)
from tests.train.small_models import make
from tests.train.stepping import (
    CPU,
    DAPO,
    LENGTHS,
    MOVED,
    PAPER,
    SFT,
    oracle_step,
    parameters_of,
    plain_adamw,
    trainer_of,
)
from thence.errors import StepRefused, UserError
from thence.models.packing import packed_attention, way_of
from thence.objective import Batch, Logp, Row, Term, local_counts, trained_tokens
from thence.train.forward import hidden_states
from thence.train.micro_batches import lay_out, plan, token_inputs
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.recompute import recompute
from thence.train.step import StepSettings, accumulate_gradients, train_step

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def models(tiny_model):
    """The same weights in both dtypes; ``packed`` has seen packed rows, ``plain`` has not."""
    found = {}
    for dtype in TOLERANCE:
        found[dtype, "plain"] = tiny_model(dtype)
        found[dtype, "packed"] = tiny_model(dtype)
        way_of(found[dtype, "packed"])
    return found


def engine(model, batch: Batch, budget: int = 10_000, packing: bool = False):
    """Loss and whole gradient of a batch as the engine computes them."""
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    chosen = StepSettings(budget, packing, 0.0, dtype)
    loss = accumulate_gradients(Policy(model), optimizer, batch, local_counts(batch), chosen).loss
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@st.composite
def cuts(draw):
    """Row lengths with empty responses among them, and a way to order and cut them."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=2, max_size=8))
    order = draw(st.permutations(range(len(lengths))))
    return (
        lengths,
        draw(st.integers(2, 4)),
        order,
        draw(st.integers(1, 70)),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cut=cuts())
def test_any_partition_order_and_packing_gives_the_same_loss_and_gradient(models, variant, dtype, cut):
    lengths, group_size, order, budget, packing, seed = cut
    if variant is PAPER:  # the mean over a response needs a token
        lengths = [(prompt, max(1, response)) for prompt, response in lengths]
    case = make_case(models[torch.float64, "plain"], variant, lengths, group_size, seed)
    batch = make_batch(case, variant, dtype)
    loss, whole = engine(models[dtype, "plain"], batch)
    shuffled = replace(batch, rows=tuple(batch.rows[i] for i in order))
    loss_cut, cut_up = engine(models[dtype, "packed" if packing else "plain"], shuffled, budget, packing)
    # Losses of RL cancel, exactly at times: their error is measured against the sum of what was added up.
    mass = contributions(models[torch.float64, "plain"], case, variant)[0].abs().sum().item()
    assert abs(loss_cut.item() - loss.item()) <= TOLERANCE[dtype] * mass
    assert relative(cut_up, whole) <= TOLERANCE[dtype]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_every_architecture_has_the_gradient_of_its_own_logits(tiny_model, kind, packing):
    model = tiny_model(kind=kind)
    case = make_case(model, SFT, LENGTHS, 3, 0)
    expected = contributions(model, case, SFT)[0].sum()
    vector = gradient(model, expected)
    loss, got = engine(model, make_batch(case, SFT), 30, packing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative(got, vector) <= 1e-12


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_perturbing_a_packed_row_moves_no_other_rows_gradient(tiny_model, kind):
    model = tiny_model(kind=kind)
    batch = make_batch(make_case(model, SFT, [(2, 6), (3, 5), (1, 7)], 3, 0), SFT)
    for watched in range(3):
        only = [row if i == watched else replace(row, weights=0 * row.weights) for i, row in enumerate(batch.rows)]
        _, before = engine(model, Batch(batch.terms, tuple(only)), packing=True)
        for other in {0, 1, 2} - {watched}:
            moved = list(only)
            moved[other] = replace(moved[other], token_ids=(moved[other].token_ids + 7) % 40)
            _, after = engine(model, Batch(batch.terms, tuple(moved)), packing=True)
            assert before.any()
            assert relative(after, before) <= 1e-14


def test_without_row_lengths_packed_rows_would_see_each_other(tiny_model):
    """The test above can fail: one row of the same tokens, attended to as a whole, is something else."""
    query, key, value = torch.randn(3, 1, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    module = torch.nn.Identity()
    apart, _ = packed_attention(module, query, key, value, None, packed_lengths=(5, 4))
    together, _ = packed_attention(module, query, key, value, None, packed_lengths=(9,))
    assert torch.allclose(apart[:, :5], together[:, :5], atol=1e-6)
    assert not torch.allclose(apart[:, 6:], together[:, 6:], atol=1e-2)


def test_hidden_states_of_a_micro_batch_are_those_of_each_row_alone(models):
    rows = make_batch(make_case(models[torch.float64, "plain"], SFT, LENGTHS, 3, 0), SFT).rows
    alone = torch.cat([hidden_states(models[torch.float64, "plain"], lay_out([row], False, CPU)) for row in rows])
    for kind, packing in (("plain", False), ("packed", True), ("plain", True)):
        together = hidden_states(models[torch.float64, kind], lay_out(rows, packing, CPU))
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120), st.booleans())
def test_a_plan_holds_every_row_once_and_keeps_to_the_budget(lengths, budget, packing):
    groups = plan(lengths, budget, packing)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert len(group) == 1 or (sum(sizes) if packing else max(sizes) * len(sizes)) <= budget


def test_packing_needs_no_more_forward_passes_than_padding_and_a_large_budget_one():
    lengths = [50, 3, 4, 5, 6, 30]
    assert len(plan(lengths, 60, True)) < len(plan(lengths, 60, False))
    assert len(plan(lengths, 300, False)) == 1


def test_old_log_probabilities_of_some_rows_only_are_an_error(models):
    model = models[torch.float64, "plain"]
    rows = list(make_batch(make_case(model, MOVED, LENGTHS, 3, 0), MOVED).rows)
    rows[1] = replace(rows[1], behaviour=None)
    with pytest.raises(ValueError, match="some rows"):
        token_inputs(rows, lay_out(rows, False, CPU))


def test_policy_statistics_come_back_in_the_order_of_the_rows(models):
    model = models[torch.float64, "plain"]
    case = make_case(model, SFT, LENGTHS, 3, 0)
    found = trainer_of(model, budget=25).statistics(make_batch(case, SFT).rows, 0.7)
    for (logp, entropy), trajectory in zip(found, case.trajectories, strict=True):
        expected = [value.detach() for value in row_statistics(model, trajectory, 0.7)]
        torch.testing.assert_close([logp, entropy], expected, rtol=1e-12, atol=1e-12)
        assert not logp.requires_grad


@pytest.mark.parametrize("variant", [MOVED, DAPO], ids=str)
def test_the_report_and_the_observer_say_what_was_trained(tiny_model, variant):
    model = tiny_model()
    case = make_case(model, variant, LENGTHS, 5, 1)  # the last response is alone in its group: no advantage, no clip
    parts, clipped = contributions(model, case, variant)
    logps, entropies = zip(*(row_statistics(model, t) for t in case.trajectories), strict=True)
    seen = {}

    def observe(group, stats):
        sizes = [len(case.trajectories[i].response_ids) for i in group]
        seen.update(zip(group, stats.logp_T.split(sizes), strict=True))

    report = trainer_of(model).step(make_batch(case, variant), observe=observe)
    assert 0 < int(clipped.sum()) < len(clipped)
    assert report.clip_share == pytest.approx(clipped.double().mean().item())
    assert report.loss == pytest.approx(parts.sum().item(), abs=1e-6)
    assert report.logp == pytest.approx(torch.cat(logps).mean().item())
    assert report.entropy == pytest.approx(torch.cat(entropies).mean().item())
    assert (report.rows, report.trained_tokens, report.tokens) == (6, 53, 71)
    assert report.micro_batches == len(plan([sum(pair) for pair in LENGTHS[:-1]], 60, False)) + 1
    assert sorted(seen) == list(range(6))
    assert all(torch.allclose(seen[i], logp.detach()) for i, logp in enumerate(logps))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_rows_without_weight_go_forward_only_and_are_measured_all_the_same(tiny_model, packing):
    model = tiny_model()
    case = make_case(model, MOVED, LENGTHS, 3, 1)
    equal = [t.scored(1.0) if t.prompt.index else t for t in case.trajectories]  # the second group teaches nothing
    case = replace(case, trajectories=tuple(equal))
    batch = make_batch(case, MOVED)
    if packing:
        way_of(model)  # tries a few passes of its own, once
    backward = []  # tokens in each pass through the model that keeps what a backward pass needs
    model.base_model.register_forward_hook(
        lambda _, __, output: backward.append(output[0].shape[:2].numel() * output[0].requires_grad)
    )
    loss, found = engine(model, batch, 10_000, packing)
    lengths = [sum(pair) for pair in LENGTHS[:3]]
    assert backward == [sum(lengths) if packing else 3 * max(lengths), 0]
    assert loss.item() == pytest.approx(contributions(model, case, MOVED)[0].sum().item(), rel=1e-10)
    assert relative(found, gradient(model, contributions(model, case, MOVED)[0].sum())) <= 1e-12
    report = trainer_of(model).step(batch)
    entropies = torch.cat([row_statistics(tiny_model(), t)[1] for t in case.trajectories])
    assert report.entropy == pytest.approx(entropies.mean().item())
    assert (report.rows, report.trained_tokens) == (6, 53)


def test_a_step_without_any_weight_moves_on_the_moments_like_a_gradient_of_zero(tiny_model):
    model, twin = tiny_model(), tiny_model()
    case = make_case(model, SFT, LENGTHS, 3, 0)
    trainer, adamw = trainer_of(model, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1), plain_adamw(twin, 0.1)
    batch = make_batch(case, SFT)
    trainer.step(batch)
    oracle_step(twin, adamw, case, SFT)
    silent = replace(batch, rows=tuple(replace(row, weights=0 * row.weights) for row in batch.rows))
    assert trainer.step(silent).grad_norm == 0
    for parameter in twin.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    assert relative(parameters_of(model), parameters_of(twin)) <= 1e-12


def bad_batch(batch: Batch, value: float) -> Batch:
    weights = batch.rows[2].weights.double().clone()
    weights[0, 1] = value
    return replace(batch, rows=(*batch.rows[:2], replace(batch.rows[2], weights=weights), *batch.rows[3:]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308], ids=["nan", "inf", "overflow of the norm"])
def test_a_step_that_is_not_finite_is_refused_and_leaves_no_trace(tiny_model, value):
    model, twin = tiny_model(), tiny_model()
    trainer, undisturbed = (trainer_of(m, lambda step: 0.01 / (step + 1)) for m in (model, twin))
    good = make_batch(make_case(model, SFT, LENGTHS, 3, 0), SFT)
    trainer.step(good)
    undisturbed.step(good)
    before, state = parameters_of(model), copy.deepcopy(trainer.state())
    with pytest.raises(StepRefused, match="remedy"):
        trainer.step(bad_batch(good, value))
    assert torch.equal(parameters_of(model), before)
    plain, tensors = trainer.state()
    assert plain == state[0]
    assert tensors.keys() == state[1].keys()
    assert all(torch.equal(tensors[name], state[1][name]) for name in tensors)
    trainer.step(good)
    undisturbed.step(good)
    assert torch.equal(parameters_of(model), parameters_of(twin))


def test_a_step_that_trains_other_tokens_than_were_counted_is_refused(tiny_model):
    model = tiny_model()
    before = parameters_of(model)
    miscounted = Row(torch.arange(8), trained_tokens(3, 8), torch.ones(1, 1))
    with pytest.raises(StepRefused, match="1 trained tokens were counted but 5"):
        trainer_of(model).step(Batch((Term("sft", Logp()),), (miscounted,)))
    assert torch.equal(parameters_of(model), before)


def test_no_step_is_taken_above_the_norm_that_is_skipped(tiny_model):
    model = tiny_model()
    case = make_case(model, SFT, LENGTHS, 5, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norm, taken = None, []
    for factor in (None, 0.9, 1.1):
        skip = 0.0 if factor is None else factor * (norm or 0.0)
        model.load_state_dict(dict(zip(dict(model.named_parameters()), before, strict=True)), strict=False)
        settings = StepSettings(60, False, 0.0, torch.float64, skip_norm=skip)
        report = train_step(Policy(model), optimizer, make_batch(case, SFT), SingleProcess(), settings)
        norm = norm or report.grad_norm
        moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert report.grad_norm == pytest.approx(norm) and report.skipped != moved
        taken.append(moved)
    assert taken == [True, False, True]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("which", "again"), [(True, [2, 2]), (1, [2, 2]), (2, [2, 1]), (3, [2, 1]), (False, [1, 1])])
def test_activation_checkpointing_changes_memory_and_not_the_gradient(tiny_model, packing, which, again):
    model, recomputing = tiny_model(), tiny_model()
    if packing:
        way_of(recomputing)  # tries a few passes of its own, once
    names = [name for name, _ in recomputing.named_parameters()]
    trainer_of(recomputing, activation_checkpointing=which)
    assert [name for name, _ in recomputing.named_parameters()] == names and set(names) < set(recomputing.state_dict())
    passes = [0, 0]
    for i, layer in enumerate(recomputing.model.layers):

        def count(*_, i=i):
            passes[i] += 1

        layer.mlp.register_forward_pre_hook(count)
    case = make_case(model, MOVED, LENGTHS, 3, 0)
    batch = make_batch(case, MOVED)
    loss, expected = engine(model, batch, packing=packing)
    loss_again, got = engine(recomputing, batch, packing=packing)
    assert passes == again  # once forward, and where it is recomputed once more in the backward pass
    assert loss_again.item() == pytest.approx(loss.item(), rel=1e-12, abs=1e-13)
    assert relative(got, expected) <= 1e-12


def test_layers_that_cannot_be_recomputed_are_refused(tiny_model):
    without = make("gpt_neox_japanese", hidden_dropout=0.0, attention_dropout=0.0)
    with pytest.raises(UserError, match="the layers of GPTNeoXJapaneseForCausalLM cannot be recomputed") as refused:
        trainer_of(without, activation_checkpointing=True)
    assert "activation_checkpointing = false" in refused.value.remedy
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])  # as in older models, whose body has the switch
    model.model.gradient_checkpointing = False
    with pytest.raises(UserError, match="all of its layers or none") as refused:
        recompute(model, 2)
    assert "activation_checkpointing = true" in refused.value.remedy


def test_no_gradient_of_the_policy_where_all_rewards_are_equal(models):
    model = models[torch.float64, "plain"]
    case = make_case(model, DAPO, LENGTHS, 3, 0)
    equal = replace(case, trajectories=tuple(t.scored(1.0) for t in case.trajectories))
    assert not weights_of(make_method(DAPO), equal.trajectories)[0].any()
    assert not engine(model, make_batch(equal, DAPO))[1].any()
