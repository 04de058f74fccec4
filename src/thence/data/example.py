"""One row of a data set after reading: a prompt, perhaps a demonstration, perhaps a reference answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
FIRST_ROLES = ("system", "developer")
"""Roles that only the first turn may have."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool in an assistant turn.

    Attributes:
        name: of the function.
        arguments: a JSON object as text; templates get it as an object, which is what they expect.
        id: names the call, where the row gives it a name.
    """

    name: str
    arguments: str = "{}"
    id: str = ""

    def plain(self) -> dict[str, Any]:
        """The call in the form that chat templates read."""
        call = {"type": "function", "function": {"name": self.name, "arguments": json.loads(self.arguments)}}
        return {"id": self.id, **call} if self.id else call


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: its text; may be empty where the turn calls tools.
        reasoning: the thinking before it, of an assistant turn; without tags.
        tool_calls: of an assistant turn.
        tool_call_id, name: of a tool turn: which call it answers.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def plain(self) -> dict[str, Any]:
        """The turn in the form that chat templates read; reasoning under each of the three names in use."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), self.reasoning)
        if self.tool_calls:
            turn["tool_calls"] = [call.plain() for call in self.tool_calls]
        named = {"tool_call_id": self.tool_call_id, "name": self.name}
        return turn | {key: value for key, value in named.items() if value}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with what is known about good responses to it.

    Attributes:
        messages: the prompt as turns, the last one the user's or a tool's; empty where the data set gives the prompt
            as text.
        prompt: the prompt as text, used as it is, without a chat template; None where `messages` is set; empty in
            the layout `text`.
        demonstration: the text of the expert response, or None; may be empty where the response calls tools.
        answer: the reference answer that a verifier compares with, or None.
        source: where the row stands, as "file:line" (lines and rows count from 1).
        group: the data set it is reported under: the column `data_source`, else the file's stem.
        reasoning: the demonstration's thinking where the row gives it by itself, without tags.
        tool_calls: the demonstration's calls of tools.
        tools: JSON schemas of the tools that the prompt offers, each a JSON object as text.
        columns: what else the row holds, a JSON object as text, for reward functions; empty: nothing.

    Raises:
        ValueError: both or neither of `messages` and `prompt` are set.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    demonstration: str | None = None
    answer: str | None = None
    source: str = ""
    group: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[str, ...] = ()
    columns: str = ""

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("an Example needs either messages or a prompt text")

    @property
    def question(self) -> str:
        """The last user turn, or the prompt text: with `group`, the key under which copies of a problem belong."""
        if self.prompt is not None:
            return self.prompt
        return next((turn.content for turn in reversed(self.messages) if turn.role == "user"), "")
