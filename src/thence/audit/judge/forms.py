"""The form of an update that says something of the trainer by itself: merged adapters, orthogonal matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from thence.audit.solve.recover import spacing_of

LOW = 0.75
"""A merged adapter has at most that share of a matrix's full rank."""
FLAT, NEAR = 0.75, 0.5
"""Of an orthogonalised matrix that share of the singular values that are not zero is near their median: no further from
it than that share of it."""
EXACT = 20
"""With fewer bits of mantissa the rank of an update is that of its rounding."""


def merged(before: Mapping[str, Tensor], after: Mapping[str, Tensor], bits: int) -> str:
    """Why an update looks like a merged LoRA adapter, a sentence; empty: it does not.

    Nothing moved but matrices, each by a matrix of low rank, while other tensors (norms, embeddings) stayed.

    Args:
        before, after: parameters around the step, by name.
        bits: mantissa of the stored parameters.
    """
    moved = [name for name in before if name in after and not before[name].equal(after[name])]
    if bits < EXACT or not moved or len(moved) == len(before) or any(before[name].ndim != 2 for name in moved):
        return ""
    ranks = []
    for name in moved:
        new = after[name].double().numpy()
        values = np.linalg.svd(before[name].double().numpy() - new, compute_uv=False)
        noise = float(np.linalg.norm(spacing_of(new, bits))) / np.sqrt(12)
        rank = int((values > max(3 * noise, 1e-6 * values[0])).sum())
        if not 0 < rank <= LOW * min(new.shape):
            return ""
        ranks.append(rank)
    return (
        f"the update looks like a merged LoRA adapter of rank {max(ranks)}: {len(moved)} of {len(before)} parameters "
        f"moved, all of them matrices, each by a matrix of rank {max(ranks)} at most. What its factors were is not "
        "known; save the adapter itself instead of the merged model (adapter_config.json, adapter_model.safetensors)"
    )


def form_of(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """What kind of optimizer makes such an update, in words; empty: nothing is known."""
    flat, matrices = 0, 0
    for name in before:
        if name not in after or before[name].ndim != 2 or min(before[name].shape) < 8:
            continue
        values = np.linalg.svd((before[name].double() - after[name].double()).numpy(), compute_uv=False)
        values = values[values > 1e-3 * values[0]] if values[0] > 0 else values[:0]
        if len(values) < 8:
            continue
        matrices += 1
        flat += bool((np.abs(values / np.median(values) - 1) < NEAR).mean() > FLAT)
    if matrices and flat >= 0.5 * matrices:
        return (
            f"in {flat} of {matrices} matrices it is orthogonal, as Muon, Shampoo or SOAP make it; audit the same "
            "program with SGD or AdamW, or its step with thence.audit.check, which sees the gradients"
        )
    return ""
