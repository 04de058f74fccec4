"""POPE as a data transform (arXiv 2601.18779): hard problems whose prompt holds the beginning of a solution.

A problem is hard if the model solves it in none of its samples. Its guided twin is problem + prefix + an instruction to
continue, all in the prompt, with the shortest prefix of the known solution from which the model succeeds at least once.
Problem and twin are rows of their own, so groups of their own, one to one. The prefix is never a target.
Reconstruction: abstract and notes are public, no code is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from thence.data.example import Example, Message
from thence.data.problems import RowProblem

FRACTIONS = (0.05, 0.10, 0.15, 0.20, 0.25)
"""Shares of the solution that are tried, shortest first: at most about a quarter."""
PROBLEM, PREFIX = "{problem}", "{prefix}"
FORM = (
    "{problem}\n\nHere is the beginning of a solution:\n\n{prefix}\n\nContinue this solution from where it stops, "
    "and finish it."
)
"""The guided question of a chat model. A prompt that is plain text is continued as it is: :data:`PLAIN_FORM`."""
PLAIN_FORM = "{problem}{prefix}"
KIND = "pope"
"""The column that says which of the two a row is: guided or plain."""


def prefix_tokens(fraction: float, tokens: int) -> int:
    """How many tokens of a solution a share of it is: at least one, and never the last one.

    Args:
        fraction: 0 to 1.
        tokens: of the solution, without its end token.
    """
    return max(min(max(int(fraction * tokens + 1e-9), 1), tokens - 1), 0)  # 0.15 * 20 is a little less than 3


def shortest(fractions: Sequence[float], right: Sequence[int]) -> float | None:
    """The smallest share of the solution from which a sample was right; None: from none of them.

    Args:
        fractions: ascending.
        right: right samples from each, as far as they were tried.
    """
    return next((share for share, count in zip(fractions, right, strict=False) if count), None)


def guided(example: Example, prefix: str, form: str | None = None) -> Example:
    """The problem with the beginning of its solution in its prompt, and without a demonstration.

    Args:
        form: a text with {problem} and {prefix}; None: :data:`FORM`, or :data:`PLAIN_FORM` of a prompt in plain text.

    Raises:
        RowProblem: the last turn of the prompt is not a user's.
    """
    given = form or (PLAIN_FORM if example.prompt is not None else FORM)
    return asked_anew(example, lambda problem: filled(given, {PROBLEM: problem, PREFIX: prefix}))


def asked_anew(example: Example, write: Callable[[str], str]) -> Example:
    """The example with another question and without a demonstration: its plain prompt, or its last turn, rewritten.

    Args:
        write: makes the new text of the old one.

    Raises:
        RowProblem: the last turn of the prompt is not a user's.
    """
    bare = replace(example, demonstration=None, reasoning="", tool_calls=())
    if example.prompt is not None:
        return replace(bare, prompt=write(example.prompt))
    *before, last = example.messages
    if last.role != "user":
        raise RowProblem(
            "messages",
            f"the last turn of the prompt is of role {last.role}, and only a user's can be written anew",
            "leave this row out",
        )
    return replace(bare, messages=(*before, Message("user", write(last.content))))


def filled(form: str, texts: Mapping[str, str]) -> str:
    """The form with each text in its place. Texts are not read as forms: a problem may hold braces.

    Args:
        texts: by place, such as ``{problem}``.
    """
    return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], form)


def row_of(example: Example, more: dict[str, Any]) -> dict[str, Any]:
    """An example without its demonstration as a row of a JSONL file: it reads as the same example.

    Args:
        more: further columns.
    """
    side = example.prompt if example.prompt is not None else [_turn(message) for message in example.messages]
    row: dict[str, Any] = {"prompt": side}
    if example.answer is not None:
        row["answer"] = example.answer
    if example.tools:
        row["tools"] = [json.loads(tool) for tool in example.tools]
    if example.group:
        row["data_source"] = example.group
    return {**(json.loads(example.columns) if example.columns else {}), **row, **more}


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [call.plain() for call in message.tool_calls]
    named = {"tool_call_id": message.tool_call_id, "name": message.name}
    return turn | {key: value for key, value in named.items() if value}
