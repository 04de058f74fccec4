"""Which of the probe's examples went forward, where each begins, and the role of every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from thence.audit.result import Role
from thence.audit.solve.observation import ForwardRow


@dataclass(frozen=True)
class KnownExample:
    """An example of the probe as the audit looks for it in what went forward.

    Args:
        prompt: token ids of the prompt's content, without template; empty: the row is compared as a whole.
        response: token ids of the response, without its end token when ``prompt`` is given.
        row: token ids of the whole row under the probe's own template.
        labels: -100 where a token is not to be trained.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    row: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One example inside a row that went forward.

    Args:
        example: index in the probe.
        ids: its tokens alone, as the stack rendered them.
        roles: of every token as a target; the first token is never a target.
        row: index of the row it stood in, unique in the step.
        start: where it begins in that row.
        micro_batch: index among the micro-batches of its rank in this step.
        rank: its rank.
    """

    example: int
    ids: tuple[int, ...]
    roles: tuple[Role, ...]
    row: int
    start: int
    micro_batch: int | None
    rank: int | None


def find_pieces(
    rows: Sequence[ForwardRow],
    known: Sequence[KnownExample],
    end: int | None,
    hidden: bool = False,
    seen: Mapping[int, int] | None = None,
) -> tuple[list[Piece], int]:
    """The examples in the rows, and the number of rows in which none was found.

    Args:
        end: id of the end-of-turn token.
        hidden: also where the mask leaves a response out, as trainers do with responses that are not to be trained.
        seen: how often each example came before; it tells apart examples that are alike, such as two equal responses
            of a group.
    """
    pieces: list[Piece] = []
    strange = 0
    for index, row in enumerate(rows):
        found = _in_row(row, index, known, end)
        if hidden and not found:
            found = _behind_mask(row, index, known)
        strange += not found and any(row.mask)
        pieces += found
    return _deal_alike(pieces, known, seen or {}), strange


def _deal_alike(pieces: list[Piece], known: Sequence[KnownExample], seen: Mapping[int, int]) -> list[Piece]:
    """The pieces with examples that are alike taken in turn: first the one that came least often, then in order."""
    alike: dict[KnownExample, list[int]] = {}
    for example, item in enumerate(known):
        alike.setdefault(item, []).append(example)
    if len(alike) == len(known):
        return pieces
    times, dealt = Counter(seen), []
    for piece in pieces:
        example = min(alike[known[piece.example]], key=lambda one: (times[one], one))
        times[example] += 1
        dealt.append(replace(piece, example=example))
    return dealt


def planned_pieces(known: Sequence[KnownExample], order: Sequence[tuple[int, int | None, int | None]]) -> list[Piece]:
    """Pieces for a program that cannot be watched: (example, micro-batch, rank) in the order of the data."""
    pieces = []
    for row, (example, micro_batch, rank) in enumerate(order):
        item = known[example]
        roles = roles_of_labels(item.labels)
        pieces.append(Piece(example, item.row, roles, row, 0, micro_batch, rank))
    return pieces


def roles_of_labels(labels: Sequence[int]) -> tuple[Role, ...]:
    """Roles of a row whose trained tokens are known: first, body and end by their place among the trained ones."""
    trained = [t for t, label in enumerate(labels) if label != -100]
    roles: list[Role] = ["prompt"] * len(labels)
    for t in trained:
        roles[t] = "body"
    if trained:
        roles[trained[0]] = "first"
        if len(trained) > 1:
            roles[trained[-1]] = "end"
        for t in range(trained[-1] + 1, len(labels)):
            roles[t] = "after"
    return tuple(roles)


def _in_row(row: ForwardRow, index: int, known: Sequence[KnownExample], end: int | None) -> list[Piece]:
    real = [t for t, m in enumerate(row.mask) if m]
    if not real:
        return []
    first, last = real[0], real[-1] + 1
    ids = row.ids[first:last]
    for example, item in enumerate(known):
        if item.row == ids:
            return [_piece(row, index, example, ids, first, roles_of_labels(item.labels))]
    places = []
    for example, item in enumerate(known):
        if not item.prompt:
            at = _find(ids, item.row, 0)
            if at is not None:
                places.append((at, at + len(item.row), at, example))
            continue
        asked = _find(ids, item.prompt, 0)
        while asked is not None:
            answered = _answer(ids, item.response, end, asked + len(item.prompt))
            if answered is not None and answered - asked - len(item.prompt) < 40:
                places.append((asked, answered + len(item.response), answered, example))
            asked = _find(ids, item.prompt, asked + 1)
    places.sort()
    pieces = []
    lead = places[0][0] if places else 0
    for number, (asked, done, answered, example) in enumerate(places):
        start = 0 if number == 0 else max(asked - lead, places[number - 1][1])
        stop = len(ids) if number == len(places) - 1 else max(places[number + 1][0] - lead, done)
        own = ids[start:stop]
        item = known[example]
        if item.prompt:
            roles = _roles(len(own), answered - start, done - start, own, end)
        else:
            roles = roles_of_labels([*item.labels, *[-100] * (len(own) - len(item.labels))])
        pieces.append(_piece(row, index, example, own, first + start, roles))
    return pieces


def _behind_mask(row: ForwardRow, index: int, known: Sequence[KnownExample]) -> list[Piece]:
    real = [t for t, m in enumerate(row.mask) if m]
    if not real:
        return []
    first, last = real[0], real[-1] + 1
    for example, item in enumerate(known):
        done = last + len(item.response)
        if (
            item.prompt
            and row.ids[last:done] == item.response
            and _find(row.ids[first:last], item.prompt, 0) is not None
        ):
            ids = row.ids[first:done]
            return [_piece(row, index, example, ids, first, _roles(len(ids), last - first, len(ids), ids, None))]
    return []


def _piece(row: ForwardRow, index: int, example: int, ids, start: int, roles) -> Piece:
    return Piece(example, tuple(ids), tuple(roles), index, start, row.micro_batch, row.rank)


def _roles(length: int, answered: int, done: int, ids: Sequence[int], end: int | None) -> tuple[Role, ...]:
    roles: list[Role] = ["prompt"] * length
    for t in range(answered, done):
        roles[t] = "first" if t == answered else "body"
    for t in range(done, length):
        roles[t] = "end" if t == done and ids[t] == end else "after"
    return tuple(roles)


def _answer(ids: Sequence[int], response: Sequence[int], end: int | None, start: int) -> int | None:
    """Where a response begins: with its end token if it has one, since a short one may stand in a template's words."""
    if end is not None:
        at = _find(ids, (*response, end), start)
        if at is not None:
            return at
    return _find(ids, response, start)


def _find(ids: Sequence[int], wanted: Sequence[int], start: int) -> int | None:
    size = len(wanted)
    if size == 0:
        return start
    for at in range(start, len(ids) - size + 1):
        if tuple(ids[at : at + size]) == tuple(wanted):
            return at
    return None
