"""TOML text to plain values and back."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w

DEEPEST = 64
"""Tables in tables; a name with more parts is refused before the parser, whose time grows with their square."""
_LONG_NAME = re.compile(r"(?<![\w-])(?:[\w-]++\s*+\.\s*+){64}")


class NotTomlError(ValueError):
    """Why a text is no TOML, the line (None: not known), and what to do."""

    def __init__(self, problem: str, remedy: str, line: int | None = None):
        super().__init__(problem)
        self.remedy, self.line = remedy, line


def parse_toml(text: str) -> dict[str, Any]:
    """The tables that a TOML text holds. Raises NotTomlError, whatever the text is."""
    if long := _LONG_NAME.search(text):
        raise NotTomlError(f"a name of more than {DEEPEST} parts", "nest less", text[: long.start()].count("\n") + 1)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))
        raise NotTomlError(f"not valid TOML: {error}", "correct this line", int(at[1]) if at else None) from None
    except RecursionError:
        raise NotTomlError("nested too deep", f"nest at most {DEEPEST} lists or tables") from None
    except ValueError as error:  # a number of 5,000 digits
        raise NotTomlError(f"not valid TOML: {error}", "write a shorter number") from None


def to_toml(tables: Mapping[str, Any]) -> str:
    """Nested plain values as TOML text that :func:`parse_toml` reads back. None is left out."""
    return tomli_w.dumps(_without_none(tables))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value
