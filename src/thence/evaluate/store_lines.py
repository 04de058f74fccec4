"""What a line of an evaluation's store must hold, so that a damaged one is found before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thence.wording import json_kind

VERDICTS = ("right", "wrong", "graded", "unknown")
_SAMPLE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("problem", "question", "answer", "text", "finish", "source"), (str,)),
    **dict.fromkeys(("sample", "seed", "tokens", "room"), (int,)),
    **dict.fromkeys(("prompt", "options"), (list,)),
    "plain": (bool,),
}
_GRADE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("problem", "grader", "version", "verdict", "extracted", "reason"), (str,)),
    "sample": (int,),
    "score": (int, float),
}
_REFUSAL_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("problem", "question", "kind", "reason", "when"), (str,)),
    "sample": (int,),
}
_OPTIONAL = ("room", "options", "source", "plain", "extracted", "reason")
_MAY_BE_NULL = ("tokens", "room", "extracted")


def wrong_with_sample(line: dict[str, Any]) -> str | None:
    """What a line of ``samples/`` lacks; None: nothing."""
    if why := _wrong_types(line, _SAMPLE_TYPES):
        return why
    prompt, options = line["prompt"], line.get("options", [])
    if not all(isinstance(turn, list) and len(turn) == 2 and is_texts(turn) for turn in prompt):
        return "prompt is no list of roles and texts"
    return None if is_texts(options) else "options are no texts"


def wrong_with_grade(line: dict[str, Any]) -> str | None:
    """What a line of ``grades/`` lacks; None: nothing."""
    if why := _wrong_types(line, _GRADE_TYPES):
        return why
    return None if line["verdict"] in VERDICTS else f"no such verdict: {line['verdict'][:40]!r}"


def wrong_with_refusal(line: dict[str, Any]) -> str | None:
    """What a line of ``refused/`` lacks; None: nothing."""
    return _wrong_types(line, _REFUSAL_TYPES)


def _wrong_types(line: dict[str, Any], types: Mapping[str, tuple[type, ...]]) -> str | None:
    for name, kinds in types.items():
        if name not in line:
            if name not in _OPTIONAL:
                return f"it lacks {name}"
            continue
        value = line[name]
        if value is None and name in _MAY_BE_NULL:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return f"{name} is {json_kind(value)}"
    return None


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
