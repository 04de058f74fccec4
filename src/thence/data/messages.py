"""Conversations in a row: what a turn may hold, and which assistant turn is the demonstration.

Nothing that a turn holds is passed over: a key that is not known here makes the row a bad one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thence.data.example import FIRST_ROLES, ROLES, Message, ToolCall
from thence.data.fields import absent, need, text, wrong_type
from thence.data.problems import RowProblem

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "train", "training")
TEXT_KEYS = ("role", "content")
TOOL_KEYS = ("tool_call_id", "name")
_SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_REMEDIES = {
    "function_call": "write it as tool_calls",
    "images": "thence trains on text only",
    "audio": "thence trains on text only",
    "refusal": "write the refusal as the content",
    "name": "only a turn of role tool has a name; write it into the text",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A message with what the row says about training on it: True, False or nothing (None)."""

    message: Message
    trained: bool | None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation taken apart: the turns before the demonstration, and the demonstration if there is one."""

    prompt: tuple[Message, ...]
    response: Message | None


def conversation(row: Mapping[str, Any], field: str) -> Conversation:
    """The conversation in `field`.

    Without weights the last turn is the demonstration if it is the assistant's. As soon as one turn has a weight, the
    one assistant turn that is not switched off is the demonstration; what follows it could not change a trained
    token and is left out. With every assistant turn switched off there is no demonstration.

    Raises:
        RowProblem: a turn that cannot be used, several turns to train on, or no turn to respond to.
    """
    turns = read_turns(row, field)
    place = _trained_place(turns, field)
    response = None if place is None else turns[place].message
    before = [turn.message for turn in (turns if place is None else turns[:place])]
    if place is None and any(turn.trained is not None for turn in turns):
        while before and before[-1].role == "assistant":
            before.pop()
    check_prompt(before, field)
    return Conversation(tuple(before), response)


def prompt_turns(row: Mapping[str, Any], field: str) -> tuple[Message, ...]:
    """The turns of a column that holds a prompt only. Raises RowProblem."""
    turns = read_turns(row, field)
    for position, turn in enumerate(turns):
        if turn.trained:
            raise RowProblem(
                f"{field}[{position}]",
                "a turn of the prompt is marked to be trained, and only the response is trained",
                "remove the mark, or give the whole conversation in one column messages",
            )
    found = tuple(turn.message for turn in turns)
    check_prompt(found, field)
    return found


def response_turn(row: Mapping[str, Any], field: str) -> Message | None:
    """The one assistant turn of a column that holds a response; None where it is switched off. Raises RowProblem."""
    turns = read_turns(row, field)
    if len(turns) != 1 or turns[0].message.role != "assistant":
        roles = ", ".join(turn.message.role for turn in turns)
        raise RowProblem(field, f"expected one assistant message, found {roles}", "keep the one response to learn")
    return None if turns[0].trained is False else turns[0].message


def read_turns(row: Mapping[str, Any], field: str) -> tuple[Turn, ...]:
    """The list of messages in `field`, each checked by itself. Raises RowProblem."""
    value = need(row, field)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise wrong_type(field, value, "a list of {role, content}")
    if not value:
        raise RowProblem(field, "the list of messages is empty", "give at least a user turn")
    return tuple(_turn(item, f"{field}[{position}]") for position, item in enumerate(value))


def check_prompt(turns: Sequence[Message], field: str) -> None:
    """Refuse turns that nobody would respond to. Raises RowProblem."""
    if not any(turn.role == "user" for turn in turns):
        raise RowProblem(field, "no user turn to respond to", "give a user turn before the response")
    if turns[-1].role not in ("user", "tool"):
        raise RowProblem(
            field, f"the prompt ends with a turn of role {turns[-1].role}", "end the prompt with a user turn"
        )
    if any(turn.role in FIRST_ROLES for turn in turns[1:]):
        raise RowProblem(field, "a system turn that is not the first", "move the system turn to the front")


def read_tools(value: object) -> tuple[str, ...]:
    """The tools that a row offers, each a JSON object as text; the column holds a list, or a list as JSON text.

    Raises:
        RowProblem: no list of objects, each with a name.
    """
    field = "tools"
    if isinstance(value, str) and value.strip():
        value = _from_json(value, field, "give a list of JSON schemas")
    if absent(value):
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise wrong_type(field, value, "a list of JSON schemas")
    return tuple(_tool(item, f"{field}[{position}]") for position, item in enumerate(value))


def _tool(item: object, field: str) -> str:
    if isinstance(item, str):
        item = _from_json(item, field, "give a JSON schema")
    if not isinstance(item, Mapping):
        raise wrong_type(field, item, "a JSON schema")
    tool = _without_nulls(item)
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowProblem(f"{field}.name", "the tool has no name", 'write {"type": "function", "function": {...}}')
    if "function" not in tool:
        tool = {"type": "function", "function": tool}
    return json.dumps(tool, ensure_ascii=False)


def _turn(item: object, field: str) -> Turn:
    if not isinstance(item, Mapping):
        raise wrong_type(field, item, "an object with role and content")
    fields = {str(key): value for key, value in item.items() if not absent(value) or key in TEXT_KEYS}
    if "role" not in fields and "from" in fields:
        fields = _share_gpt(fields, field)
    role = fields.pop("role", None)
    if role not in ROLES:
        known = f"use one of {', '.join(ROLES)}"
        raise RowProblem(f"{field}.role", f"unknown role {role!r}", _role_remedy(role) or known)
    trained = _weight(fields, field, role)
    reasoning = _reasoning(fields, field, role)
    calls = _tool_calls(fields, field, role)
    content = _content(fields.pop("content", None), f"{field}.content", role, bool(calls))
    named = {key: text(fields.pop(key), f"{field}.{key}") for key in TOOL_KEYS if role == "tool" and key in fields}
    if fields:
        key = sorted(fields)[0]
        raise RowProblem(
            f"{field}.{key}",
            f"a turn of role {role} has a key {key!r}, which thence would not train on",
            _REMEDIES.get(key, "remove the key, or write what it says into the content"),
        )
    message = Message(str(role), content, reasoning, calls, **named)
    if reasoning and content.lstrip().startswith("<think>"):
        raise RowProblem(f"{field}.content", "thinking in the content and beside it", "keep one of the two")
    return Turn(message, trained)


def _share_gpt(fields: dict[str, Any], field: str) -> dict[str, Any]:
    """A turn of ShareGPT's {from, value} with the usual names."""
    speaker, rest = fields["from"], {key: value for key, value in fields.items() if key not in ("from", "value")}
    if speaker not in _SHARE_GPT_ROLES:
        raise RowProblem(f"{field}.from", f"unknown speaker {speaker!r}", f"use one of {', '.join(_SHARE_GPT_ROLES)}")
    return {**rest, "role": _SHARE_GPT_ROLES[speaker], "content": fields.get("value")}


def _role_remedy(role: object) -> str:
    return {"function": "use role tool", "human": "use role user", "gpt": "use role assistant"}.get(str(role), "")


def _weight(fields: dict[str, Any], field: str, role: str) -> bool | None:
    """What the row says about training on the turn; None: nothing. Raises RowProblem."""
    said = {}
    for key in WEIGHT_KEYS:
        if key in fields:
            value = fields.pop(key)
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise RowProblem(f"{field}.{key}", f"{value!r} is neither 0 nor 1", "write 0 or 1, true or false")
            said[key] = bool(value)
    if not said:
        return None
    if len(set(said.values())) > 1:
        raise RowProblem(field, f"{' and '.join(said)} contradict each other", "keep one of them")
    key, value = next(iter(said.items()))
    if value and role != "assistant":
        raise RowProblem(
            f"{field}.{key}", f"a turn of role {role} is marked to be trained", "only assistant turns are trained"
        )
    return value


def _reasoning(fields: dict[str, Any], field: str, role: str) -> str:
    found = {key: text(fields.pop(key), f"{field}.{key}") for key in REASONING_KEYS if key in fields}
    if not found:
        return ""
    key, value = next(iter(found.items()))
    if role != "assistant":
        raise RowProblem(f"{field}.{key}", f"a turn of role {role} has reasoning", "only assistant turns think")
    if len(set(found.values())) > 1:
        raise RowProblem(f"{field}.{key}", f"{' and '.join(found)} differ", "keep one of them")
    return value


def _tool_calls(fields: dict[str, Any], field: str, role: str) -> tuple[ToolCall, ...]:
    if "tool_calls" not in fields:
        return ()
    value, field = fields.pop("tool_calls"), f"{field}.tool_calls"
    if role != "assistant":
        raise RowProblem(field, f"a turn of role {role} calls tools", "only assistant turns call tools")
    if isinstance(value, str):
        value = _from_json(value, field, "give a list of calls")
    if not isinstance(value, Sequence):
        raise wrong_type(field, value, "a list of calls")
    return tuple(_tool_call(item, f"{field}[{position}]") for position, item in enumerate(value))


def _tool_call(item: object, field: str) -> ToolCall:
    if not isinstance(item, Mapping):
        raise wrong_type(field, item, 'an object {"function": {"name", "arguments"}}')
    call = {str(key): value for key, value in item.items() if not absent(value)}
    kind, name, index = call.pop("type", "function"), call.pop("id", ""), call.pop("index", None)
    function = call.pop("function", None)
    if function is None:
        function, call = call, {}
    if kind != "function" or call or not isinstance(function, Mapping) or not (index is None or isinstance(index, int)):
        wrong = kind if kind != "function" else ", ".join(sorted(call)) or type(function).__name__
        raise RowProblem(field, f"not the call of a function: {wrong}", "write {id, type, function: {name, arguments}}")
    parts = {str(key): value for key, value in function.items() if not absent(value) or key == "arguments"}
    called, arguments = parts.pop("name", None), parts.pop("arguments", None)
    if parts:
        raise RowProblem(f"{field}.{sorted(parts)[0]}", "an unknown key of a call", "a call has name and arguments")
    text(called, f"{field}.name")
    if _has_null(arguments):
        raise RowProblem(
            f"{field}.arguments",
            "a null, which may be the row's own or come from the file's format",
            "give the arguments as JSON text, or without nulls",
        )
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", f"{field}.arguments", "give a JSON object")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise wrong_type(f"{field}.arguments", arguments, "a JSON object")
    written = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(called), text(written, f"{field}.arguments"), str(name))


def _content(value: object, field: str, role: str, calls: bool) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and value:
        value = _joined(value, field)
    if value is None:
        if calls:
            return ""
        raise RowProblem(field, "missing or null", "give the text of the turn")
    # An empty system turn has a meaning: it keeps templates from adding their default one.
    return text(value, field, may_be_empty=calls or role in FIRST_ROLES)


def _joined(parts: Sequence[Any], field: str) -> str:
    """The text of a content in parts: {type: text, text}. Raises RowProblem."""
    texts = []
    for position, part in enumerate(parts):
        where = f"{field}[{position}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise wrong_type(where, part, "an object {type: text, text}")
        given = {key: value for key, value in part.items() if not absent(value) or key == "text"}
        kind = given.pop("type", "text")
        words = given.pop("text", None)
        if kind != "text" or given:
            what = kind if kind != "text" else sorted(given)[0]
            raise RowProblem(where, f"a part of the kind {what!r}", "thence trains on text only; leave the part out")
        texts.append(text(words, f"{where}.text"))
    if len(texts) > 1:
        raise RowProblem(field, f"{len(texts)} text parts, and nothing says how they join", "join them to one text")
    return texts[0]


def _trained_place(turns: Sequence[Turn], field: str) -> int | None:
    """The place of the assistant turn to train on; None: none. Raises RowProblem where there are several."""
    assistant = [place for place, turn in enumerate(turns) if turn.message.role == "assistant"]
    if all(turn.trained is None for turn in turns):
        return len(turns) - 1 if assistant and assistant[-1] == len(turns) - 1 else None
    trained = [place for place in assistant if turns[place].trained is not False]
    if len(trained) > 1:
        raise RowProblem(
            f"{field}[{trained[0]}]",
            f"{len(trained)} assistant turns are to be trained, and a row trains one",
            "write one row for each of them, and set weight 0 on the other assistant turns of the row",
        )
    return trained[0] if trained else None


def _from_json(text: str, field: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowProblem(field, f"not JSON: {error}", remedy) from None


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(inner is None or _has_null(inner) for inner in value.values())
    return isinstance(value, list | tuple) and any(inner is None or _has_null(inner) for inner in value)


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that readers of Parquet add to objects."""
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_without_nulls(inner) for inner in value]
    return value
