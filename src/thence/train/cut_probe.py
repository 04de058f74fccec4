"""Whether ranks together get the gradient that one process gets, tried before the first step.

The policy may be cut over ranks, or its rows, or both. The first rank takes the gradient of a few rows with the whole
model. Then all ranks take it together, each of its own rows, or its piece of them. Two sums of every parameter's
gradient are compared: of squares, and of its entries. A factor, a rank that is left out, a weight that is no longer
tied: each changes one of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from thence.errors import UserError
from thence.models.probing import tolerance
from thence.objective import local_counts
from thence.train.parallel import Ranks, SingleProcess
from thence.train.policy import Policy
from thence.train.probe import need_memory, probe_batch
from thence.train.step import StepSettings, accumulate_gradients

Sums = dict[str, tuple[float, float]]
"""By parameter: the Euclidean norm of its gradient, and the sum of the gradient's entries."""


def gradient_sums(policy: Policy, ranks: Ranks | None = None) -> Sums:
    """The sums of the probe's gradient over all ranks, on every rank. The gradient is thrown away.

    Raises:
        NotVerified: there is no memory for a gradient of the whole model.
    """
    ranks = ranks or SingleProcess()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    if ranks.world == 1:  # of a policy that is cut, each rank has memory for its part
        need_memory(sum(p.numel() * p.element_size() for p in trained.values()), policy.device)
    whole = probe_batch(policy.model)
    batch = replace(whole, rows=whole.rows[ranks.rank :: ranks.world])
    dtype = next(policy.model.parameters()).dtype
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    settings = StepSettings(micro_batch_tokens=24, packing=ranks.context is not None, compute_dtype=dtype)
    accumulate_gradients(policy, optimizer, batch, local_counts(whole), settings, ranks)
    ranks.sum_gradients(trained.values())
    found = torch.zeros(len(trained), 2, dtype=torch.float64)
    for i, parameter in enumerate(trained.values()):
        gradient = parameter.grad
        if gradient is not None:
            own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            found[i, 0], found[i, 1] = own.double().square().sum().item(), own.double().sum().item()
        parameter.grad = None
    summed = ranks.sum_shards(found)
    return {name: (squares**0.5, entries) for name, (squares, entries) in zip(trained, summed.tolist(), strict=True)}


def check_cut(policy: Policy, ranks: Ranks, expected: Sums, dtype: torch.dtype) -> None:
    """Make sure that the ranks get the gradient that one of them got of whole rows with the whole model.

    Args:
        expected: :func:`gradient_sums` of the whole model.
        dtype: of the computation.

    Raises:
        UserError: some parameter gets another gradient.
    """
    found = gradient_sums(policy, ranks)
    largest = max(norm for norm, _ in expected.values())
    allowed = 10 * tolerance(dtype, policy.device)
    for name, (norm, entries) in expected.items():
        size = next(p.numel() for n, p in policy.model.named_parameters() if n == name)
        off = max(abs(found[name][0] - norm), abs(found[name][1] - entries) / size**0.5)
        if not off <= allowed * max(norm, 1e-3 * largest):
            field = "parallel" if ranks.context is None else "sharding.context"
            remedy = 'set parallel = "ddp", where every rank holds the whole model, and please report this model'
            raise UserError(
                f"{type(policy.model).__name__}, cut over {ranks.world} ranks: {name} would get a wrong gradient, "
                f"off by {off / max(norm, 1e-30):.1g}",
                remedy=remedy if ranks.context is None else "set sharding.context = 1, and please report this model",
                field=field,
            )
