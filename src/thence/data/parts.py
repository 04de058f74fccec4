"""The parts of a row that a chat template has to write, and whether it wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thence.data.example import Message, ToolCall

_MARK = "qux{}q"  # plain letters and a number, so that no template strips or escapes it


@dataclass(frozen=True, slots=True)
class Part:
    """A text of a row.

    Attributes:
        where: what the row calls it, "messages[1].content".
        text: the text.
        kind: content, reasoning, call (of a tool) or tool (that is offered).
        turn: the place of its turn; None for tools.
    """

    where: str
    text: str
    kind: str
    turn: int | None = None


class Marks:
    """Adds a separate word to every text, so that a rendering tells which texts the template writes."""

    def __init__(self) -> None:
        self.words: list[tuple[Part, str]] = []

    def on(self, part: Part) -> str:
        """The text with its mark; an empty one stays empty."""
        if not part.text.strip():
            return part.text
        word = _MARK.format(len(self.words))
        self.words.append((part, word))
        return part.text + word

    def missing_in(self, text: str) -> list[Part]:
        """The parts whose marks are not in a rendering."""
        return [part for part, word in self.words if word not in text]


def parts_of(messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Part]:
    """Every text of a conversation and of the tools that it offers, empty ones left out."""
    found = [part for place, message in enumerate(messages) for part in message_parts(message, place)]
    for place, tool in enumerate(tools):
        found += [Part(f"tools[{place}]{path}", text, "tool") for path, text in _tool_texts(json.loads(tool))]
    return [part for part in found if part.text.strip()]


def message_parts(message: Message, place: int) -> Iterator[Part]:
    """The texts of one turn."""
    where = f"messages[{place}]"
    yield Part(f"{where}.content", message.content, "content", place)
    yield Part(f"{where}.reasoning_content", message.reasoning, "reasoning", place)
    for number, call in enumerate(message.tool_calls):
        yield Part(f"{where}.tool_calls[{number}].name", call.name, "call", place)
        for path, text in _leaves(json.loads(call.arguments)):
            yield Part(f"{where}.tool_calls[{number}].arguments{path}", text, "call", place)


def marked(messages: Sequence[Message], tools: Sequence[str], marks: Marks) -> tuple[list[Message], list[str]]:
    """The same conversation and tools with a mark behind every text."""
    turns = [marked_message(message, place, marks) for place, message in enumerate(messages)]
    return turns, [_marked_tool(tool, place, marks) for place, tool in enumerate(tools)]


def marked_message(message: Message, place: int, marks: Marks) -> Message:
    """The turn with a mark behind every text; names of called functions are marked too."""
    where = f"messages[{place}]"
    calls = []
    for number, call in enumerate(message.tool_calls):
        base = f"{where}.tool_calls[{number}]"
        arguments = _marked_values(json.loads(call.arguments), Part(f"{base}.arguments", "", "call", place), marks)
        name = marks.on(Part(f"{base}.name", call.name, "call", place))
        calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False), call.id))
    return replace(
        message,
        content=marks.on(Part(f"{where}.content", message.content, "content", place)),
        reasoning=marks.on(Part(f"{where}.reasoning_content", message.reasoning, "reasoning", place)),
        tool_calls=tuple(calls),
    )


def is_written(text: str, rendered: str) -> bool:
    """Whether a rendering holds a text, outer blanks aside: as it is, or escaped as JSON or Python write it."""
    bare = text.strip()
    forms = (bare, json.dumps(bare, ensure_ascii=False)[1:-1], json.dumps(bare)[1:-1], repr(bare)[1:-1])
    return any(form in rendered for form in forms)


def _marked_tool(tool: str, place: int, marks: Marks) -> str:
    schema = json.loads(tool)
    function = schema["function"]
    function["name"] = marks.on(Part(f"tools[{place}].name", function["name"], "tool"))
    if isinstance(function.get("description"), str):
        function["description"] = marks.on(Part(f"tools[{place}].description", function["description"], "tool"))
    return json.dumps(schema, ensure_ascii=False)


def _tool_texts(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name, description and parameters' names of a tool; templates write the rest of its schema each in its way."""
    function = schema["function"]
    yield ".name", function["name"]
    if isinstance(function.get("description"), str):
        yield ".description", function["description"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    for name in properties if isinstance(properties, dict) else ():
        yield f".parameters.{name}", name


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values of arguments as texts; a truth value is written differently by every language."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key}", key
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    elif isinstance(value, str):
        yield path, value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, json.dumps(value)


def _marked_values(value: Any, part: Part, marks: Marks) -> Any:
    """Arguments with a mark behind every text in them."""
    if isinstance(value, dict):
        return {key: _marked_values(inner, part, marks) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked_values(inner, part, marks) for inner in value]
    return marks.on(replace(part, text=value)) if isinstance(value, str) else value
