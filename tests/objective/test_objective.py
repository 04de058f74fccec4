"""The objective against golden vectors and a dense float64 restatement."""

import math

import pytest
import torch

from thence.objective import (
    CappedRatio,
    Clip,
    Context,
    Entropy,
    Head,
    Logp,
    NegativeKl,
    Normaliser,
    Prob,
    Ratio,
    Shape,
    ShapeRatio,
    SquaredGap,
    Term,
    TokenInputs,
    TrSft,
    TrustMask,
    fused,
    group_advantages,
    kl_estimate,
    objective,
    token_statistics,
)


def values_and_slopes(surrogate, ratio, weight):
    """S and dS/dlogp by autograd at a given ratio to a behaviour log-probability of -1."""
    behaviour = torch.tensor([-1.0], dtype=torch.float64)
    logp = (behaviour + math.log(ratio)).requires_grad_()
    context = Context(torch.tensor([weight], dtype=torch.float64), behaviour, behaviour)
    value = surrogate.value(logp, context)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    return value.item(), gradient.item(), surrogate.slope(logp.detach(), context).item()


@pytest.mark.parametrize(
    ("ratio", "weight", "value", "slope"),
    [(1.5, 1, 1.28, 0), (0.5, 1, 0.5, 0.5), (0.5, -1, 0.8, 0), (1.5, -1, 1.5, 1.5), (4, -1, 3, 0)],
)
def test_clip_golden_vectors(ratio, weight, value, slope):
    got, gradient, closed = values_and_slopes(Clip(0.2, 0.28, 3.0), ratio, weight)
    assert got == pytest.approx(value)
    assert gradient == pytest.approx(slope, abs=1e-12)
    assert closed == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "value", "slope"),
    [(1e-4, 0.000999, 0.000998), (0.01, 0.090909, 0.082645), (0.1, 0.5, 0.25), (1.0, 0.909091, 0.082645)],
)
def test_shape_golden_vectors(p, value, slope):
    logp = torch.tensor([math.log(p)], dtype=torch.float64)
    context = Context(torch.ones(1))
    assert Shape(0.1).value(logp, context).item() == pytest.approx(value, abs=1e-6)
    assert Shape(0.1).slope(logp, context).item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(("p", "slope"), [(1.0, 1.0), (0.1, 1.0), (0.04, 0.4), (0.01, 0.1), (1e-4, 0.001)])
def test_tr_sft_golden_vectors(p, slope):
    logp = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    value = TrSft(0.1).value(logp, Context(torch.ones(1)))
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    assert gradient.item() == pytest.approx(slope, rel=1e-12)
    assert TrSft(0.1).slope(logp.detach(), Context(torch.ones(1))).item() == pytest.approx(slope, rel=1e-12)
    assert value.item() == pytest.approx(math.log(p) if p >= 0.1 else p / 0.1 - 1 + math.log(0.1), rel=1e-12)


@pytest.mark.parametrize(("ratio", "value"), [(1.0, 0.909091), (0.1, 0.5)])
def test_shape_ratio_golden_vectors(ratio, value):
    assert values_and_slopes(ShapeRatio(0.1), ratio, 1.0)[0] == pytest.approx(value, abs=1e-6)


SURROGATES = [Logp(), Ratio(), Clip(), Clip(0.2, 0.28, 3.0), Prob(), Shape(), ShapeRatio(), TrSft()]
SURROGATES += [CappedRatio(0.5, 1.5), TrustMask("tv"), TrustMask("kl"), TrustMask("band", 0.2, 0.3, 1.5), SquaredGap()]
SURROGATES += [NegativeKl("k1"), NegativeKl("k2"), NegativeKl("k3")]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_every_slope_is_the_derivative_of_its_value(surrogate):
    generator = torch.Generator().manual_seed(0)
    behaviour = -3 * torch.rand(200, generator=generator, dtype=torch.float64)
    logp = (behaviour + torch.randn(200, generator=generator, dtype=torch.float64)).requires_grad_()
    context = Context(torch.randn(200, generator=generator, dtype=torch.float64), behaviour, behaviour.flip(0))
    (gradient,) = torch.autograd.grad(surrogate.value(logp, context).sum(), logp)
    torch.testing.assert_close(surrogate.slope(logp.detach(), context), gradient, rtol=1e-12, atol=1e-12)


def test_a_ratio_too_large_for_float32_stays_finite_and_stops_pulling():
    logp, behaviour = torch.tensor([0.0]), torch.tensor([-200.0])
    context = Context(torch.ones(1), behaviour)
    assert torch.isfinite(Ratio().value(logp, context)).all()
    assert Ratio().slope(logp, context).item() == 0


def advantages(rewards, **options):
    reward = torch.tensor(rewards, dtype=torch.float64)
    return group_advantages(reward, torch.zeros(len(rewards), dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("k", "demo", "right", "wrong", "off"),
    [
        (0, 1, None, -0.125, 0.875),
        (3, 1, 0.5, -0.5, 0.5),
        (7, 1, 0, None, 0),
        (0, 0, None, 0, 0),
        (3, 0, 0.625, -0.375, -0.375),
    ],
)
def test_joint_group_advantages_golden_vectors(k, demo, right, wrong, off):
    result = advantages([1.0] * k + [0.0] * (7 - k) + [float(demo)])
    assert result[7].item() == pytest.approx(off)
    assert right is None or result[:k].tolist() == pytest.approx([right] * k)
    assert wrong is None or result[k:7].tolist() == pytest.approx([wrong] * (7 - k))


def test_standardised_advantages_golden_vector():
    result = advantages([0.0] * 7 + [1.0], std=True)
    assert result[7].item() == pytest.approx(2.474867, abs=1e-6)
    assert result[0].item() == pytest.approx(-0.353552, abs=1e-6)


def test_on_policy_baseline_golden_vector():
    on_policy = torch.tensor([True] * 7 + [False])
    result = advantages([1.0] * 3 + [0.0] * 4 + [1.0], baseline="on-policy", on_policy_N=on_policy)
    assert result[0].item() == pytest.approx(0.571429, abs=1e-6)
    assert result[6].item() == pytest.approx(-0.428571, abs=1e-6)


def test_a_response_alone_in_its_group_follows_the_singleton_rule():
    assert advantages([0.7]).tolist() == [0.7]
    assert advantages([0.7], std=True).tolist() == [0.7]
    assert advantages([0.7], singleton="zero").tolist() == [0.0]


def test_groups_do_not_mix_and_need_not_be_consecutive():
    reward = torch.tensor([1.0, 5.0, 0.0, 7.0])
    group = torch.tensor([9, 2, 9, 2])
    assert group_advantages(reward, group).tolist() == [0.5, -1.0, -0.5, 1.0]


def test_equal_rewards_give_exactly_zero_in_float32():
    reward = torch.full((7,), 0.1)
    assert group_advantages(reward, torch.zeros(7, dtype=torch.int64), std=True).tolist() == [0.0] * 7


def test_kl_estimators():
    logp, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_estimate(logp, reference, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(logp, reference, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(logp, reference, "k3").item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logp, reference, "k4")


def random_inputs(n=37, d=6, v=11, j=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    hidden, head = draw(n, d).requires_grad_(), draw(v, d).requires_grad_()
    target = torch.randint(0, v, (n,), generator=generator)
    logp, _ = token_statistics(hidden.detach(), Head(head.detach()), target, 0.7)
    inputs = TokenInputs(target, draw(j, n), logp + 0.3 * draw(n), logp + 0.3 * draw(n))
    terms = (
        Term("sft", Logp()),
        Term("clip", Clip(0.2, 0.28, 3.0), Normaliser("sequences", 8.0)),
        Term("shape", Shape()),
        Term("kl", NegativeKl("k3")),
        Term("bonus", Entropy()),
    )
    return hidden, head, inputs, terms, (3.0, 5.0, 7.0, 11.0, 13.0)


def dense_loss(hidden, head, inputs, terms, divisors, temperature):
    """The formula written down plainly: all logits at once, autograd for everything."""
    log_p = torch.log_softmax(hidden @ head.T / temperature, 1)
    logp = log_p.gather(1, inputs.target_T[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = torch.zeros((), dtype=hidden.dtype)
    for j, term in enumerate(terms):
        value = entropy if isinstance(term.surrogate, Entropy) else term.surrogate.value(logp, inputs.context(j))
        loss = loss - (inputs.weight_JT[j] * value).sum() / divisors[j]
    return loss


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_chunked_objective_equals_the_dense_formula(monkeypatch, chunk_tokens, temperature):
    hidden, head, inputs, terms, divisors = random_inputs()
    monkeypatch.setattr(fused, "CHUNK_BYTES", chunk_tokens * head.shape[0] * 8)
    expected = dense_loss(hidden, head, inputs, terms, divisors, temperature)
    expected_gradients = torch.autograd.grad(expected, (hidden, head))
    loss, _ = objective(hidden, Head(head), inputs, terms, divisors, temperature)
    gradients = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-13)


def test_objective_scales_with_the_upstream_gradient():
    hidden, head, inputs, terms, divisors = random_inputs()
    once = torch.autograd.grad(objective(hidden, Head(head), inputs, terms, divisors)[0], hidden)[0]
    thrice = torch.autograd.grad(3 * objective(hidden, Head(head), inputs, terms, divisors)[0], hidden)[0]
    torch.testing.assert_close(thrice, 3 * once)


def test_reported_slope_is_the_weight_that_each_token_got():
    hidden, head, inputs, _, _ = random_inputs()
    weights = torch.arange(1.0, 38.0, dtype=torch.float64)[None]
    sft = TokenInputs(inputs.target_T, weights)
    _, stats = objective(hidden, Head(head), sft, (Term("sft", Logp()),), (10.0,))
    torch.testing.assert_close(stats.slope_T, weights[0] / 10)


def test_no_tokens_is_a_loss_of_zero():
    hidden, head, _, _, _ = random_inputs()
    empty = TokenInputs(torch.zeros(0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.float64))
    loss, stats = objective(hidden[:0], Head(head), empty, (Term("sft", Logp()),), (1.0,))
    (gradient,) = torch.autograd.grad(loss, head)
    assert loss.item() == 0
    assert len(stats.logp_T) == 0
    assert not gradient.any()


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_extra_memory_does_not_grow_with_the_number_of_tokens(vocabulary):
    """Counts every allocation of the forward and backward pass beyond the inputs and the gradients themselves."""
    from torch.profiler import ProfilerActivity, profile

    head = torch.randn(vocabulary, 8).requires_grad_()

    def peak_extra(tokens):
        hidden = torch.randn(tokens, 8).requires_grad_()
        inputs = TokenInputs(torch.zeros(tokens, dtype=torch.int64), torch.ones(1, tokens))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            loss, _ = objective(hidden, Head(head), inputs, (Term("sft", Logp()),), (1.0,))
            loss.backward()
        live = peak = 0
        for event in prof.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        head.grad = None
        return peak

    chunk = fused.CHUNK_BYTES
    small, large = peak_extra(2 * chunk // (4 * vocabulary)), peak_extra(8 * chunk // (4 * vocabulary))
    assert large - small < chunk // 4, (small, large)
    assert large < 4 * chunk + 4 * head.numel() * 4
