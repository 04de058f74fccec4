"""The order in which examples are trained: a function of seed, epoch and step, so that resuming needs no state."""

from __future__ import annotations

import hashlib
import math
import random
from functools import lru_cache


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same on every machine and Python version."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=4)  # every step of an epoch asks for the same one
def epoch_order(n: int, seed: int | None, epoch: int) -> tuple[int, ...]:
    """A permutation of ``range(n)`` for one epoch. A seed of None leaves the order as it is, in every epoch."""
    if seed is None:
        return tuple(range(n))
    order = list(range(n))
    random.Random(stable_seed("order", seed, epoch)).shuffle(order)
    return tuple(order)


def steps_per_epoch(n: int, batch: int) -> int:
    """Optimizer steps in one pass; the last, smaller batch counts too."""
    return math.ceil(n / batch)


def batch_at(n: int, batch: int, seed: int | None, step: int) -> list[int]:
    """The examples of one optimizer step, counted from 0; a batch never reaches across two epochs."""
    epoch, position = divmod(step, steps_per_epoch(n, batch))
    return list(epoch_order(n, seed, epoch)[position * batch : (position + 1) * batch])


def drawn_from(n: int, position: int, count: int, seed: int | None) -> list[int]:
    """``count`` examples from a position in the epochs' orders laid end to end, so that all come equally often."""
    result: list[int] = []
    while len(result) < count:
        epoch, offset = divmod(position + len(result), n)
        result += epoch_order(n, seed, epoch)[offset : offset + count - len(result)]
    return result
