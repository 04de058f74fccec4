"""Divergences from a teacher's next-token distributions, by a dense float64 restatement."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.objective.test_distributions import HEADS, leaves, log_p
from thence.objective import Divergence, Head, Logp, RefCE, ReferenceStates, Term, TokenInputs, fused, objective

P, T = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
REVERSE, FORWARD, JSD = Divergence("reverse"), Divergence("forward"), Divergence("jsd", 0.3)
FORMS = (
    REVERSE,
    FORWARD,
    JSD,
    *(Divergence(of, 0.3, k, tail) for of in ("reverse", "forward", "jsd") for k, tail in ((4, False), (3, True))),
    Divergence("jsd", 0.8, 11),
    Divergence("reverse", 0.5, 50, True),
)
TERMS = (Term("sft", Logp()), *(Term(f"form {j}", form) for j, form in enumerate(FORMS)), Term("kl", RefCE("reverse")))
DIVISORS = tuple(2.0 * j + 3 for j in range(len(TERMS)))


def on_logits(surrogate, weight=1.0, p=P, t=T):
    """Loss and logit gradient of one token whose logits are the log-probabilities themselves."""
    hidden = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    head = Head(torch.eye(len(p), dtype=torch.float64))
    teacher = ReferenceStates(torch.tensor([t], dtype=torch.float64).log(), head)
    inputs = TokenInputs(torch.tensor([0]), torch.tensor([[weight]], dtype=torch.float64))
    loss, _ = objective(hidden, head, inputs, [Term("d", surrogate)], [1.0], teacher=teacher)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.item(), gradient[0].tolist()


def test_golden_vectors_of_both_directions():
    """The vector of the specification: KL(T || p) has the gradient p - T, KL(p || T) p (log(p / T) - KL)."""
    reverse = 0.5 * 0.916291 - 0.2 * 0.916291
    loss, gradient = on_logits(REVERSE)
    assert loss == pytest.approx(reverse, abs=1e-6)
    assert gradient == pytest.approx([0.320702, -0.082466, -0.238236], abs=1e-6)
    loss, gradient = on_logits(FORWARD)
    assert loss == pytest.approx(0.5 * 0.916291 - 0.2 * 0.916291, abs=1e-6)
    assert gradient == pytest.approx([0.3, 0.0, -0.3])
    assert on_logits(FORWARD, 2.0)[1] == pytest.approx([0.6, 0.0, -0.6])


def test_golden_vectors_of_the_mixture_and_of_the_likeliest_words():
    m = [0.7 * a + 0.3 * b for a, b in zip(P, T, strict=True)]
    kl = sum(a * math.log(a / b) for a, b in zip(P, m, strict=True))
    loss, gradient = on_logits(JSD)
    assert loss == pytest.approx(0.7 * kl + 0.3 * sum(a * math.log(a / b) for a, b in zip(T, m, strict=True)))
    assert gradient == pytest.approx([0.7 * a * (math.log(a / b) - kl) for a, b in zip(P, m, strict=True)])
    # the two likeliest words of the policy: p (5/8, 3/8), t (2/5, 3/5)
    loss, gradient = on_logits(Divergence("forward", top_k=2))
    assert loss == pytest.approx(0.4 * math.log(0.4 / 0.625) + 0.6 * math.log(0.6 / 0.375))
    assert gradient == pytest.approx([0.225, -0.225, 0.0])
    # the likeliest, and a tail of two: p (1/2, 1/2), t (1/5, 4/5); the tail's gradient is shared by p
    loss, gradient = on_logits(Divergence("forward", top_k=1, tail=True))
    assert loss == pytest.approx(0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5))
    assert gradient == pytest.approx([0.3, -0.3 * 0.6, -0.3 * 0.4])


def drawn(kind, tokens=23, words=11, seed=0):
    """Hidden states, heads and weights; reference model and teacher have hidden states and heads of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(width):
        chosen = {"bias": False} | HEADS[kind]
        bias = draw(words).requires_grad_() if chosen.pop("bias") else None
        return Head(draw(words, width).requires_grad_(), bias, **chosen)

    def states(width):
        return ReferenceStates(draw(tokens, width).requires_grad_(), head(width))

    target = torch.randint(words, (tokens,), generator=generator)
    hidden = draw(tokens, 6).requires_grad_()
    return hidden, head(6), states(4), states(5), TokenInputs(target, draw(len(TERMS), tokens))


def divergence(form, own, theirs):
    """Restated: TRL's ``compute_divergence`` on the words that are compared, by plain formulas."""
    if 0 < form.top_k < own.shape[1]:
        words = own.detach().topk(form.top_k, 1).indices
        kept = torch.zeros_like(own, dtype=torch.bool).scatter(1, words, True)
        p, t = (x.exp().gather(1, words) for x in (own, theirs))
        if form.tail:
            tails = [x.exp().masked_fill(kept, 0).sum(1, keepdim=True) for x in (own, theirs)]
            p, t = torch.cat([p, tails[0]], 1), torch.cat([t, tails[1]], 1)
        p, t = p / p.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    else:
        p, t = own.exp(), theirs.exp()
    m = (1 - form.alpha) * p + form.alpha * t

    def kl(a, b):
        return (a * (a / b).log()).sum(1)

    if form.of == "jsd":
        return (1 - form.alpha) * kl(p, m) + form.alpha * kl(t, m)
    return kl(p, t) if form.of == "reverse" else kl(t, p)


def dense_loss(hidden, head, reference, teacher, inputs, temperature):
    own = log_p(hidden, head, temperature)
    with torch.no_grad():
        ref, theirs = (log_p(states.hidden_TD, states.head, temperature) for states in (reference, teacher))
    loss = torch.zeros((), dtype=torch.float64)
    for term, weight, divisor in zip(TERMS, inputs.weight_JT, DIVISORS, strict=True):
        if isinstance(term.surrogate, Divergence):
            lost = divergence(term.surrogate, own, theirs)
        elif isinstance(term.surrogate, RefCE):
            lost = (own.exp() * (own - ref)).sum(1)
        else:
            lost = -own.gather(1, inputs.target_T[:, None])[:, 0]
        loss = loss + (weight * lost).sum() / divisor
    return loss


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_gradient_are_those_of_the_dense_formula(monkeypatch, kind, chunk_tokens, temperature):
    hidden, head, reference, teacher, inputs = drawn(kind)
    monkeypatch.setattr(fused, "CHUNK_BYTES", chunk_tokens * 11 * 8)
    expected = dense_loss(hidden, head, reference, teacher, inputs, temperature)
    loss, _ = objective(hidden, head, inputs, TERMS, DIVISORS, temperature, reference, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad(loss, leaves(hidden, head))
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves(hidden, head)), rtol=1e-11, atol=1e-13)
    assert teacher.hidden_TD.grad is None
    assert teacher.head.weight_VD.grad is None


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_gradient_does_not_depend_on_order_or_partition(data):
    kind, tokens = data.draw(st.sampled_from(list(HEADS))), data.draw(st.integers(1, 23))
    hidden, head, reference, teacher, inputs = drawn(kind, tokens, seed=data.draw(st.integers(0, 9)))
    order = torch.tensor(data.draw(st.permutations(range(tokens))))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    whole, _ = objective(hidden, head, inputs, TERMS, DIVISORS, 1.0, reference, teacher)
    expected = torch.autograd.grad(whole, leaves(hidden, head))
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        part = order[start:stop]
        mine = TokenInputs(inputs.target_T[part], inputs.weight_JT[:, part])
        others = [ReferenceStates(states.hidden_TD[part], states.head) for states in (reference, teacher)]
        total = total + objective(hidden[part], head, mine, TERMS, DIVISORS, 1.0, *others)[0]
    torch.testing.assert_close(total, whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, leaves(hidden, head)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_model_that_is_its_own_teacher_has_no_gradient(form):
    hidden, head, *_, inputs = drawn("all")
    states, mine = ReferenceStates(hidden.detach(), head), TokenInputs(inputs.target_T, inputs.weight_JT[:1])
    loss, _ = objective(hidden, head, mine, [Term("d", form)], [1.0], teacher=states)
    assert abs(loss.item()) < 1e-13
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-13


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nothing_overflows_where_policy_and_teacher_are_sure_of_different_words(form):
    head = Head(torch.eye(11))
    hidden = torch.zeros(2, 11)
    hidden[0, 0] = hidden[1, 1] = 200.0
    mine, theirs = hidden.clone().requires_grad_(), ReferenceStates(hidden.flip(0), head)
    inputs = TokenInputs(torch.tensor([0, 1]), torch.ones(1, 2))
    loss, _ = objective(mine, head, inputs, [Term("d", form)], [1.0], teacher=theirs)
    assert loss.isfinite() and torch.autograd.grad(loss, mine)[0].isfinite().all()


def test_a_teacher_that_is_needed_and_missing_is_refused():
    hidden, head, reference, teacher, inputs = drawn("plain")
    with pytest.raises(ValueError, match="the teacher's hidden states are not given"):
        objective(hidden, head, inputs, TERMS, DIVISORS, 1.0, reference)
    other = ReferenceStates(teacher.hidden_TD, Head(teacher.head.weight_VD[:7]))
    with pytest.raises(ValueError, match="teacher and policy have other vocabularies: 7 and 11 words"):
        objective(hidden, head, inputs, TERMS, DIVISORS, 1.0, reference, other)
    nothing = TokenInputs(inputs.target_T, torch.zeros(1, 23))
    assert objective(hidden, head, nothing, TERMS[1:2], [1.0])[0].item() == 0.0


@pytest.mark.parametrize("form", [JSD, Divergence("jsd", 0.5, 100), Divergence("jsd", 0.5, 100, True)], ids=str)
def test_memory_beyond_the_inputs_does_not_grow_with_the_tokens(form):
    """Counts every allocation beyond the gradients: six and a half chunks over the vocabulary, however many tokens."""
    from torch.profiler import ProfilerActivity, profile

    words = 49_152
    head, theirs = Head(torch.randn(words, 8).requires_grad_()), Head(torch.randn(words, 8))

    def peak_extra(tokens):
        hidden = torch.randn(tokens, 8).requires_grad_()
        inputs = TokenInputs(torch.zeros(tokens, dtype=torch.int64), torch.ones(1, tokens))
        states = ReferenceStates(hidden.detach(), theirs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            loss, _ = objective(hidden, head, inputs, (Term("d", form),), (1.0,), 1.0, None, states)
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
