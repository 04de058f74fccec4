"""One rendered example as coloured text, and what can be said about it before a step is taken."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from thence.data import think
from thence.data.chat import Rendered, place_of, response_of
from thence.data.example import Example
from thence.data.response import response_text
from thence.data.template import ChatFormat, changes_by_day, encode, is_marked, token_id

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered example: text of one kind.

    Attributes:
        text: as the tokenizer decodes it; special tokens by their names.
        trained: it is part of what is trained.
        special: it is one special or added token.
    """

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at, a few words.
        ok: whether it is as it should be; None: it cannot be told here, and the reason says why.
        reason: what was found, one sentence.
        remedy: what to do if the check fails; else "".
    """

    name: str
    ok: bool | None
    reason: str
    remedy: str = ""


def segments(row: Rendered, tokenizer: Any) -> list[Segment]:
    """The tokens of a rendered example as text, in order; every special token is a separate segment."""
    tokens = [(token, False) for token in row.prompt_ids] + [(token, True) for token in row.response_ids or ()]
    found = []
    for (trained, number), part in groupby(enumerate(tokens), lambda item: _kind(*item, tokenizer)):
        ids = [token for _, (token, _) in part]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found.append(Segment(str(text), trained, number >= 0))
    return found


def terminal_text(parts: Sequence[Segment]) -> Text:
    """The segments for a terminal: trained text green, context dim, special tokens in reverse."""
    from rich.text import Text

    text = Text()
    for part in parts:
        style = "bold green" if part.trained else "dim"
        text.append(part.text, f"{style} reverse" if part.special else style)
    return text


def checks(
    example: Example,
    row: Rendered,
    tokenizer: Any,
    chat: ChatFormat,
    *,
    system: str | None = None,
    stop_ids: Collection[int] | None = None,
) -> list[Check]:
    """What can be said about one rendered example.

    Args:
        example: the example that `row` was rendered from.
        row: its rendering.
        tokenizer: a Hugging Face tokenizer.
        chat: the template that it was rendered by.
        system: the system text that it was rendered with, as of `render`.
        stop_ids: the tokens that end sampling; None: that is not looked at.
    """
    templated = chat.template is not None and bool(example.messages)
    found = [_one_bos(row, tokenizer, chat)]
    if row.response_ids is not None:
        found.append(_end_is_trained(row, tokenizer, chat))
        if stop_ids is not None:
            found.append(_end_stops(row, tokenizer, stop_ids))
        found.append(_thinking_is_closed(row, tokenizer, chat))
        if templated:
            found.append(_same_as_whole(example, row, tokenizer, chat, system))
    if templated:
        found.append(_same_every_day(chat))
        found.append(_complete(row))
    return found


def _kind(place: int, token: tuple[int, bool], tokenizer: Any) -> tuple[bool, int]:
    """What tells segments apart: whether a token is trained, and its place where it is special (-1: it is not)."""
    number, trained = token
    return trained, place if is_marked(tokenizer, number) else -1


def _named(tokenizer: Any, token: int) -> str:
    return repr(str(tokenizer.convert_ids_to_tokens(token)))


def _one_bos(row: Rendered, tokenizer: Any, chat: ChatFormat) -> Check:
    name, bos = "one beginning token", token_id(tokenizer.bos_token_id)
    if bos is None:
        return Check(name, True, "the tokenizer has none")
    count = 0
    for token in row.prompt_ids:
        if token == bos:
            count += 1
        elif is_marked(tokenizer, token) or str(tokenizer.decode([token])).strip():
            break
    said = f"the prompt begins with {count} of {_named(tokenizer, bos)}"
    if count > 1:
        return Check(name, False, said, "take it out of the template or of the prompts: it is written twice")
    if count == 0 and chat.bos_id is not None:
        return Check(
            name,
            False,
            f"{said}, and the tokenizer puts one before plain text",
            "write {{ bos_token }} at the head of the template, or give a copy of it as a file (data.template): "
            "then it is put first",
        )
    return Check(name, True, said if count else f"{said}, as the tokenizer puts none before plain text")


def _end_is_trained(row: Rendered, tokenizer: Any, chat: ChatFormat) -> Check:
    name, ids = "end of turn is trained", row.response_ids or []
    if row.truncated:
        return Check(name, None, "the response is cut, and a cut teaches no end")
    last = _named(tokenizer, ids[-1])
    if is_marked(tokenizer, ids[-1]) or ids[-1] == chat.end_id:
        return Check(name, True, f"the response ends with {last}")
    return Check(name, False, f"the response ends with {last}", "give a template that ends turns with a special token")


def _end_stops(row: Rendered, tokenizer: Any, stop_ids: Collection[int]) -> Check:
    name, ids = "end of turn stops sampling", row.response_ids or []
    if row.truncated:
        return Check(name, None, "the response is cut")
    last = _named(tokenizer, ids[-1])
    if ids[-1] in stop_ids:
        return Check(name, True, f"{last} is one of {len(stop_ids)} tokens that stop sampling")
    remedy = f"add {ids[-1]} to eos_token_id in the model's generation_config.json"
    return Check(name, False, f"{last} does not stop sampling", remedy)


def _thinking_is_closed(row: Rendered, tokenizer: Any, chat: ChatFormat) -> Check:
    name = "thinking is closed"
    text = response_text(tokenizer, row.response_ids or (), (chat.end_id,), row.opening)
    tags = think.tags_at(text)
    if tags is None:
        return Check(name, True, "the response has no thinking")
    if tags.closes in text:
        return Check(name, True, f"{tags.closes!r} is in the response")
    if row.truncated:
        return Check(name, None, f"the response is cut before {tags.closes!r}")
    where = "the prompt" if row.opening else "the response"
    return Check(
        name, False, f"{where} opens {tags.opens!r} and the response never closes it", f"write {tags.closes!r} after it"
    )


def _same_as_whole(example: Example, row: Rendered, tokenizer: Any, chat: ChatFormat, system: str | None) -> Check:
    """Whether prompt and response are the first tokens of the conversation rendered and tokenised at once."""
    name = "same tokens as the whole conversation"
    place = place_of(example, tokenizer, chat, system)
    whole = encode(tokenizer, place.prompt + response_of(place, example).text)
    ours = [*row.prompt_ids, *(row.response_ids or ())]
    if chat.bos_id is not None and ours[:1] == [chat.bos_id] and whole[:1] != [chat.bos_id]:
        whole = [chat.bos_id, *whole]
    at = next((i for i, pair in enumerate(zip(ours, whole, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return Check(name, True, f"all {len(ours)} tokens")
    near = [str(tokenizer.decode(ids[max(0, at - 2) : at + 3])) for ids in (ours, whole)]
    return Check(
        name,
        False,
        f"they differ at token {at} (the response begins at {len(row.prompt_ids)}): {near[0]!r} here, {near[1]!r} in "
        "the whole",
        "sampling continues from the prompt's tokens, so what is trained is what the model will see; a template that "
        "ends its generation prompt with a special token or a line break has no such border",
    )


def _same_every_day(chat: ChatFormat) -> Check:
    name = "same text every day"
    if not changes_by_day(chat):
        return Check(name, True, "the template writes no date of today")
    return Check(
        name,
        False,
        "the template writes today's date, so the same row gives other tokens tomorrow",
        'set data.template_variables = { date_string = "26 Jul 2024" } if the template reads it',
    )


def _complete(row: Rendered) -> Check:
    name = "nothing is left out or added"
    if row.notes:
        remedy = "set data.template_variables, or give another data.template, if that is not meant"
        return Check(name, None, "; ".join(row.notes), remedy)
    return Check(name, True, "every text of the row is in the prompt or the response")
