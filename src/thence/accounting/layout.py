"""How ranks share a model: the layouts, and which of them ``parallel = "auto"`` means. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

Layout = Literal["none", "ddp", "fsdp2", "hsdp"]
"""One process; a whole copy on every rank; cut over all ranks; cut within groups of ranks."""
FITS = 0.6
"""Of a device's memory for weights, gradients and moments; the rest is for activations."""


def weight_bytes(compute_dtype: str) -> int:
    """Bytes of a master weight, of its gradient and of each of its moments."""
    return 8 if compute_dtype == "float64" else 4


def choose_layout(parallel: str, ranks: int, state_bytes: float, device_bytes: float) -> Layout:
    """The layout of training that a recipe's ``parallel`` means: ``auto`` cuts what a device cannot hold whole.

    Args:
        ranks: processes that share each step.
        state_bytes: weights, gradients and both moments, whole.
        device_bytes: memory of one rank.
    """
    if parallel != "auto":
        return "none" if ranks == 1 and parallel == "ddp" else parallel  # pyright: ignore[reportReturnType]
    if ranks == 1:
        return "none"
    return "ddp" if state_bytes <= FITS * device_bytes else "fsdp2"


def is_cut(layout: Layout) -> bool:
    """Whether a rank holds a part of every weight."""
    return layout in ("fsdp2", "hsdp")


def parts_of(layout: Layout, ranks: int, replicas: int) -> int:
    """Over how many ranks one copy of the weights is cut."""
    return {"fsdp2": ranks, "hsdp": max(ranks // replicas, 1)}.get(layout, 1)
