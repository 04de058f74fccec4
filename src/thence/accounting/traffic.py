"""Bytes that one rank sends in one optimizer step, planned: every line with the arithmetic that it came from.

Counted for collectives that run in a ring, as NCCL does for large tensors: a rank sends all of a tensor but its own
part in a gather or a scattered sum, and twice that in a sum that every rank gets. What a shard is padded with, and the
few hundred bytes of counts and norms, are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from thence.accounting.flops import Counts, recomputed_layers
from thence.accounting.memory import Held


@dataclass(frozen=True, slots=True)
class Sent:
    """One kind of message."""

    name: str
    bytes: int
    arithmetic: str
    between: tuple[int, int] = (1, 1)
    """The ring that it goes round: how many ranks, and how far two neighbours lie apart."""
    overlaps: bool = False
    """Whether it can go on while the passes compute: FSDP2 sends a layer's weights and gradients beside the next."""
    each_batch: bool = False
    """Once a batch of rollouts, and not once an optimizer step."""


def step_traffic(counts: Counts, held: Held, ranks: int, passes: int) -> tuple[Sent, ...]:
    """What one rank sends in an optimizer step.

    A cut policy gathers every weight for a forward pass. With ``reshard`` it gathers the layers once more for the
    backward pass; embedding, norm and head stay from one to the other.

    Args:
        ranks: all of them; copies of a policy that is cut within groups lie on ``ranks / held.parts`` groups.
        passes: forward and backward passes of the step, equally many on each rank.
    """
    trained = held.adapters or counts.total
    wide = max(held.width, 4)
    if not held.cut:
        return (_sum("gradients", trained, held.width, ranks, 1),) if ranks > 1 else ()
    every, root = counts.total + held.adapters, counts.embedding + counts.head + counts.hidden
    sums = passes if held.sum_every_pass else 1
    lines = [_part("weights, forward", every, held.compute_bytes, held.parts, passes, True)]
    if held.reshard:
        lines.append(_part("weights, backward", every - root, held.compute_bytes, held.parts, passes, True))
    lines.append(_part("gradients", trained, wide, held.parts, sums, True))
    if (groups := ranks // held.parts) > 1:
        lines.append(_sum("gradients between copies", trained, wide, groups, sums, held.parts, True))
    return tuple(line for line in lines if line.bytes)


def scoring_traffic(counts: Counts, held: Held, passes: int, scored: float) -> tuple[Sent, ...]:
    """Weights that are gathered for passes without gradient: of the policy, and of a reference that is cut as it is.

    Args:
        passes: forward and backward passes of the step.
        scored: how often each row is read.
    """
    times = math.ceil(passes * scored)
    if not (held.cut and times and held.parts > 1):
        return ()
    return (_part("weights, scoring", counts.total + held.adapters, held.compute_bytes, held.parts, times, True),)


def context_traffic(
    counts: Counts, held: Held, tokens: float, checkpointing: bool | int, scored: float = 0
) -> tuple[Sent, ...]:
    """What ranks that share rows swap around attention: queries, keys, values and outputs, and their gradients.

    A rank keeps its own part of each swap. Where there are fewer key and value heads than ranks, they are repeated.

    Args:
        tokens: of this rank in the step.
        scored: how often each row is read without gradient.
    """
    if held.context == 1:
        return ()
    heads = 2 * counts.heads + 2 * max(counts.kv_heads, held.context)
    again = recomputed_layers(counts.layers, checkpointing) / counts.layers
    passes = 2 + again + scored
    each = heads * counts.head_dim * held.compute_bytes
    text = f"{tokens:,.0f} tokens x {counts.layers} layers x {each:,} B x {passes:.3g} passes"
    text += f" x {held.context - 1} / {held.context}"
    size = int(tokens * counts.layers * each * passes * (held.context - 1) / held.context)
    return (Sent("attention over rows that are shared", size, text, (held.context, 1)),)


def sampling_traffic(counts: Counts, held: Held) -> tuple[Sent, ...]:
    """What one rank sends before it samples: its part of the whole weights, in the dtype in which they are trained."""
    if not held.cut or held.parts == 1:
        return ()
    copy = _part("whole copy to sample, once a batch of rollouts", counts.total, held.width, held.parts, 1)
    return (replace(copy, each_batch=True),)


def _part(name: str, numbers: int, size: int, ranks: int, times: int, overlaps: bool = False) -> Sent:
    """A gather, or a sum of which every rank gets its part."""
    text = f"{times:,} x {numbers:,} x {size} B x {ranks - 1} / {ranks}"
    return Sent(name, times * numbers * size * (ranks - 1) // ranks, text, (ranks, 1), overlaps)


def _sum(name: str, numbers: int, size: int, ranks: int, times: int, parts: int = 1, overlaps: bool = False) -> Sent:
    """A sum that every rank gets whole."""
    of = f" / {parts}" if parts > 1 else ""
    text = f"{times:,} x 2 x {numbers:,} x {size} B x {ranks - 1} / {ranks}{of}"
    return Sent(name, times * 2 * numbers * size * (ranks - 1) // (ranks * parts), text, (ranks, parts), overlaps)
