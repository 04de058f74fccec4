"""The column layouts a data set may have, and how one row of each becomes an `Example`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from thence.data.example import ROLES, Example, Message
from thence.data.numbers import number_text, without_separators
from thence.data.problems import RowProblem
from thence.errors import DataError

Row = Mapping[str, Any]
Parts = tuple[tuple[Message, ...] | str, str | None, str | None]

FIELDS = (
    "messages",
    "prompt",
    "completion",
    "question",
    "answer",
    "demonstration",
    "target",
    "reward_model",
    "text",
    "data_source",
)
LAYOUTS = ("messages", "prompt-completion", "question-answer", "verl", "text")

ANSWER_MARK = "####"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def choose_layout(fields: Collection[str], name: str) -> str:
    """The layout that the columns `fields` of the data set `name` fit.

    Raises:
        DataError: none fits; the message lists the columns found.
    """
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and not {"reward_model", "target"}.isdisjoint(fields):
        return "verl"
    if "prompt" in fields:
        return "prompt-completion"
    if {"question", "answer"} <= set(fields):
        return "question-answer"
    if "text" in fields:
        return "text"
    raise DataError(
        f"no layout fits the columns {', '.join(sorted(fields)) or '(none)'}",
        remedy="a data set needs messages, prompt (with completion or answer), question + answer, verl's prompt + "
        "target / reward_model, or text; name your columns, for example --data.columns question=problem",
        file=name,
    )


def answers_are_worked(head: Sequence[Row]) -> bool:
    """Whether most of a data set's first rows have answers like GSM8K's: working, then `#### 42`."""
    return 2 * sum(ANSWER_MARK in str(row.get("answer")) for row in head) > len(head)


def parse_row(
    layout: str, row: Row, *, source: str, group: str, worked: bool = False, strip_calculator: bool = True
) -> Example:
    """Turn one row into an `Example`.

    Args:
        layout: one of `LAYOUTS`.
        row: field name -> value.
        source: "file:line" of the row.
        group: the group of rows whose column `data_source` is absent or empty.
        worked: answers of the layout question-answer are GSM8K's: working, then the number after `####`.
        strip_calculator: remove GSM8K's calculator annotations `<<48/2=24>>`.

    Raises:
        RowProblem: a field is missing, empty, of the wrong type or not clean text.
    """
    worked = worked and layout == "question-answer"
    side, demonstration, answer = _worked_row(row) if worked else _PARSERS[layout](row)
    if worked and strip_calculator and demonstration is not None:
        demonstration = _CALCULATOR.sub("", demonstration)
    named = row.get("data_source")
    messages, prompt = ((), side) if isinstance(side, str) else (side, None)
    return Example(
        messages=messages,
        prompt=prompt,
        demonstration=demonstration,
        answer=answer,
        source=source,
        group=named if isinstance(named, str) and named.strip() else group,
    )


def _messages_row(row: Row) -> Parts:
    turns = _turns(row, "messages")
    demonstration = None
    if turns[-1].role == "assistant":
        demonstration = turns[-1].content
        turns = turns[:-1]
    _check_prompt_turns(turns, "messages")
    return turns, demonstration, _answer(row.get("answer"), "answer")


def _prompt_completion_row(row: Row) -> Parts:
    return _prompt_side(row), _demonstration(row, "completion"), _answer(row.get("answer"), "answer")


def _question_answer_row(row: Row) -> Parts:
    turns = (Message("user", _text(_need(row, "question"), "question")),)
    return turns, _demonstration(row, "demonstration"), _answer(_need(row, "answer"), "answer")


def _worked_row(row: Row) -> Parts:
    turns = (Message("user", _text(_need(row, "question"), "question")),)
    working = _text(_need(row, "answer"), "answer")
    _, mark, final = working.rpartition(ANSWER_MARK)
    final = without_separators(final.strip())
    if not mark or not final:
        raise RowProblem(
            "answer",
            f"no final answer after {ANSWER_MARK}, which most rows have",
            f"end the text with a line '{ANSWER_MARK} 42'",
        )
    return turns, _demonstration(row, "demonstration") or working, final


def _verl_row(row: Row) -> Parts:
    reward = row.get("reward_model")
    if reward is not None and not isinstance(reward, Mapping):
        raise _wrong_type("reward_model", reward, "an object with ground_truth")
    truth = reward.get("ground_truth") if reward else None
    return _prompt_side(row), _demonstration(row, "target"), _answer(truth, "reward_model.ground_truth")


def _text_row(row: Row) -> Parts:
    return "", _text(_need(row, "text"), "text"), None


_PARSERS: dict[str, Callable[[Row], Parts]] = {
    "messages": _messages_row,
    "prompt-completion": _prompt_completion_row,
    "question-answer": _question_answer_row,
    "verl": _verl_row,
    "text": _text_row,
}


def _prompt_side(row: Row) -> tuple[Message, ...] | str:
    if isinstance(_need(row, "prompt"), str):
        return _text(row["prompt"], "prompt")
    turns = _turns(row, "prompt")
    _check_prompt_turns(turns, "prompt")
    return turns


def _demonstration(row: Row, field: str) -> str | None:
    """The expert response in `field`: text, or a list of one assistant message; none if None or empty."""
    value = row.get(field)
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return _text(value, field)
    turns = _turns(row, field)
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns)
        raise RowProblem(field, f"expected one assistant message, found {roles}", "keep the one response to learn")
    return turns[0].content


def _turns(row: Row, field: str) -> tuple[Message, ...]:
    value = _need(row, field)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong_type(field, value, "a list of {role, content}")
    if not value:
        raise RowProblem(field, "the list of messages is empty", "give at least a user turn")
    return tuple(_message(item, f"{field}[{position}]") for position, item in enumerate(value))


def _message(item: object, field: str) -> Message:
    if not isinstance(item, Mapping):
        raise _wrong_type(field, item, "an object with role and content")
    role = item.get("role")
    if role not in ROLES:
        raise RowProblem(f"{field}.role", f"unknown role {role!r}", f"use one of {', '.join(ROLES)}")
    content = item.get("content")
    if content is None:
        raise RowProblem(f"{field}.content", "missing or null", "give the text of the turn")
    # An empty system turn is a statement of its own: it keeps templates from adding their default one.
    return Message(role, _text(content, f"{field}.content", may_be_empty=role == "system"))


def _check_prompt_turns(turns: Sequence[Message], field: str) -> None:
    if not any(turn.role == "user" for turn in turns):
        raise RowProblem(field, "no user turn to respond to", "give a user turn before the response")
    if turns[-1].role != "user":
        raise RowProblem(
            field, f"the prompt ends with a turn of role {turns[-1].role}", "end the prompt with a user turn"
        )
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowProblem(field, "a system turn that is not the first", "move the system turn to the front")


def _need(row: Row, field: str) -> Any:
    value = row.get(field)
    if value is None:
        raise RowProblem(field, "missing or null", f"fill the field, or name its column: --data.columns {field}=COLUMN")
    return value


def _text(value: object, field: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _wrong_type(field, value, "text")
    if not may_be_empty and not value.strip():
        raise RowProblem(field, "empty", "fill the field")
    if "\0" in value:
        raise RowProblem(field, f"NUL character at position {value.index(chr(0))}", "remove it from the text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            field, f"invalid Unicode (half of a surrogate pair) at position {error.start}", "mend the text's encoding"
        ) from None
    return value


def _answer(value: object, field: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowProblem(field, f"the answer is {value}", "give a finite number or text")
        return number_text(value)
    if not isinstance(value, str):
        raise _wrong_type(field, value, "text or a number")
    return _text(value, field).strip()


def _wrong_type(field: str, value: object, wanted: str) -> RowProblem:
    return RowProblem(field, f"expected {wanted}, found {type(value).__name__}", f"make it {wanted}")
