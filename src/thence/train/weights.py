"""The one seam between a policy and its weights as everybody else knows them: whole tensors under the model's names.

A policy may be cut over ranks, and have adapters. Who samples, publishes or hands weights to another process asks here
for whole ones, adapters merged: ``W + scale B A`` in the dtype of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thence.train.lora import has_adapters, places_of, trained_tensors
from thence.train.policy import Policy


def named_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer that a checkpoint keeps, once, by its first name; shards as shards.

    Of a model with adapters, what is trained: everything else is in the model that training started from.
    """
    if has_adapters(model):
        yield from trained_tensors(model).items()
        return
    yield from _all_parts(model)


def _all_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers as the plain model has them, one at a time. All ranks iterate to the end.

    Gathering shards is done by all ranks together. Weights that are kept in 4 bits come as the numbers that the policy
    computes with, in float32.
    """
    places = places_of(policy.model)
    for name, part in _all_parts(policy.model):
        if (plain := places.plain(name)) is None:
            continue
        packed, merge = places.quantized(name), places.merge(name)
        value = _whole(part.detach()) if packed is None else packed.dequantized()
        yield plain, value if merge is None else merge.into(value, _whole)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def whole(policy: Policy, *, first_rank_only: bool = False) -> Iterator[Any]:
    """A plain Hugging Face model that holds the policy's weights as they stand. All ranks enter and leave together.

    A policy that is not cut and has no adapters gives its own model. Otherwise a copy is held while this lasts: of all
    weights, or, of a policy that is not cut, of those that an adapter changes.

    Args:
        first_rank_only: the other ranks get None, and the copy is in host memory: for writing files.
    """
    if policy.skeleton is None:
        yield policy.model
        return
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    leads = not (first_rank_only and ranks) or torch.distributed.get_rank() == 0
    tensors = named_weights(policy)
    if not leads:
        for _ in tensors if policy.sharded else ():
            pass
        yield None
        return
    device = torch.device("cpu") if first_rank_only else policy.device
    found = {name: value.to(device) for name, value in tensors}
    # a rank that was sent its weights has no buffers in the skeleton either
    places = places_of(policy.model)
    buffers = ((places.plain(name), value) for name, value in policy.model.named_buffers())
    found |= {name: value.to(device) for name, value in buffers if name is not None}
    empty = fill(policy.skeleton, found)
    try:
        yield policy.skeleton
    finally:
        fill(policy.skeleton, empty)


def skeleton_of(model: nn.Module) -> Any:
    """A copy of the model without its weights: parameters on the meta device, shared ones still shared."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put these tensors in the place of the model's own, without a copy; what is shared stays shared.

    Args:
        tensors: parameters and buffers, by their first names.

    Returns:
        What stood there before.

    Raises:
        KeyError: a name that the model has not.
    """
    before: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    made: dict[int, Tensor] = {}
    for name, value in tensors.items():
        old = before[name]
        made[id(old)] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
    for owner in model.modules():
        for table in (owner._parameters, owner._buffers):
            for name, old in table.items():
                if old is not None and id(old) in made:
                    table[name] = made[id(old)]  # pyright: ignore[reportArgumentType]
    return {name: before[name] for name in tensors}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter, and the first name of the same one."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
