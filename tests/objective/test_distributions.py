"""Whole distributions held against a reference model's, by a dense float64 restatement."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thence.objective import (
    Entropy,
    Head,
    Logp,
    ProbLogp,
    RefCE,
    ReferenceStates,
    Term,
    TokenInputs,
    fused,
    objective,
    smoothed,
)

P, P_REF, TAKEN = (0.5, 0.3, 0.2), (0.6, 0.3, 0.1), 2


def on_logits(terms, weights, p=P, p_ref=P_REF):
    """Loss and logit gradient of one token whose logits are the log-probabilities themselves."""
    hidden = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    head = Head(torch.eye(len(p), dtype=torch.float64))
    reference = ReferenceStates(torch.tensor([p_ref], dtype=torch.float64).log(), head)
    inputs = TokenInputs(torch.tensor([TAKEN]), torch.tensor(weights, dtype=torch.float64)[:, None])
    loss, _ = objective(hidden, head, inputs, terms, [1.0] * len(terms), reference=reference)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.item(), gradient[0].tolist()


def test_golden_vectors_of_dft_and_asft():
    loss, gradient = on_logits([Term("dft", ProbLogp())], [1.0])
    assert loss == pytest.approx(0.321888, abs=1e-6)
    assert gradient == pytest.approx([0.1, 0.06, -0.16])
    kl, _ = on_logits([Term("kl", RefCE("forward"))], [1.0])
    assert kl == pytest.approx(0.040078, abs=1e-6)
    loss, gradient = on_logits([Term("dft", ProbLogp()), Term("kl", RefCE("forward"))], [1.0, 0.05])
    assert loss == pytest.approx(0.323891, abs=1e-6)
    assert gradient == pytest.approx([0.095, 0.06, -0.155])


def test_the_reverse_direction_has_its_own_value_and_gradient():
    loss, gradient = on_logits([Term("kl", RefCE("reverse"))], [1.0])
    kl = sum(p * math.log(p / q) for p, q in zip(P, P_REF, strict=True))
    assert loss == pytest.approx(kl)
    assert gradient == pytest.approx([p * (math.log(p / q) - kl) for p, q in zip(P, P_REF, strict=True)])


def test_smoothing_and_floor_leave_a_distribution():
    p = torch.tensor([0.999999, 1e-6, 0.0], dtype=torch.float64)
    found = smoothed(p.log(), 3, 0.03, 1e-3).exp()
    assert found.sum().item() == pytest.approx(1)
    assert found[2].item() == pytest.approx((0.01 + 1e-3) / 1.003)
    assert torch.equal(smoothed(p.log(), 3), p.log())


HEADS = {
    "plain": {},
    "scaled": {"scale": 0.0625},
    "soft-capped": {"softcap": 3.0},
    "with a bias": {"bias": True},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.5},
}
TERMS = (
    Term("sft", Logp()),
    Term("dft", ProbLogp()),
    Term("ce", RefCE()),
    Term("forward", RefCE("forward")),
    Term("reverse", RefCE("reverse", 0.05, 1e-3)),
    Term("smoothed", RefCE("cross-entropy", 0.2, 1e-4)),
    Term("bonus", Entropy()),
)
DIVISORS = (3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0)


def drawn(kind, tokens=23, words=11, seed=0, own_size=5):
    """Hidden states, heads and weights; the reference model has hidden states and a head of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(width):
        settings = {"bias": False} | HEADS[kind]
        bias = draw(words).requires_grad_() if settings.pop("bias") else None
        return Head(draw(words, width).requires_grad_(), bias, **settings)

    hidden, reference = draw(tokens, 6).requires_grad_(), draw(tokens, own_size).requires_grad_()
    target = torch.randint(words, (tokens,), generator=generator)
    return hidden, head(6), ReferenceStates(reference, head(own_size)), TokenInputs(target, draw(len(TERMS), tokens))


def log_p(hidden, head, temperature):
    logits = hidden @ head.weight_VD.T
    logits = (logits if head.bias_V is None else logits + head.bias_V) * head.scale
    logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    return (logits / temperature).log_softmax(1)


def dense_loss(hidden, head, reference, inputs, temperature):
    """The formulas as they are printed, with all logits at once and autograd for everything."""
    own = log_p(hidden, head, temperature)
    with torch.no_grad():
        ref = log_p(reference.hidden_TD, reference.head, temperature).exp()
    loss = torch.zeros((), dtype=torch.float64)
    for term, weight, divisor in zip(TERMS, inputs.weight_JT, DIVISORS, strict=True):
        s, taken = term.surrogate, own.gather(1, inputs.target_T[:, None])[:, 0]
        if isinstance(s, RefCE):
            words = own.shape[1]
            q = ((1 - s.smoothing) * ref + s.smoothing / words + s.floor) / (1 + words * s.floor)
            cross = -(q * own).sum(1)
            lost = {
                "cross-entropy": cross,
                "forward": cross + (q * q.log()).sum(1),
                "reverse": (own.exp() * (own - q.log())).sum(1),
            }[s.of]
        elif isinstance(s, Entropy):
            lost = (own.exp() * own).sum(1)
        else:
            lost = -taken * (taken.detach().exp() if isinstance(s, ProbLogp) else 1)
        loss = loss + (weight * lost).sum() / divisor
    return loss


def leaves(hidden, head):
    return [hidden, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_gradient_are_those_of_the_dense_formula(monkeypatch, kind, chunk_tokens, temperature):
    hidden, head, reference, inputs = drawn(kind)
    monkeypatch.setattr(fused, "CHUNK_BYTES", chunk_tokens * 11 * 8)
    expected = dense_loss(hidden, head, reference, inputs, temperature)
    loss, _ = objective(hidden, head, inputs, TERMS, DIVISORS, temperature, reference)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad(loss, leaves(hidden, head))
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves(hidden, head)), rtol=1e-11, atol=1e-13)
    assert reference.hidden_TD.grad is None
    assert reference.head.weight_VD.grad is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_gradient_does_not_depend_on_order_or_partition(data):
    kind, tokens = data.draw(st.sampled_from(list(HEADS))), data.draw(st.integers(1, 23))
    hidden, head, reference, inputs = drawn(kind, tokens, seed=data.draw(st.integers(0, 9)))
    order = torch.tensor(data.draw(st.permutations(range(tokens))))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    whole, _ = objective(hidden, head, inputs, TERMS, DIVISORS, 1.0, reference)
    expected = torch.autograd.grad(whole, leaves(hidden, head))
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        part = order[start:stop]
        mine = TokenInputs(inputs.target_T[part], inputs.weight_JT[:, part])
        theirs = ReferenceStates(reference.hidden_TD[part], reference.head)
        total = total + objective(hidden[part], head, mine, TERMS, DIVISORS, 1.0, theirs)[0]
    torch.testing.assert_close(total, whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, leaves(hidden, head)), expected, rtol=1e-10, atol=1e-12)


def test_a_tied_head_gets_both_gradients():
    hidden, _, reference, inputs = drawn("plain")
    table = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    ids = inputs.target_T.roll(1)

    def gradient(loss_of):
        return torch.autograd.grad(loss_of(table[ids] + hidden.detach(), Head(table)), table)[0]

    found = gradient(lambda h, w: objective(h, w, inputs, TERMS, DIVISORS, 1.0, reference)[0])
    expected = gradient(lambda h, w: dense_loss(h, w, reference, inputs, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_in_bfloat16_probabilities_are_still_float32():
    hidden, head, reference, inputs = drawn("soft-capped")
    short, short_ref = hidden.detach().bfloat16().requires_grad_(), reference.hidden_TD.detach().bfloat16()
    weight, ref_weight = (h.weight_VD.detach().bfloat16() for h in (head, reference.head))
    states = ReferenceStates(short_ref, Head(ref_weight, softcap=3.0))
    loss, _ = objective(short, Head(weight, softcap=3.0), inputs, TERMS, DIVISORS, 1.0, states)
    wide = short.detach().double().requires_grad_()
    expected = dense_loss(
        wide,
        Head(weight.double(), softcap=3.0),
        ReferenceStates(short_ref.double(), Head(ref_weight.double(), softcap=3.0)),
        inputs,
        1.0,
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)
    (found,), (right,) = torch.autograd.grad(loss, short), torch.autograd.grad(expected, wide)
    assert (found.double() - right).norm() / right.norm() < 0.02


def test_a_model_compared_with_itself_has_no_gradient():
    hidden, head, _, inputs = drawn("all")
    states = ReferenceStates(hidden.detach(), head)
    for of in ("cross-entropy", "forward", "reverse"):
        loss, _ = objective(
            hidden,
            head,
            TokenInputs(inputs.target_T, inputs.weight_JT[:1]),
            [Term("ref", RefCE(of))],
            [1.0],
            1.0,
            states,
        )
        assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-14


def test_a_missing_or_other_reference_is_refused():
    hidden, head, reference, inputs = drawn("plain")
    with pytest.raises(ValueError, match="hidden states are not given"):
        objective(hidden, head, inputs, TERMS, DIVISORS)
    other = ReferenceStates(reference.hidden_TD, Head(reference.head.weight_VD[:7]))
    with pytest.raises(ValueError, match="7 and 11 words"):
        objective(hidden, head, inputs, TERMS, DIVISORS, 1.0, other)


def test_memory_beyond_the_inputs_does_not_grow_with_the_tokens():
    """Counts every allocation beyond the gradients: six chunks over the vocabulary, however many tokens."""
    from torch.profiler import ProfilerActivity, profile

    words = 49_152
    head, ref_head = Head(torch.randn(words, 8).requires_grad_()), Head(torch.randn(words, 8))

    def peak_extra(tokens):
        hidden = torch.randn(tokens, 8).requires_grad_()
        inputs = TokenInputs(torch.zeros(tokens, dtype=torch.int64), torch.ones(2, tokens))
        terms = (Term("dft", ProbLogp()), Term("kl", RefCE("forward")))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            loss, _ = objective(
                hidden, head, inputs, terms, (1.0, 1.0), 1.0, ReferenceStates(hidden.detach(), ref_head)
            )
            loss.backward()
        live = peak = 0
        for event in prof.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return peak

    few, many = peak_extra(400), peak_extra(1600)
    assert many < few * 1.1
    assert many < 6.5 * fused.CHUNK_BYTES + 4 * words * 8 * 4
