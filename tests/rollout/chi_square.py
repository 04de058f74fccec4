"""The distance of counts from a distribution."""

from __future__ import annotations

import torch


def chi_square(counts_V: torch.Tensor, p_V: torch.Tensor) -> float:
    expected_V = p_V.double() * counts_V.sum()
    return float(((counts_V - expected_V).square() / expected_V).sum())
