"""Where C finds a tensor's numbers, once it is sure that they are what the function expects."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """The address of a tensor's first number. The tensor must live as long as C uses it.

    Raises:
        TypeError: other numbers, another device or gaps: C would read and write beside the tensor.
    """
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        kind = "contiguous" if tensor.is_contiguous() else "with gaps"
        raise TypeError(
            f"a C kernel takes contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device.type}, {kind}"
        )
    return tensor.data_ptr()
