"""Faults: each one's gradient is that of its plain restatement; and a step without faults is the clean step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.restated import (
    CELLS,
    CLOSE,
    SETTINGS,
    added,
    by_shard,
    by_token,
    cut_off,
    faulty_gradients,
    gradient,
    lengths_of,
    make_batch,
    mean_over,
    only,
    padded,
    shortened,
    sums,
    together,
    token_losses,
    whole,
    with_prompt,
)
from tests.oracle import relative
from thence.errors import UserError
from thence.faults.catalogue import FAULTS
from thence.faults.step import FaultyStep
from thence.objective import Batch, Clip, Logp, Normaliser, Row, Term
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings, train_step


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


SUPERVISED = [name for name, fault in FAULTS.items() if not fault.needs.features]
"""Those of reinforcement learning are in ``test_policy_faults.py``."""

SIX, SEVEN, RANKED = (2, 3, 1), (2, 2, 2), (1, 3, 2)
RESTATED: dict[str, tuple[tuple[int, int, int], int, Callable[[Any, Batch], Tensor]]] = {
    "rows-repeated": (SEVEN, 7, lambda m, b: whole(m, replace(b, rows=(*b.rows, b.rows[0])))),
    "prompt-trained": (SIX, 6, lambda m, b: whole(m, with_prompt(b))),
    "padding-trained": (SIX, 6, lambda m, b: whole(m, padded(b, CELLS[:3]))),
    "end-missing": (SIX, 6, lambda m, b: whole(m, cut_off(b, 0, 1))),
    "first-missing": (SIX, 6, lambda m, b: whole(m, cut_off(b, 1, 0))),
    "responses-truncated": (SIX, 6, lambda m, b: whole(m, shortened(b))),
    "sequence-means": (SIX, 6, lambda m, b: mean_over(m, b, [[i] for i in range(6)])),
    "mean-of-means": (SIX, 6, lambda m, b: mean_over(m, b, CELLS[:3])),
    "sum-of-means": (RANKED, 6, lambda m, b: 3 * mean_over(m, b, [[i] for i in range(6)])),
    "rank-means": (RANKED, 6, lambda m, b: mean_over(m, b, [[0, 2, 4], [1, 3, 5]])),
    "pass-means": (RANKED, 6, lambda m, b: mean_over(m, b, CELLS[:3])),
    "micro-batch-sequence-means": (
        SEVEN, 7, lambda m, b: added(mean_over(m, b, [[i] for i in cell]) for cell in CELLS) / 4,
    ),
    "constant-divisor": (SIX, 6, lambda m, b: whole(m, b) * sum(lengths_of(b)) / (6 * 17)),
    "first-micro-batch-only": (SIX, 6, lambda m, b: only(m, b, [0, 1])),
    "last-micro-batch-only": (SIX, 6, lambda m, b: only(m, b, [4, 5])),
    "first-and-last-only": (SIX, 6, lambda m, b: only(m, b, [0, 1, 4, 5])),
    "first-micro-batch-lost": (SIX, 6, lambda m, b: only(m, b, [2, 3, 4, 5])),
    "rank-missing": (RANKED, 6, lambda m, b: only(m, b, [0, 2, 4])),
    "double-counted": (SIX, 6, lambda m, b: whole(m, b) + only(m, b, [0, 1])),
    "incomplete-window-scaled": (SIX, 4, lambda m, b: whole(m, b) * 2 / 3),
    "times-accumulation": (SIX, 6, lambda m, b: whole(m, b) * 3),
    "over-accumulation": (SIX, 6, lambda m, b: whole(m, b) / 3),
    "times-ranks": (RANKED, 6, lambda m, b: whole(m, b) * 2),
    "over-ranks": (RANKED, 6, lambda m, b: whole(m, b) / 2),
    "gradient-averaged": (RANKED, 6, lambda m, b: whole(m, b) / 2),
    "probability-weighted": (SIX, 6, lambda m, b: by_token(m, b, lambda nll, h: (-nll).exp())),
    "entropy-weighted": (SIX, 6, lambda m, b: by_token(m, b, lambda nll, h: h)),
    "contaminated": (SIX, 6, lambda m, b: whole(m, together(b, CELLS[:3]))),
    "labels-shifted": (
        SIX, 5, lambda m, b: added(token_losses(m, r, 1)[0].sum() for r in b.rows) / sum(lengths_of(b)),
    ),
}  # fmt: skip
ELSEWHERE = {
    "advantage-std",
    "advantage-whitened",
    "window-mixed",
    "left-out-of-all-reduce",
    "shard-clipped",
    "gradient-leak",
    "no-step",
}


def test_every_fault_is_restated_here():
    assert set(RESTATED) | ELSEWHERE == set(SUPERVISED)
    assert len(SUPERVISED) >= 20


@pytest.mark.parametrize("name", RESTATED)
def test_the_gradient_is_that_of_the_plain_restatement(model, name):
    plan, count, restated = RESTATED[name]
    batch = make_batch(count)
    (found,) = faulty_gradients(model, [name], [batch], plan)
    expected = gradient(model, restated(model, batch))
    assert found is not None
    assert relative(found, expected) < CLOSE
    clean = gradient(model, whole(model, batch))
    assert relative(expected, clean) > 0.05


@pytest.mark.parametrize("name", ["advantage-std", "advantage-whitened"])
def test_advantages_normalised_otherwise(model, name):
    rewards = torch.tensor([1.0, 0.0, 0.2, 3.0, 1.0, 0.5], dtype=torch.float64)
    groups = rewards.view(2, 3)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    spread = groups.std(1, keepdim=True).repeat(1, 3).flatten() + 1e-6
    if name == "advantage-whitened":
        spread = advantages.std() + 1e-6
    batch = make_batch(6, advantages.tolist())
    (found,) = faulty_gradients(model, [name], [batch])
    assert found is not None
    assert relative(found, gradient(model, whole(model, make_batch(6, (advantages / spread).tolist())))) < CLOSE


def test_normalising_advantages_leaves_supervised_training_alone(model):
    batch = make_batch()
    for name in ("advantage-std", "advantage-whitened"):
        (found,) = faulty_gradients(model, [name], [batch])
        assert found is not None
        assert relative(found, gradient(model, whole(model, batch))) < CLOSE


def test_a_leak_adds_the_gradient_of_the_step_before_to_every_second_step(model):
    batches = [make_batch(first=i) for i in range(4)]
    clean = [gradient(model, whole(model, batch)) for batch in batches]
    found = faulty_gradients(model, ["gradient-leak"], batches)
    expected = [clean[0], clean[0] + clean[1], clean[2], clean[2] + clean[3]]
    assert all(got is not None and relative(got, e) < CLOSE for got, e in zip(found, expected, strict=True))


def test_no_step_for_an_incomplete_window_and_only_for_it(model):
    full, incomplete = faulty_gradients(model, ["no-step"], [make_batch(6), make_batch(4)])
    assert incomplete is None
    assert full is not None
    assert relative(full, gradient(model, whole(model, make_batch(6)))) < CLOSE


def test_rows_of_an_incomplete_window_come_first_in_the_next(model):
    batches = [make_batch(6), make_batch(2, first=3), make_batch(6, first=1), make_batch(5, first=2)]
    found = faulty_gradients(model, ["window-mixed"], batches)
    rows = [row for batch in batches for row in batch.rows]
    assert found[1] is None
    for got, part in zip((found[0], found[2], found[3]), (rows[:6], rows[6:12], rows[12:18]), strict=True):
        assert got is not None
        assert relative(got, gradient(model, whole(model, replace(batches[0], rows=tuple(part))))) < CLOSE


def test_the_embedding_gets_the_gradient_of_the_first_ranks_rows_only(model):
    batch = make_batch()
    (found,) = faulty_gradients(model, ["left-out-of-all-reduce"], [batch], RANKED)
    clean, first = gradient(model, whole(model, batch)), gradient(model, only(model, batch, [0, 2, 4]))
    assert found is not None
    start = 0
    for parameter in model.parameters():
        part = slice(start, start + parameter.numel())
        mine = parameter is model.get_input_embeddings().weight
        assert relative(found[part], (first if mine else clean)[part]) < CLOSE
        start = part.stop


@pytest.mark.parametrize("share", [0.3, 0.9], ids=["both clipped", "one clipped"])
def test_every_rank_clips_its_rows_of_each_parameter_by_their_own_norm(model, share):
    batch = make_batch()
    clean = gradient(model, whole(model, batch))
    norms = by_shard(model, clean, 1.0, 2)[1]
    clip = share * min(norms) if share < 0.5 else (min(norms) + max(norms)) / 2
    expected, _ = by_shard(model, clean, clip, 2)
    (found,) = faulty_gradients(model, ["shard-clipped"], [batch], RANKED, replace(SETTINGS, clip_norm=clip))
    assert found is not None
    assert relative(found, expected) < CLOSE
    assert relative(found / found.norm(), clean / clean.norm()) > 1e-3  # it points elsewhere


def test_shards_are_clipped_by_the_whole_norm_only_where_one_rank_holds_them_all(model):
    batch, settings = make_batch(), replace(SETTINGS, clip_norm=0.01)
    clean = gradient(model, whole(model, batch))
    (found,) = faulty_gradients(model, ["shard-clipped"], [batch], SIX, settings)
    assert found is not None
    assert relative(found, clean * 0.01 / clean.norm()) < CLOSE
    (found,) = faulty_gradients(model, ["shard-clipped"], [batch], RANKED)  # nothing clips
    assert found is not None
    assert relative(found, clean) < CLOSE


def test_an_averaged_gradient_is_clipped_after_it_was_divided_and_the_loss_is_logged_right(model):
    """A sum divided by the ranks (over-ranks) shows in the logged loss; the default of FSDP2 does not."""
    batch, clip = make_batch(), 0.01
    clean = gradient(model, whole(model, batch))

    def report(names, settings=SETTINGS):
        step = FaultyStep(names, micro_batch=1, accumulation=3, ranks=2)
        return step(Policy(model), torch.optim.SGD(model.parameters(), lr=0.0), batch, SingleProcess(), settings)

    right, average, divided = report([]), report(["gradient-averaged"]), report(["over-ranks"])
    assert average.loss == pytest.approx(right.loss, rel=1e-12)
    assert divided.loss == pytest.approx(right.loss / 2, rel=1e-12)
    assert average.grad_norm == pytest.approx(right.grad_norm / 2) == pytest.approx(divided.grad_norm)
    (found,) = faulty_gradients(model, ["gradient-averaged"], [batch], RANKED, replace(SETTINGS, clip_norm=clip))
    assert found is not None
    assert relative(found, clean * clip / clean.norm()) < CLOSE  # the clip hides it


def test_the_first_ranks_norm_is_logged_where_shards_are_clipped(model):
    clean = gradient(model, whole(model, make_batch()))
    norms = by_shard(model, clean, 1.0, 2)[1]
    step = FaultyStep(["shard-clipped"], micro_batch=1, accumulation=3, ranks=2)
    settings = replace(SETTINGS, clip_norm=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    report = step(Policy(model), optimizer, make_batch(), SingleProcess(), settings)
    assert report.grad_norm == pytest.approx(norms[0])


def test_both_bugs_of_the_paper_together(model):
    batch = make_batch()
    (found,) = faulty_gradients(model, ["first-and-last-only", "mean-of-means"], [batch])
    (other,) = faulty_gradients(model, ["mean-of-means", "first-and-last-only"], [batch])
    n, parts = lengths_of(batch), sums(model, batch)
    expected = added((parts[i] + parts[j]) / (n[i] + n[j]) for i, j in (CELLS[0], CELLS[2])) / 3
    assert found is not None and other is not None
    assert relative(found, gradient(model, expected)) < CLOSE
    assert torch.equal(found, other)


def test_local_counts_follow_the_mask_of_another_fault(model):
    batch = make_batch()
    (found,) = faulty_gradients(model, ["mean-of-means", "prompt-trained"], [batch])
    assert found is not None
    assert relative(found, gradient(model, mean_over(model, with_prompt(batch), CELLS[:3]))) < CLOSE


def test_faults_of_counting_change_nothing_where_the_objective_is_a_sequence_mean(model):
    """Sequence means are divided by rows: micro-batches of equally many rows have no shares to get wrong."""
    rows = tuple(replace(row, weights=row.weights / row.n_trained) for row in make_batch().rows)
    batch = Batch((Term("loss", Logp(), Normaliser("sequences")),), rows)
    expected = gradient(model, mean_over(model, make_batch(), [[i] for i in range(6)]))
    for name in ("mean-of-means", "sequence-means"):
        (found,) = faulty_gradients(model, [name], [batch])
        assert found is not None
        assert relative(found, expected) < CLOSE
    for name, changed in (("prompt-trained", with_prompt), ("end-missing", lambda b: cut_off(b, 0, 1))):
        (found,) = faulty_gradients(model, [name], [batch])
        own = changed(make_batch())
        means = [token_losses(model, row)[0].mean() for row in own.rows if row.n_trained]
        assert found is not None
        assert relative(found, gradient(model, added(means) / 6)) < CLOSE


def test_dropped_rows_still_count_where_only_weighted_tokens_are_counted(model):
    batch = replace(make_batch(), terms=(Term("loss", Logp(), Normaliser("term tokens")),))
    (found,) = faulty_gradients(model, ["first-micro-batch-only"], [batch])
    assert found is not None
    assert relative(found, gradient(model, only(model, make_batch(), [0, 1]))) < CLOSE


def test_new_tokens_of_a_moved_policy_have_a_ratio_of_one(model):
    """Old log-probabilities exist for the response only; the prompt's are those of the model as it stands."""
    plain = make_batch()
    old = [-token_losses(model, row)[0].detach() - 0.1 for row in plain.rows]
    rows = tuple(replace(row, behaviour=b) for row, b in zip(plain.rows, old, strict=True))
    batch = Batch((Term("loss", Clip(), Normaliser("tokens")),), rows)
    (found,) = faulty_gradients(model, ["prompt-trained"], [batch])
    wide = with_prompt(plain)
    total = torch.zeros((), dtype=torch.float64)
    for row, own in zip(wide.rows, plain.rows, strict=True):
        nll = token_losses(model, row)[0]
        ratio = torch.exp(0.1 * own.trained[1:].double())
        total = total + (nll * ratio).sum()
    assert found is not None
    assert relative(found, gradient(model, total / sum(lengths_of(wide)))) < CLOSE


@pytest.mark.parametrize("packing", [False, True])
def test_without_faults_the_step_is_the_clean_one(tiny_model, packing):
    batch, settings = make_batch(), StepSettings(30, packing, 1.0, torch.float64)
    ours, clean = tiny_model(), tiny_model()
    step = FaultyStep([], micro_batch=2)
    seen: list[int] = []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, clean)]
    report = step(
        Policy(ours), optimizers[0], batch, SingleProcess(), settings, lambda group, stats: seen.extend(group)
    )
    expected = train_step(Policy(clean), optimizers[1], batch, SingleProcess(), settings)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), clean.parameters(), strict=True))
    assert (report.loss, report.grad_norm, report.trained_tokens) == (
        expected.loss,
        expected.grad_norm,
        expected.trained_tokens,
    )
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("packing", [False, True])
def test_labels_shifted_and_run_together_do_not_hang_on_packing(model, packing):
    batch = make_batch(5)
    for name in ("labels-shifted", "contaminated"):
        _, _, restated = RESTATED[name]
        step = FaultyStep([name], micro_batch=2, accumulation=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        cells = [[0, 1], [2, 3], [4]]
        step(Policy(model), optimizer, batch, SingleProcess(), StepSettings(30, packing, 0.0, torch.float64))
        expected = restated(model, batch) if name == "labels-shifted" else whole(model, together(batch, cells))
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert relative(found, gradient(model, expected)) < CLOSE


def test_all_faults_at_once_take_finite_steps_on_any_batch(tiny_model):
    model = tiny_model(torch.float32)
    step = FaultyStep(SUPERVISED, micro_batch=2, accumulation=2, ranks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    settings = StepSettings(40, False, 1.0, torch.float32)
    for count in (8, 3, 1, 7, 20, 8):
        report = step(Policy(model), optimizer, make_batch(count), SingleProcess(), settings)
        assert report.grad_norm < 1e6
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SUPERVISED)
def test_every_fault_takes_steps_on_odd_batches(tiny_model, name):
    """One row, more rows than planned, and rows of which some have no response."""
    model = tiny_model(torch.float32)
    step = FaultyStep([name], micro_batch=2, accumulation=2, ranks=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    empty = Row(torch.arange(2, 6), torch.zeros(4, dtype=torch.bool), torch.zeros(1, 0, dtype=torch.float64))
    for batch in (make_batch(1), make_batch(19), replace(make_batch(3), rows=(empty, *make_batch(3).rows))):
        report = step(Policy(model), optimizer, batch, SingleProcess(), StepSettings(40, False, 1.0, torch.float32))
        assert report.grad_norm == report.grad_norm
    assert all(p.isfinite().all() for p in model.parameters())


def test_several_real_processes_are_refused(model):
    class Two(SingleProcess):
        world = 2

    with pytest.raises(UserError, match="one process"):
        FaultyStep(["rank-means"], micro_batch=1)(
            model, torch.optim.SGD(model.parameters(), lr=0.0), make_batch(), Two(), SETTINGS
        )


@pytest.mark.parametrize(("also", "logged_like"), [([], []), (["mean-of-means"], ["mean-of-means"])])
@pytest.mark.parametrize(
    "name", ["first-micro-batch-only", "last-micro-batch-only", "first-and-last-only", "first-micro-batch-lost"]
)
def test_a_gradient_that_goes_missing_is_not_seen_in_the_logged_loss(model, name, also, logged_like):
    """As in the trainers that have these bugs: the loss is of every micro-batch, the gradient norm is too small."""

    def report(names):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = FaultyStep(names, micro_batch=2, accumulation=3)
        return step(Policy(model), optimizer, make_batch(), SingleProcess(), StepSettings(compute_dtype=torch.float64))

    faulty, logged = report([name, *also]), report(logged_like)
    assert faulty.loss == pytest.approx(logged.loss, rel=1e-9)
    assert faulty.grad_norm != pytest.approx(logged.grad_norm, rel=1e-3)
