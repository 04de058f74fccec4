"""Whether a model is still a model: no weight, no optimizer moment and no logit that is NaN or infinite.

A step is refused where its loss or gradient is not finite, but the update itself can overflow, and the last step of a
stage has no next one that would notice. So this is asked before a checkpoint and before a model is published or used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thence.models.probing import probe_tokens
from thence.objective import BareRow
from thence.train.micro_batches import lay_out
from thence.train.policy import Policy

PROBED = 8  # tokens whose logits are looked at


def broken_weights(named: Iterable[tuple[str, Tensor]], most: float = math.inf) -> str | None:
    """The first of these tensors that holds NaN or infinity, in words; None where all are finite.

    Args:
        most: the largest value that a matrix may hold besides.
    """
    for name, value in named:
        own = value.to_local().detach() if isinstance(value, DTensor) else value.detach()  # of shards, this rank's
        if not own.is_floating_point() or not own.numel():
            continue
        largest = torch.linalg.vector_norm(own, ord=math.inf).item()
        if not math.isfinite(largest):
            return f"{name} holds {'NaN' if math.isnan(largest) else 'infinity'}"
        if largest > most and value.ndim > 1:
            return f"{name} holds {largest:.1g}"
    return None


def broken(policy: Policy, tensors: Mapping[str, Tensor] | None = None) -> str | None:
    """What of a policy, or of the optimizer's tensors, is not finite, in words; None where all is well.

    Weights whose squares overflow (norms then hide them) count too, and so do logits that do. All ranks that share
    weights call it; each looks at its part.
    """
    has_logits = _has_logits(policy)
    found = broken_weights(policy.model.named_parameters(), torch.finfo(torch.float32).max ** 0.5)
    if found is None and tensors:
        found = broken_weights((f"the optimizer's {name}", value) for name, value in tensors.items())
    return found or (None if has_logits else "its logits are not finite")


@torch.no_grad()
def _has_logits(policy: Policy) -> bool:
    """Whether the model gives a distribution over tokens; minus infinity is a logit, of a token that never comes."""
    token_ids = probe_tokens(policy.model, PROBED)
    if not policy.sharded:
        logits = policy.model(input_ids=token_ids[None], use_cache=False).logits
        return bool((logits < math.inf).all())
    trained = torch.arange(PROBED) > 0
    micro = lay_out([BareRow(token_ids.cpu(), trained)], False, policy.device)
    logp_T, _ = policy.statistics(micro)
    policy.settle()
    return not bool(logp_T.isnan().any())
