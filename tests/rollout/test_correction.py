"""Truncated importance sampling: the bound, and the mean that it estimates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thence.rollout.correction import truncated_importance


def test_truncated_importance_is_the_ratio_up_to_the_bound() -> None:
    trainer = torch.tensor([-1.0, -1.0, -2.0, -0.1, 0.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -1.5, -1.0, -3.0, -1000.0])
    weights = truncated_importance(trainer, sampler)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(0.5), math.exp(-1.0), 2.0, 2.0]))
    assert not weights.requires_grad
    with pytest.raises(ValueError, match="shapes"):
        truncated_importance(trainer, sampler[:3])
    with pytest.raises(ValueError, match="finite"):
        truncated_importance(trainer, torch.full((5,), -math.inf))
    with pytest.raises(ValueError, match="bound"):
        truncated_importance(trainer, sampler, bound=0.0)


@pytest.mark.parametrize("bound", [0.3, 1.0, 1.01, 1.05, 1.25, 1.5, 2.0, 3.0, 7.7, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_at_the_bound_is_the_bound_itself_so_that_it_can_be_counted(bound: float, dtype: torch.dtype) -> None:
    ratios = torch.tensor([bound * 1.001, bound * 3, bound * 0.99, math.inf], dtype=torch.float64)
    trainer = torch.cat([ratios[:3].log(), torch.tensor([500.0], dtype=torch.float64)]).to(dtype)
    weights = truncated_importance(trainer, torch.zeros(4, dtype=dtype), bound)
    assert (weights >= bound).tolist() == [True, True, False, True]
    assert weights.max().item() == torch.tensor(bound, dtype=dtype).item()


@given(st.integers(2, 6), st.integers(0, 1000), st.sampled_from([0.5, 1.0, 2.0, 100.0]))
def test_truncated_importance_makes_the_sampler_s_mean_that_of_the_trainer(n: int, seed: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    trainer, sampler = (torch.log_softmax(torch.randn(n, generator=generator).double(), -1) for _ in range(2))
    value = torch.randn(n, generator=generator).double()
    weights = truncated_importance(trainer, sampler, bound)
    ratio = (trainer - sampler).exp()
    assert weights.max() <= bound
    torch.testing.assert_close(weights, ratio.clamp(max=bound))
    if ratio.max() <= bound:
        torch.testing.assert_close((sampler.exp() * weights * value).sum(), (trainer.exp() * value).sum())
