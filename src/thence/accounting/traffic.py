"""Bytes that one rank sends in one optimizer step, planned: every line with the arithmetic that it came from.

Counted for collectives that run in a ring, as NCCL does for large tensors: a rank sends all of a tensor but its own
part in a gather or a scattered sum, and twice that in a sum that every rank gets. What a shard is padded with, and the
few hundred bytes of counts and norms, are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from thence.accounting.flops import Counts
from thence.accounting.memory import Held


@dataclass(frozen=True, slots=True)
class Sent:
    """One kind of message."""

    name: str
    bytes: int
    arithmetic: str


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
    lines = [_part("weights, forward", every, held.compute_bytes, held.parts, passes)]
    if held.reshard:
        lines.append(_part("weights, backward", every - root, held.compute_bytes, held.parts, passes))
    lines.append(_part("gradients", trained, wide, held.parts, sums))
    if (groups := ranks // held.parts) > 1:
        lines.append(_sum("gradients between copies", trained, wide, groups, sums, held.parts))
    return tuple(line for line in lines if line.bytes)


def sampling_traffic(counts: Counts, held: Held) -> tuple[Sent, ...]:
    """What one rank sends before it samples: its part of the whole weights, in the dtype in which they are trained."""
    if not held.cut or held.parts == 1:
        return ()
    return (_part("whole copy to sample, once a batch of rollouts", counts.total, held.width, held.parts, 1),)


def _part(name: str, numbers: int, size: int, ranks: int, times: int) -> Sent:
    """A gather, or a sum of which every rank gets its part."""
    text = f"{times:,} x {numbers:,} x {size} B x {ranks - 1} / {ranks}"
    return Sent(name, times * numbers * size * (ranks - 1) // ranks, text)


def _sum(name: str, numbers: int, size: int, ranks: int, times: int, parts: int = 1) -> Sent:
    """A sum that every rank gets whole."""
    of = f" / {parts}" if parts > 1 else ""
    text = f"{times:,} x 2 x {numbers:,} x {size} B x {ranks - 1} / {ranks}{of}"
    return Sent(name, times * 2 * numbers * size * (ranks - 1) // (ranks * parts), text)
