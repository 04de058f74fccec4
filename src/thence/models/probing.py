"""What checks of a model share: tokens to try it on, windows made short, and when numbers count as equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WINDOW = 8
WINDOW_FIELDS = (
    *("sliding_window", "attention_chunk_size", "window_size", "local_window", "sliding_window_size"),
    *("index_topk", "indexer_budget", "index_topk_blocks"),  # attention to the keys that an indexer picks
)


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest ‖found - expected‖ / ‖expected‖ over the vectors of the last dimension; infinity for NaN."""
    found, expected = found.double(), expected.double()
    size = torch.linalg.vector_norm(expected, dim=-1).clamp(min=1e-30)
    value = (torch.linalg.vector_norm(found - expected, dim=-1) / size).max().item()
    return value if value == value else float("inf")


def tolerance(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """What rounding may do to hidden states, relative to their size.

    A GPU may multiply float32 matrices in TF32. Many models take their softmax, norms or angles in float32 whatever the
    dtype of their weights.
    """
    if dtype == torch.float64:
        return 1e-6
    if dtype == torch.float32:
        return 1e-4 if device is None or device.type == "cpu" else 5e-3
    return 5e-2


MOST_ROUNDING = 5e-3
"""The largest relative difference that is ever taken for rounding in float32."""


@contextmanager
def nudged(model: Any) -> Iterator[None]:
    """While it lasts, every number of the input embeddings is off by one rounding, up or down.

    What that does to a result says how far two orders of the same sums may part in this model: trained models with a
    few very large hidden numbers make roundings a thousand times larger.
    """
    generator = torch.Generator().manual_seed(0)

    def off(module: nn.Module, given: Any, found: Tensor) -> Tensor:
        signs = torch.randint(0, 2, found.shape, generator=generator) * 2 - 1
        return found * (1 + torch.finfo(found.dtype).eps * signs.to(found))

    hook = model.get_input_embeddings().register_forward_hook(off)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def short_windows(model: nn.Module) -> Iterator[int | None]:
    """Make every attention window, chunk and choice of keys short, for a check on short rows.

    Gives the shortest window that was longer, or None where there was none.
    """
    holders: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            holders |= {id(config): config, id(text): text}
    before = []
    for holder in holders.values():
        for field in WINDOW_FIELDS:
            size = getattr(holder, field, None)
            if isinstance(size, int) and not isinstance(size, bool) and size > WINDOW:
                before.append((holder, field, size))
    try:
        for holder, field, _ in before:
            setattr(holder, field, WINDOW)
        yield min((size for _, _, size in before), default=None)
    finally:
        for holder, field, size in before:
            setattr(holder, field, size)


def probe_tokens(model: Any, count: int) -> Tensor:
    """So many different tokens of the model's vocabulary, shape (count,)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    return (torch.arange(count, device=device) * 7919 + 3) % vocabulary
