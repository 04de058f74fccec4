"""How a chat template writes the demonstration: the text to train on, or the reason why there is none.

The template decides the form (a think block, a channel, the blanks). It may not lose a word: what it writes is compared
with what it writes for stand-in words in place of the row's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from thence.data import think
from thence.data.example import Message
from thence.data.messages import REASONING_KEYS
from thence.data.parts import Marks, is_written, marked, marked_message, message_parts, parts_of
from thence.data.problems import RowProblem
from thence.data.template import ChatFormat, encode, is_marked, render_text

_SHOWN = 40
_STAND_IN = {"content": "quxcontent", "reasoning": "quxthinking"}


@dataclass(frozen=True, slots=True)
class Written:
    """A response as the template writes it.

    Attributes:
        text: what follows the prompt, without the end of the turn.
        note: what a user should know about it; else "".
        ends: it holds its end token already, another one than other responses have (that of a tool call, say).
    """

    text: str
    note: str = ""
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a response goes: the conversation before it, as turns and as text, and how to render."""

    tokenizer: Any
    chat: ChatFormat
    messages: tuple[Message, ...]
    tools: tuple[str, ...]
    prompt: str
    opening: str

    @property
    def templated(self) -> bool:
        """Whether a template renders the conversation."""
        return self.chat.template is not None and bool(self.messages)

    def whole(self, turn: Message) -> str:
        """The conversation with `turn` as its last."""
        return render_text(
            self.tokenizer,
            self.chat.template or "",
            (*self.messages, turn),
            tools=self.tools,
            variables=self.chat.variables,
        )

    def after(self, turn: Message, prompt: str | None = None) -> str | None:
        """What the template writes after the prompt for `turn`; None where it does not go on from the prompt."""
        prompt = self.prompt if prompt is None else prompt
        whole = self.whole(turn)
        return whole[len(prompt) :] if whole.startswith(prompt) else None

    def without_tail(self, turn: Message, prompt: str | None = None) -> str | None:
        """As `after`, without the end of the turn."""
        found = self.after(turn, prompt)
        return None if found is None else found.removesuffix(self.chat.tail or "")


def written(place: Place, turn: Message) -> Written:
    """The response to train on for the demonstration `turn`.

    Raises:
        RowProblem: the template leaves out or changes a part of it.
    """
    if turn.tool_calls:
        return _with_calls(place, turn)
    if turn.reasoning:
        found = _as_turn(place, turn) or _dropped_thinking(place, turn, None)
        if found is not None:
            return found
        raise RowProblem(
            "reasoning_content",
            "the chat template does not write the reasoning of an assistant turn",
            "write it into the content in the model's own tags (<think>...</think>), or give a template that reads "
            "reasoning_content (--data.template FILE)",
        )
    literal = think.without_opening(turn.content, place.opening)
    plain = replace(turn, content=place.opening + literal)
    found = _as_turn(place, plain)
    if found is not None:
        foreign = _foreign_tags(place, turn.content)
        return replace(found, note=foreign) if foreign else found
    pieces = think.split(turn.content, place.opening)
    if pieces is not None:
        found = _as_turn(place, replace(turn, reasoning=pieces[0], content=pieces[1])) if pieces[0] else None
        found = found or _dropped_thinking(place, Message("assistant", pieces[1], pieces[0]), literal)
        if found is not None:
            return found
    raise RowProblem(
        "demonstration",
        f"the chat template changes the response: {difference(place.prompt + literal, place.whole(plain))}",
        "give a template that keeps responses as they are (--data.template FILE), or write the demonstrations "
        "in the template's form",
    )


def difference(ours: str, theirs: str) -> str:
    """Where two texts part, in words."""
    start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"expected {ours[start : start + _SHOWN]!r}, the template writes {theirs[start : start + _SHOWN]!r}"


def _as_turn(place: Place, turn: Message) -> Written | None:
    """What the template writes for the turn, if it writes the same around stand-in words; else None."""
    text = place.without_tail(turn)
    if text is None:
        return None
    # A think tag at the head of the content stands there for the template to see, with the stand-in behind it.
    head = place.opening if turn.content.startswith(place.opening) else ""
    stand_in = replace(
        turn,
        content=head + _STAND_IN["content"],
        reasoning=_STAND_IN["reasoning"] if turn.reasoning else "",
    )
    scaffold = place.without_tail(stand_in)
    texts = {"content": turn.content[len(head) :], "reasoning": turn.reasoning}
    if scaffold is None or not _fits(scaffold, text, texts):
        return None
    before = scaffold.partition(_STAND_IN["content"])[0]
    added = "" if turn.reasoning else before.strip()
    note = f"the template writes {before!r} before the response, and it is trained" if added else ""
    return Written(text, note)


def _foreign_tags(place: Place, content: str) -> str:
    """A note where thinking stands in tags of another model than the template's."""
    tags, template = think.tags_at(content), place.chat.template or ""
    if tags is None or tags.opens in template or not any(key in template for key in REASONING_KEYS):
        return ""
    return (
        f"thinking in {tags.opens!r}, which the template does not write, is trained as ordinary text; give it as "
        "reasoning_content to have it in the template's form"
    )


def _fits(scaffold: str, text: str, texts: dict[str, str]) -> bool:
    """Whether `text` is the scaffold with the row's texts in place of the stand-ins, blanks around them aside."""
    names = [name for name, value in texts.items() if value.strip()]
    if any(scaffold.count(_STAND_IN[name]) != 1 for name in names):
        return False
    if "reasoning" not in names and _STAND_IN["reasoning"] in scaffold:
        return False
    pieces = re.split("(" + "|".join(_STAND_IN[name] for name in names) + ")", scaffold)
    row = {_STAND_IN[name]: texts[name] for name in names}
    at = 0
    for piece in pieces:
        at = _skipped(text, at)
        bare = row.get(piece, piece).strip()
        if not text.startswith(bare, at):
            return False
        at += len(bare)
    return not text[at:].strip()


def _skipped(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _dropped_thinking(place: Place, turn: Message, literal: str | None) -> Written | None:
    """The response where the prompt opens thinking and the template leaves the thinking of past turns out.

    The model will see the prompt, so the response continues from it: the thinking, the closing tag, the rest.

    Args:
        turn: the demonstration with its reasoning by itself.
        literal: the response as the row writes it; None: in the blanks of the common templates.
    """
    if not place.opening:
        return None
    base = place.prompt.removesuffix(place.opening)
    # The template may close the thinking that it leaves out before it writes the content.
    tags = think.tags_at(place.opening)
    text = place.without_tail(Message("assistant", turn.content), base)
    bare = None if text is None else text.strip().removeprefix(place.opening.strip()).strip()
    if bare is not None and tags is not None:
        bare = bare.removeprefix(tags.closes).strip()
    if bare is None or bare != turn.content.strip():
        return None
    return Written(think.with_thinking(turn.reasoning, turn.content, place.opening) if literal is None else literal)


def _with_calls(place: Place, turn: Message) -> Written:
    """The response of a turn that calls tools.

    Raises:
        RowProblem: the template leaves a part of it out, or writes no end after it.
    """
    text = place.after(turn)
    if text is None:
        raise RowProblem(
            "tool_calls",
            f"the chat template does not go on from the prompt: {difference(place.prompt, place.whole(turn))}",
            "give a template that writes tool calls after its generation prompt (--data.template FILE)",
        )
    marks = Marks()
    shown = place.after(marked_message(turn, len(place.messages), marks)) or ""
    lost = [part.where for part in message_parts(turn, len(place.messages)) if not is_written(part.text, text)]
    lost += [part.where for part in marks.missing_in(shown)]
    if lost:
        name = lost[0].partition("].")[2]
        raise RowProblem(
            name.partition("[")[0],
            f"the chat template does not write {name} of the demonstration",
            "give a template that writes tool calls (--data.template FILE), or write the calls into the content",
        )
    tail = place.chat.tail or ""
    if tail and text.endswith(tail):
        return Written(text.removesuffix(tail))
    ids = encode(place.tokenizer, text.rstrip())
    if ids and is_marked(place.tokenizer, ids[-1]):
        return Written(text.rstrip(), ends=True)
    raise RowProblem(
        "tool_calls",
        "the chat template writes no end token after a tool call",
        "give a template that ends every assistant turn (--data.template FILE)",
    )


def _knows_thinking(chat: ChatFormat) -> bool:
    """Whether the template does something about thinking, so that what it leaves out of past turns is meant."""
    words = (*REASONING_KEYS, *(tags.closes for tags in think.THINK_TAGS[:-1]))
    return any(word in (chat.template or "") for word in words)


def left_out(place: Place) -> tuple[list[str], list[str]]:
    """The parts of the prompt that the template does not write.

    Returns:
        Those that it leaves out on purpose (the thinking of earlier turns), and all others.
    """
    marks = Marks()
    turns, tools = marked(place.messages, place.tools, marks)
    shown = render_text(
        place.tokenizer,
        place.chat.template or "",
        turns,
        generate=True,
        tools=tools,
        variables=place.chat.variables,
    )
    lost = {
        part.where: part for part in parts_of(place.messages, place.tools) if not is_written(part.text, place.prompt)
    }
    lost |= {part.where: part for part in marks.missing_in(shown)}
    on_purpose, others = [], []
    for part in lost.values():
        message = None if part.turn is None else place.messages[part.turn]
        past = message is not None and message.role == "assistant" and _knows_thinking(place.chat)
        pieces = think.split(part.text) if past and part.kind == "content" else None
        rest_is_there = pieces is not None and is_written(pieces[1], place.prompt)
        if past and (part.kind == "reasoning" or rest_is_there):
            on_purpose.append(part.where)
        else:
            others.append(part.where)
    return on_purpose, others
