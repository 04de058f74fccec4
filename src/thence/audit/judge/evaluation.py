"""A case that lets the trainer evaluate: do rows go forward as in training, and which mean is the loss it reports?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thence.audit.result import RESPONSE_ROLES, CaseResult, Finding
from thence.audit.solve.observation import ForwardRow, Observation, forward_rows, load_states
from thence.audit.solve.sequences import Piece, find_pieces

if TYPE_CHECKING:
    from thence.audit.judge.case import Judge

ALIKE = 1e-4
"""Relative difference of two losses, and difference of two log-probabilities in nats, that float32 may cause."""
MEANS: Mapping[str, str] = {
    "token-mean": "the mean over tokens",
    "sequence-mean": "the mean of the rows' means",
    "micro-batch-mean": "the mean of the batches' means",
    "row-weighted-batch-mean": "the mean of the batches' means, each counted once a row",
    "rank-mean": "the mean of the ranks' means",
}
"""What a reported loss may be, by name; the first are those of ``OBJECTIVES``."""


@dataclass(frozen=True)
class EvaluatedRow:
    """One row that went forward in the evaluation, with the nll of every target as it was fed, nats.

    Args:
        alone: nll of the targets of the example by itself, shape (targets of the example,).
        fed: the same targets in the row that went forward; None where the row holds more than one example.
        counted: which of them are response tokens.
        whole: nll of all targets of the row, padding included; None as with ``fed``.
    """

    piece: Piece
    alone: np.ndarray
    fed: np.ndarray | None
    counted: np.ndarray
    whole: np.ndarray | None


def judge_evaluation(judge: Judge, observed: Observation) -> CaseResult:
    """Compare the rows of the evaluation with those of training, and the reported loss with the means over them."""
    case, records = observed.case, observed.records
    states, found = load_states(observed.folder, len(records))
    steps = len(states) - 1
    rows = forward_rows(records, steps, judge.pad, "evaluation")
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    if steps < 0 or not rows or not losses:
        reason = "no forward pass of the evaluation was seen, or it reported no loss"
        return CaseResult(case, "not judged", reason, findings=tuple(found), seconds=observed.seconds)
    pieces, strange = find_pieces(rows, judge.known, judge.end)
    if strange or not pieces:
        reason = f"{strange or len(rows)} of {len(rows)} evaluated rows hold none of the probe's examples"
        return CaseResult(case, "not judged", reason, findings=tuple(found), seconds=observed.seconds)
    judge.solver(states[-1]).move_to(states[-1])
    evaluated = list(_evaluated(judge, observed, steps, rows, pieces))
    if any(row.fed is not None and np.isnan(row.fed).any() for row in evaluated):
        reason = "the audit's own model gives no number for the rows as they are padded in the evaluation"
        return CaseResult(case, "not judged", reason, findings=tuple(found), seconds=observed.seconds)
    found += _which(case.examples, pieces)
    found += _other_tokens(judge, observed, pieces)
    found += _fed_otherwise(evaluated)
    if any(record.get("trained_mode") for record in records):
        found.append(Finding("evaluation-dropout", "fault", "the model is in training mode while it is evaluated"))
    loss, declared = losses[0], str(case.options.get("reports", ""))
    means = list(_means(evaluated))
    found += _mean_findings(loss, means, case.asked, declared)
    name = next((words for _, words, value in means if abs(value - loss) <= ALIKE * abs(value)), "no mean with a name")
    unique = {f"{f.id}{f.kind}": f for f in reversed(found)}
    words = f"{len(pieces)} rows; the reported loss {loss:.4f} is {name}"
    return CaseResult(case, "judged", "", (), tuple(reversed(unique.values())), observed.seconds, said=words)


def _evaluated(
    judge: Judge, observed: Observation, step: int, rows: Sequence[ForwardRow], pieces: Sequence[Piece]
) -> Iterator[EvaluatedRow]:
    raw = list(_raw(observed.records, step))
    inside = Counter(piece.row for piece in pieces)
    for piece in pieces:
        counted = np.array([role in RESPONSE_ROLES for role in piece.roles[1:]])
        alone = _nll(judge, list(piece.ids), None, None)
        ids, mask, positions, by_hand = raw[piece.row]
        if inside[piece.row] > 1 or by_hand:
            yield EvaluatedRow(piece, alone, None, counted, None)
            continue
        whole = _nll(judge, ids, mask, positions)
        yield EvaluatedRow(piece, alone, whole[piece.start : piece.start + len(alone)], counted, whole)


def _raw(records: Sequence[Mapping[str, Any]], step: int) -> Iterator[tuple[list[int], Any, Any, bool]]:
    """Tokens, mask and positions of every evaluated row as given, and whether the mask was one of pairs of tokens."""
    for record in records:
        for forward in record["forwards"]:
            if forward.get("run") != "evaluation" or forward["step"] != step or not forward["input_ids"]:
                continue
            for index, ids in enumerate(forward["input_ids"]):
                mask, positions = forward["attention_mask"], forward["position_ids"]
                fits = mask is not None and len(mask) > index and len(mask[index]) == len(ids)
                own = positions[min(index, len(positions) - 1)] if positions else None
                own = own if own is not None and len(own) == len(ids) else None
                yield ids, mask[index] if mask is not None and fits else None, own, forward.get("whole_mask", False)


def _nll(judge: Judge, ids: list[int], mask: Any, positions: Any) -> np.ndarray:
    """Negative log-probabilities of all tokens of a row but the first, nats, float64; nan if the model gives none."""
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tensors = {name: torch.tensor([value]) for name, value in given.items() if value is not None}
    found = _forward(judge, tensors)
    if mask is not None and np.isnan(found).any():
        # In float64 transformers gives padding that sees nothing no number: let it see itself.
        size, real = len(ids), torch.tensor(mask, dtype=torch.bool)
        sees = (torch.ones(size, size).tril().bool() & real) | torch.eye(size, dtype=torch.bool)
        whole = torch.zeros(size, size, dtype=torch.float64).masked_fill(~sees, float("-inf"))
        found = _forward(judge, tensors | {"attention_mask": whole[None, None]})
    return found


def _forward(judge: Judge, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        output = judge.model(**tensors)
        logits = output.logits if hasattr(output, "logits") else output
        logp = torch.log_softmax(logits[0, :-1].double(), -1)
        return -logp.gather(1, tensors["input_ids"][0, 1:, None])[:, 0].numpy()


def _which(examples: int, pieces: Sequence[Piece]) -> list[Finding]:
    """Whether every example is evaluated once."""
    times = Counter(piece.example for piece in pieces)
    lacking = [str(example + 1) for example in range(examples) if not times[example]]
    again = [str(example + 1) for example in times if times[example] > 1]
    if lacking:
        detail = f"of {examples} examples {len(lacking)} are not evaluated: {', '.join(lacking)}"
        return [Finding("evaluation-rows", "fault", detail)]
    if again:
        detail = f"{len(again)} of {examples} examples are evaluated more than once: {', '.join(again)}"
        return [Finding("evaluation-rows", "fault", detail)]
    return []


def _other_tokens(judge: Judge, observed: Observation, pieces: Sequence[Piece]) -> list[Finding]:
    """Whether the evaluation gives an example the tokens that training gives it."""
    trained: dict[int, Piece] = {}
    for step in range(observed.case.steps):
        seen, _ = find_pieces(forward_rows(observed.records, step, judge.pad), judge.known, judge.end)
        trained |= {piece.example: piece for piece in seen}
    other = [p for p in pieces if p.example in trained and trained[p.example].ids != p.ids]
    if not other:
        return []
    piece, same = other[0], trained[other[0].example]
    place = next((i for i, (a, b) in enumerate(zip(piece.ids, same.ids, strict=False)) if a != b), len(same.ids))
    detail = (
        f"{len(other)} of {len(pieces)} rows have other tokens than in training (template, special tokens or cut): "
        f"example {piece.example + 1} has {len(piece.ids)} where it had {len(same.ids)}, "
        f"and differs from token {place + 1} on"
    )
    return [Finding("evaluation-rows", "fault", detail)]


def _fed_otherwise(rows: Sequence[EvaluatedRow]) -> list[Finding]:
    """Whether padding, mask or positions change what the model says of an example."""
    far = {row.piece.example + 1: np.abs(row.fed - row.alone)[row.counted].max() for row in rows if row.fed is not None}
    other = [example for example, distance in far.items() if distance > ALIKE]
    if not other:
        return []
    detail = (
        f"{len(other)} of {len(rows)} rows are fed so that their tokens get other log-probabilities than the example "
        f"alone, by up to {max(far.values()):.2g} nats: padding is attended to, or positions are shifted"
    )
    return [Finding("evaluation-rows", "fault", detail)]


def _means(rows: Sequence[EvaluatedRow]) -> Iterator[tuple[str, str, float]]:
    """Every mean that a reported loss may be: its name, words for it, and its value in nats."""
    fed = [row.alone if row.fed is None else row.fed for row in rows]
    sets = [
        ("", "", [nll[row.counted] for row, nll in zip(rows, fed, strict=True)]),
        ("prompt", ", prompts included", fed),
        ("end", ", end tokens left out", [nll[_body(row)] for row, nll in zip(rows, fed, strict=True)]),
    ]
    if all(row.whole is not None for row in rows):
        wholes = [row.whole for row in rows if row.whole is not None]
        ends = [row.piece.start + len(row.alone) for row in rows]
        padded = [np.append(f[row.counted], w[e:]) for row, f, w, e in zip(rows, fed, wholes, ends, strict=True)]
        sets += [("padding", ", padding included", padded), ("all", ", prompts and padding included", wholes)]
    for key, words, values in sets:
        for name, value in _five(rows, values).items():
            yield f"{name}-{key}".removesuffix("-"), MEANS[name] + words, value
    total = sum(float(nll[row.counted].sum()) for row, nll in zip(rows, fed, strict=True))
    yield "divisor", "the sum over tokens, divided by prompts too", total / sum(map(len, fed))
    places = sum(len(row.alone if row.whole is None else row.whole) for row in rows)
    yield "divisor", "the sum over tokens, divided by all places, padding included", total / places
    yield "divisor", "the sum over tokens, divided by the rows", total / len(rows)
    yield "divisor", "the sum over tokens", total


def _body(row: EvaluatedRow) -> np.ndarray:
    return np.array([role in ("first", "body") for role in row.piece.roles[1:]])


def _five(rows: Sequence[EvaluatedRow], values: Sequence[np.ndarray]) -> dict[str, float]:
    """The means of ``MEANS`` over the values of every row."""
    sums, counts = np.array([v.sum() for v in values]), np.array([max(len(v), 1) for v in values])
    batch = np.unique([(r.piece.rank or 0) * 10**6 + (r.piece.micro_batch or 0) for r in rows], return_inverse=True)[1]
    rank = np.array([r.piece.rank or 0 for r in rows])
    means, members = np.bincount(batch, sums) / np.bincount(batch, counts), np.bincount(batch)
    by_rank = np.bincount(rank, sums) / np.maximum(np.bincount(rank, counts), 1)
    return {
        "token-mean": float(sums.sum() / counts.sum()),
        "sequence-mean": float((sums / counts).mean()),
        "micro-batch-mean": float(means.mean()),
        "row-weighted-batch-mean": float((means * members).sum() / members.sum()),
        "rank-mean": float(by_rank.mean()),
    }


def _mean_findings(loss: float, means: Sequence[tuple[str, str, float]], asked: str, declared: str) -> list[Finding]:
    """Whether the reported loss is the mean asked for.

    Args:
        declared: the mean that the stack is known to report; then another than the one asked for is a note.
    """
    wanted = next(((words, value) for key, words, value in means if key == asked), None)
    words, value = wanted or next((words, value) for key, words, value in means if key == "token-mean")
    if abs(loss - value) <= ALIKE * abs(value):
        return []
    is_what = [(key, said) for key, said, other in means if abs(other - loss) <= ALIKE * abs(other)]
    said = f"it is {is_what[0][1]}" if is_what else "it is no mean with a name"
    kind = "note" if declared and any(key == declared for key, _ in is_what) else "fault"
    detail = f"the reported loss is {loss:.4f} where {words} is {value:.4f}: {said}"
    return [Finding("evaluation-mean", kind, detail)]
