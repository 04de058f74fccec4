"""Whether the batches of a method can be composed before the steps before them are taken (``rl.ahead``).

A batch can, if composing it looks at nothing that training changes. A pool of earlier responses, a buffer of unsolved
prompts or a coin that follows from gradient norms would hold what it held some steps before. And every token that the
policy sampled must have the log-probability that it was sampled with, or nothing could weigh it.
"""

from __future__ import annotations

from thence.methods.base import Method

CARRYING = ("compose", "side_steps", "take_up", "took_step", "state", "restore")
"""Parts of a method that may carry something from one batch to another."""


def why_not_ahead(method: type[Method]) -> str | None:
    """Why a method cannot be trained with ``rl.ahead``, as a part of a sentence; None: it can.

    What a class above states does not speak of what this one composes, or keeps from step to step.
    """
    owners = method.__mro__
    said = next((i for i, owner in enumerate(owners) if "not_ahead" in vars(owner)), len(owners))
    does = min(i for part in CARRYING for i, owner in enumerate(owners) if part in vars(owner))
    if method.not_ahead is None or said > does:
        return "the method does not state whether its batches can be composed ahead (not_ahead)"
    return method.not_ahead or None
