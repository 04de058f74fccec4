"""Draws of tokens follow their distribution, and the random numbers are those that are promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rollout.chi_square import chi_square
from thence.rollout.draws import draw, uniforms


def draws_of(p: list[float], n: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> torch.Tensor:
    """How often each token is drawn in ``n`` draws from a distribution."""
    logits_BV = torch.tensor(p).log().expand(n, -1)
    token_B, _ = draw(logits_BV, uniforms(torch.arange(n), 0, 1)[:, 0], temperature, top_p, top_k)
    return torch.bincount(token_B, minlength=len(p))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    p_V = torch.softmax(torch.linspace(-2, 2, 11), -1)
    counts_V = draws_of(p_V.tolist(), 40_000, temperature)
    assert chi_square(counts_V, torch.softmax(p_V.log() / temperature, -1)) < 40  # 10 degrees: once in 60,000


DYADIC = [0.0625, 0.25, 0.125, 0.5, 0.0625]  # exact in floating point; in falling order: 3, 1, 2, 0, 4


@pytest.mark.parametrize(
    ("top_p", "top_k", "allowed"),
    [
        (0.1, 0, {3}),
        (0.5, 0, {3}),
        (0.51, 0, {3, 1}),
        (0.75, 0, {3, 1}),
        (0.8, 0, {3, 1, 2}),
        (0.9, 0, {3, 1, 2, 0}),
        (0.99, 0, {0, 1, 2, 3, 4}),
        (1.0, 1, {3}),
        (1.0, 2, {3, 1}),
        (1.0, 4, {3, 1, 2, 0}),
        (1.0, 99, {0, 1, 2, 3, 4}),
        (0.6, 2, {3}),  # top-p is taken of what top-k leaves: 0.5 is two thirds of it
        (0.7, 2, {3, 1}),
    ],
)
def test_top_p_and_top_k_leave_exactly_these_tokens(top_p: float, top_k: int, allowed: set[int]) -> None:
    counts_V = draws_of(DYADIC, 4000, top_p=top_p, top_k=top_k)
    assert set(counts_V.nonzero()[:, 0].tolist()) == allowed
    kept_V = torch.tensor([p if i in allowed else 0.0 for i, p in enumerate(DYADIC)])
    seen = kept_V > 0
    assert chi_square(counts_V[seen], kept_V[seen] / kept_V.sum()) < 25


def test_the_log_probability_is_of_the_whole_softmax_at_the_temperature() -> None:
    logits_BV = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    uniform_B = uniforms(torch.arange(64), 0, 1)[:, 0]
    for temperature, top_p, top_k in ((0.7, 1.0, 0), (0.7, 0.5, 0), (1.3, 1.0, 2)):
        token_B, logp_B = draw(logits_BV, uniform_B, temperature, top_p, top_k)
        expected_BV = torch.log_softmax(logits_BV / temperature, -1)
        torch.testing.assert_close(logp_B, expected_BV.gather(1, token_B[:, None])[:, 0])


def test_greedy_takes_the_likeliest_and_reports_temperature_one() -> None:
    logits_BV = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    token_B, logp_B = draw(logits_BV, torch.full((64,), 0.999, dtype=torch.float64), 0.0, 1.0, 0)
    assert token_B.equal(logits_BV.argmax(-1))
    torch.testing.assert_close(logp_B, torch.log_softmax(logits_BV, -1).max(-1).values)


@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.1, 1.0, 7.0]), min_size=2, max_size=12).filter(any),
    uniform=st.one_of(st.sampled_from([0.0, 2.0**-53, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True)),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
)
def test_a_token_of_probability_zero_is_never_drawn(weights: list[float], uniform: float, top_p: float) -> None:
    logits_BV = torch.tensor([weights], dtype=torch.float32).log()
    token_B, logp_B = draw(logits_BV, torch.tensor([uniform], dtype=torch.float64), 1.0, top_p, 0)
    assert weights[int(token_B)] > 0
    assert bool(logp_B.isfinite().all())


def test_the_tail_of_a_large_vocabulary_is_drawn_exactly() -> None:
    vocab = 151_936
    index_B = torch.tensor([0, 1, 77_777, 131_071, 150_000, vocab - 2, vocab - 1])
    uniform_B = (index_B + 0.5).double() / vocab  # the middle of each token's stretch
    token_B, logp_B = draw(torch.zeros(len(index_B), vocab), uniform_B, 1.0, 1.0, 0)
    assert token_B.equal(index_B)
    torch.testing.assert_close(logp_B.exp() * vocab, torch.ones(len(index_B)), rtol=1e-3, atol=0)
    # one likely token before a tail that holds a thousandth of the probability
    peaked_1V = torch.zeros(1, vocab)
    peaked_1V[0, 0] = torch.tensor(999.0 * (vocab - 1)).log()
    first = 0.999
    for rank in (0, 1000, vocab - 2):
        uniform = first + 0.001 * (rank + 0.5) / (vocab - 1)
        token, _ = draw(peaked_1V, torch.tensor([uniform], dtype=torch.float64), 1.0, 1.0, 0)
        assert abs(int(token) - (rank + 1)) <= 0.002 * vocab  # float32 probabilities: the stretch begins a little off
    last, _ = draw(peaked_1V, torch.tensor([1 - 2.0**-53], dtype=torch.float64), 1.0, 1.0, 0)
    assert int(last) == vocab - 1


def splitmix64(seed: int, position: int) -> float:
    """Re-stated with Python's integers: splitmix64 whose state begins at the mixed seed."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    return (mixed((mixed(seed % 2**64) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53


@given(seed=st.integers(-(2**63), 2**63 - 1), first=st.integers(0, 100_000))
def test_random_numbers_are_splitmix64(seed: int, first: int) -> None:
    found = uniforms(torch.tensor([seed]), first, 3)[0].tolist()
    assert found == [splitmix64(seed, first + i) for i in range(3)]
    assert all(0 <= u < 1 for u in found)


def test_random_numbers_do_not_depend_on_the_batch_or_the_block() -> None:
    seed_B = torch.arange(-50, 50) * 12_345_678_901
    whole_BC = uniforms(seed_B, 0, 40)
    assert uniforms(seed_B[[70, 3]], 0, 40).equal(whole_BC[[70, 3]])
    assert uniforms(seed_B, 13, 9).equal(whole_BC[:, 13:22])


def test_random_numbers_look_uniform_along_rows_and_positions() -> None:
    uniform_BC = uniforms(torch.arange(400), 0, 400)  # neighbouring seeds: the hardest ones
    flat = uniform_BC.flatten().sort().values
    n = len(flat)
    distance = float((flat - (torch.arange(n) + 0.5) / n).abs().max())
    assert distance < 2.2 / n**0.5  # Kolmogorov and Smirnov: exceeded once in 8,000
    assert len(flat.unique()) == n
    centred_BC = uniform_BC - 0.5
    for a, b in ((centred_BC[:, 1:], centred_BC[:, :-1]), (centred_BC[1:], centred_BC[:-1])):
        correlation = float((a * b).mean() * 12)
        assert abs(correlation) < 5 / n**0.5
    assert float(uniform_BC.mean(1).sub(0.5).abs().max()) < 5 / (12 * 400) ** 0.5
    assert float(uniform_BC.mean(0).sub(0.5).abs().max()) < 5 / (12 * 400) ** 0.5
