"""The matrix: one setting cannot tell two rules apart, so the same examples are cut in many ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from thence.audit.adapters._shared import EVALUATED, RESUMED, SAVED
from thence.audit.result import Case
from thence.errors import UserError

AXES = {
    "ranks": "two data-parallel ranks",
    "incomplete": "a last window that is not full",
    "epochs": "windows at the edge of an epoch",
    "adamw": "AdamW instead of SGD",
    "bfloat16": "weights and arithmetic in bfloat16",
    "autocast": "float32 weights, arithmetic in bfloat16",
    "packing": "rows laid end to end",
    "checkpointing": "activation checkpointing",
    "label_smoothing": "label smoothing",
    "resume": "a checkpoint from which training starts again",
    "saved": "a model that it saves",
    "evaluation": "an evaluation of its own that reports a loss",
}
"""What a stack may have or lack; an adapter names those it has in ``AXES``."""


def matrix() -> list[tuple[str | None, Case]]:
    """Every case of the default matrix with the axis it needs (None: none)."""
    return [
        (None, Case("micro 8 x 1", 8, 1, quick=True)),
        (None, Case("micro 2 x 4", 2, 4, quick=True)),
        (None, Case("micro 4 x 2", 4, 2)),
        (None, Case("micro 1 x 8", 1, 8)),
        ("ranks", Case("micro 2 x 2, 2 ranks", 2, 2, ranks=2, quick=True)),
        ("ranks", Case("micro 4 x 1, 2 ranks", 4, 1, ranks=2)),
        ("ranks", Case("micro 1 x 4, 2 ranks", 1, 4, ranks=2)),
        ("epochs", Case("three steps, micro 2 x 2", 2, 2, epochs=2, steps=3, lr=0.1, quick=True)),
        ("incomplete", Case("7 examples, micro 2 x 4", 2, 4, examples=7)),
        ("incomplete", Case("5 examples, micro 1 x 4", 1, 4, examples=5, steps=2, lr=0.1)),
        ("epochs", Case("epoch edge: 10 examples, micro 2 x 4", 2, 4, examples=10, epochs=2, steps=3, lr=0.1)),
        ("ranks", Case("7 examples, micro 1 x 4, 2 ranks", 1, 4, ranks=2, examples=7)),
        ("adamw", Case("AdamW, micro 2 x 4", 2, 4, optimizer="adamw", lr=1e4, eps=1e4)),
        ("checkpointing", Case("checkpointing, micro 2 x 4", 2, 4, checkpointing=True)),
        ("packing", Case("packing, micro 1 x 1", 1, 1, packing=True)),
        ("label_smoothing", Case("label smoothing 0.1, micro 2 x 4", 2, 4, label_smoothing=0.1)),
        ("bfloat16", Case("bfloat16, micro 2 x 4", 2, 4, precision="bfloat16")),
        ("autocast", Case("bfloat16 autocast, micro 2 x 4", 2, 4, precision="autocast")),
        ("resume", Case("resume after 2 of 5 steps", 2, 2, **RESUMED)),
        ("saved", Case("what is saved after 2 steps", 2, 2, **SAVED)),
        ("evaluation", Case("evaluation in batches of 2", 2, 4, **EVALUATED)),
    ]


def cases_for(
    axes: Iterable[str], own: Iterable[Case] = (), *, quick: bool = False, extra: bool = False
) -> list[tuple[Case, str]]:
    """The cases of a stack, each with the reason why it is left out (empty: it runs).

    Args:
        axes: what the stack has, keys of :data:`AXES`.
        own: the stack's own cases, run after the common ones; one with the name of a common one takes its place.
        quick: the four that matter most, and those of the stack's own that are marked so.
        extra: also those of the stack's own that nobody has by default.
    """
    have, own = set(axes), tuple(own)
    names = {case.name for case in own}
    chosen = [
        (case, "" if axis is None or axis in have else f"this stack lacks {AXES[axis]}")
        for axis, case in matrix()
        if case.name not in names
    ]
    chosen += [(case, "") for case in own if extra or not case.extra]
    return [(case, reason) for case, reason in chosen if case.quick or not quick]


def named_like(cases: Sequence[tuple[Case, str]], parts: Sequence[str]) -> Sequence[tuple[Case, str]]:
    """The cases that have one of the parts in their names; all without parts.

    Raises:
        UserError: there is none.
    """
    chosen = [(case, reason) for case, reason in cases if not parts or any(part in case.name for part in parts)]
    if not chosen:
        names = ", ".join(repr(case.name) for case, _ in cases)
        raise UserError(
            f"no case has {' or '.join(map(repr, parts))} in its name", remedy=f"the cases are {names}", field="only"
        )
    return chosen
