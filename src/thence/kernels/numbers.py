"""What the self-tests of the kernels are fed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plain_numbers(*shape: int, place: int = 0) -> Tensor:
    """Float32 numbers between -1 and 1 that follow from shape and ``place``: a self-test must not draw from a run's
    generators."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) * (1.7 + place)).reshape(shape)
