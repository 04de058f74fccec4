"""Tokens and rows whose gradient did not arrive: which are they, and what have they in common?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from thence.audit.judge.weights import StepWeights
from thence.audit.result import Finding

LUCK = 0.01
"""Lost tokens share their ids by a rule if fewer random draws than this share would look the same."""
DRAWS = 2000
PART = {
    "first-only": "only the first micro-batch",
    "last-only": "only the last micro-batch",
    "first-and-last-only": "only the first and the last micro-batch",
    "all-but-first": "every micro-batch but the first",
    "all-but-last": "every micro-batch but the last",
}
"""Findings of micro-batches that did not arrive: which did."""


@dataclass(frozen=True)
class Shift:
    """A loss mask that lies some places too early: prompt tokens are trained and as many at the end are not.

    Args:
        lost: response targets without weight, shape (targets,), bool.
        trained: prompt targets with one, shape (targets,), bool.
        finding: that says so.
    """

    lost: np.ndarray
    trained: np.ndarray
    finding: Finding


def early_mask(step: StepWeights, found: Collection[str]) -> Shift | None:
    """Whether the trained tokens are those of every response, all moved by the same number of places.

    Args:
        found: ids of what was found of the roles.
    """
    if "prompt-trained" not in found:
        return None
    trained = (step.role == "prompt") & ~step.nothing
    lost = step.response & step.nothing
    from_end = _places(step, step.response, backwards=True)
    of_prompt = _places(step, step.role == "prompt", backwards=True)
    by = int(trained[step.piece >= 0].sum()) // max(len(step.pieces), 1)
    if by == 0 or not step.zero(lost):
        return None
    shifted = (trained == ((step.role == "prompt") & (of_prompt < by))).all()
    if not shifted or not (lost == (step.response & (from_end < by))).all():
        return None
    places, prompt, end = (
        ("one place", "the last token of every prompt is trained", "the last one of every response is not")
        if by == 1
        else (f"{by} places", f"the last {by} tokens of every prompt are trained", "those of every response are not")
    )
    detail = f"the loss mask is shifted by {places} to the front: {prompt}, and {end}"
    return Shift(lost, trained, Finding("tokens-dropped", "fault", detail))


def dropped_tokens(
    step: StepWeights, lost: np.ndarray, seen: np.ndarray, said: np.ndarray, texts: Sequence[str]
) -> tuple[Finding, bool]:
    """Name what tokens without weight have in common; whether their places say it, those of ``said`` included.

    Args:
        lost: response targets without weight, shape (targets,), bool.
        seen: all response targets that are looked at, those included.
        said: targets of which another finding says that they have none (every first or every last one).
        texts: of the tokens, by id.
    """
    place = _by_place(step, lost, seen & ~lost)
    pattern = place or _by_id(step, lost, seen & ~lost, texts)
    if pattern is None:
        lost, seen = lost & ~said, seen & ~said
        pattern = _by_place(step, lost, seen & ~lost) or _by_id(step, lost, seen & ~lost, texts)
    if pattern is None:
        pattern = "single tokens are not trained, by no rule of place or token, as if drawn at random"
    share = float(step.ideal[lost].sum() / step.ideal[seen].sum())
    count = f"{int(lost.sum())} of {int(seen.sum())} response tokens"
    detail = f"{pattern}: {count} have {step.zero_text(lost)}, {share:.0%} of the gradient asked for"
    return Finding("tokens-dropped", "fault", detail), place is not None


def dropped_rows(step: StepWeights, kept: np.ndarray, dropped: np.ndarray) -> Finding:
    """Name the rows that did not arrive by their place in the step.

    Args:
        kept: pieces with a weight, shape (pieces,), bool.
        dropped: pieces without one.
    """
    micro, rank = step.rows.micro_batch, step.rows.rank
    seen = kept | dropped
    if (micro >= 0).all():
        whole_ranks = ~np.isin(rank, np.unique(rank[dropped]))
        if whole_ranks.any() and len(np.unique(rank)) > 1 and (kept == (whole_ranks & seen)).all():
            detail = f"rows of some ranks arrived only: {step.lost:.0%} of the gradient was lost"
            return Finding("rank-missing", "fault", detail)
        first, last = micro == 0, micro == np.array([micro[rank == r].max() for r in rank])
        for name, expected in (
            ("first-only", first),
            ("last-only", last),
            ("first-and-last-only", first | last),
            ("all-but-first", ~first),
            ("all-but-last", ~last),
        ):
            if (kept == (expected & seen)).all():
                return Finding(name, "fault", part_arrived(name, int(micro.max()) + 1, step.lost))
    mask = step.response & dropped[np.maximum(step.piece, 0)]
    detail = f"{int(dropped.sum())} of {int(seen.sum())} rows have {step.zero_text(mask)}"
    return Finding("rows-dropped", "fault", f"{detail}: {step.lost:.0%} of the gradient was lost")


def part_arrived(name: str, count: int, lost: float) -> str:
    """The detail of a finding that says which micro-batches arrived.

    Args:
        count: micro-batches of a rank.
        lost: share of the gradient.
    """
    return f"{PART[name]} of {count} arrived: {lost:.0%} of the gradient was lost"


def _by_place(step: StepWeights, lost: np.ndarray, kept: np.ndarray) -> str | None:
    """The lost tokens are those behind or before a place of the response or of the row."""
    if not kept.any():
        return None
    of_response = _places(step, step.response)
    of_end = _places(step, step.response, backwards=True)
    of_row = np.array([target.place for target in step.targets])
    for places, unit, where in ((of_response, "response", "a response"), (of_row, "row", "the row")):
        last = int(places[kept].max()) + 1
        if places[lost].min() >= last:
            return f"tokens beyond position {last} of {where} are not trained"
        first = int(places[lost].max()) + 1
        if places[kept].min() >= first and unit == "response":
            return f"the first {first} tokens of every response are not trained (as with a mask shifted by {first})"
        if places[kept].min() >= first:
            return f"tokens up to position {first} of {where} are not trained"
    tail = int(of_end[lost].max()) + 1
    if of_end[kept].min() >= tail:
        return f"the last {tail} tokens of every response are not trained"
    return None


def _by_id(step: StepWeights, lost: np.ndarray, kept: np.ndarray, texts: Sequence[str]) -> str | None:
    """The lost tokens are all those of some ids, and chance would hardly make it so."""
    ids = np.array([step.pieces[t.piece].ids[t.place] if t.piece >= 0 else -1 for t in step.targets])
    gone = np.unique(ids[lost])
    if np.isin(ids[kept], gone).any():
        return None
    own = ids[lost | kept]
    names, group, size = np.unique(own, return_inverse=True, return_counts=True)
    draw, alike = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        hit = np.bincount(group[draw.permutation(len(own))[: int(lost.sum())]], minlength=len(names))
        alike += bool((hit[hit > 0] == size[hit > 0]).all())
    if alike > LUCK * DRAWS:
        return None
    said = [repr(texts[i]) if i < len(texts) else str(i) for i in gone[:5].tolist()]
    more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
    return f"all tokens of certain ids are not trained ({', '.join(said)}{more})"


def _places(step: StepWeights, mask: np.ndarray, backwards: bool = False) -> np.ndarray:
    """Place of each target among those of a mask in its piece, from 0 (``backwards``: from its end); -1 elsewhere."""
    places = np.full(len(mask), -1)
    for piece in np.unique(step.piece[mask & (step.piece >= 0)]):
        own = np.flatnonzero(mask & (step.piece == piece))
        places[own] = np.arange(len(own))[::-1] if backwards else np.arange(len(own))
    return places
