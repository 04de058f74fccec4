"""A policy cut over ranks by PyTorch's FSDP2: each rank holds a part of every weight, gradient and optimizer moment.

What FSDP does by default is an average; a step of thence is a sum, so the divisor is set to 1. Every rank makes equally
many passes, since the ranks gather weights together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from thence.errors import UserError, first_line
from thence.explain import is_of_system
from thence.models.layers import layers_of
from thence.train.parallel.context import ContextGroup
from thence.train.parallel.ranks import DataParallel, local_norm


@dataclass(frozen=True)
class ShardLayout:
    """How a policy is cut. The update does not depend on it, memory and speed do.

    Args:
        replicas: groups of ranks that each hold a whole copy, cut within the group (HSDP); 1: one copy over all ranks.
        compute_dtype: weights are gathered in it; shards and the sums of gradients stay as the weights are.
        reshard_after_forward: free weights after the forward pass, gather them again for the backward pass.
        sum_every_pass: reduce gradients after every backward pass; otherwise after the last one, from whole gradients.
        offload: shards, gradients and the optimizer's step are in host memory.
    """

    replicas: int = 1
    compute_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True
    sum_every_pass: bool = True
    offload: bool = False


class Sharded(DataParallel):
    """Ranks whose policy is cut by :func:`shard`. FSDP has summed the gradients when the last backward pass ends.

    Args:
        mesh: of one dimension, or of two: replicas by shards.
        context: the ranks that share rows with this one.
    """

    def __init__(self, device: torch.device, mesh: DeviceMesh, context: ContextGroup | None = None):
        super().__init__(device, context=context)
        self.mesh = mesh
        self._within = mesh.get_group(mesh.ndim - 1)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def sum_shards(self, values: Tensor) -> Tensor:
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total, group=self._within)  # of one replica: the others hold the same parts
        return total.cpu()

    def global_norm(self, gradients: Sequence[Tensor]) -> float:
        parts = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        return float(self.sum_shards(torch.tensor(local_norm(parts) ** 2, dtype=torch.float64)).sqrt())

    def equal_passes(self, passes: int) -> int:
        most = torch.tensor([passes], dtype=torch.int64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def make_mesh(device: torch.device, world: int, replicas: int) -> DeviceMesh:
    """The ranks in a line, or replicas by shards.

    Raises:
        UserError: the ranks cannot be dealt evenly to so many replicas.
    """
    if world % replicas:
        raise UserError(
            f"{world} ranks cannot be dealt evenly to {replicas} replicas",
            remedy="set sharding.replicas to a divisor of the number of ranks",
            field="sharding.replicas",
        )
    if replicas == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def shard(policy: Any, ranks: DataParallel, sharding: ShardLayout) -> Sharded:
    """Cut the policy in place: every layer of the model by itself, everything else (embedding, norm, head) together.

    Weights come from the first rank, one layer at a time; on the others they may be on the meta device.

    Args:
        policy: a :class:`~thence.train.policy.Policy` of a whole model, checked; its adapters are in place.
        ranks: all of them call this.

    Returns:
        The ranks that the policy is trained with from now on.

    Raises:
        UserError: FSDP cannot cut this model.
    """
    mesh = make_mesh(ranks.device, ranks.world, sharding.replicas)
    cast = sharding.compute_dtype if sharding.compute_dtype in (torch.bfloat16, torch.float16) else None
    precision = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=None if cast is None else torch.float32)
    offload = CPUOffloadPolicy() if sharding.offload and ranks.device.type != "cpu" else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for module in (*layers_of(policy.model), policy):
        materialise(module, ranks.device)
        # FSDP keeps the root when it is not told: the backward pass starts with the head
        free = None if module is policy and sharding.reshard_after_forward else sharding.reshard_after_forward
        _cut(module, type(policy.model).__name__, {**options, "reshard_after_forward": free})
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum over ranks, not their average
            module.set_force_sum_reduction_for_comms(True)
    policy.sum_every_pass = sharding.sum_every_pass
    register_fsdp_forward_method(policy, "statistics")
    register_fsdp_forward_method(policy, "beside")
    return Sharded(ranks.device, mesh, ranks.context)


def _cut(module: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Cut one module. Raises UserError: FSDP cannot. Lack of memory and lost ranks are raised as they are."""
    try:
        fully_shard(module, **options)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError | dist.DistError) or is_of_system(error):
            raise
        raise UserError(
            f"{name} cannot be cut over ranks: {first_line(error)}",
            remedy='set parallel = "ddp", where every rank holds the whole model',
            field="parallel",
        ) from error


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give the module the first rank's weights and buffers, on the device; what is cut already is left alone.

    A tensor that several modules share stays shared.
    """
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, old in table.items():
                if old is None or isinstance(old, DTensor):
                    continue
                if id(old) not in made:
                    made[id(old)] = _from_first_rank(old, device)
                table[name] = made[id(old)]  # pyright: ignore[reportArgumentType]


def _from_first_rank(tensor: Tensor, device: torch.device) -> Tensor:
    real = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device).contiguous()
    dist.broadcast(real, src=0)
    return nn.Parameter(real, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real
