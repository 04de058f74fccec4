"""Recipes: every field of every table, found by introspection, with a value that it cannot have; damaged TOML."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Literal, get_args, get_origin

from thence.recipe import KINDS, Data, Model, Recipe
from thence.settings.annotations import members_of, whole_type
from thence.settings.limits import Name, Place, Source
from thence.toml import to_toml

from .damage import damaged
from .ground import Ground
from .harness import Case

TABLES: dict[str, Any] = {"": Recipe, "model": Model, "data": Data, **KINDS}
HUGE = "1" + "0" * 400
# as TOML, told apart by what they are
VALUES: dict[str, list[str]] = {
    "bool": ["true", "false"],
    "not finite": ["nan", "inf", "-inf"],
    "negative": ["-1", "-0.5", "-9223372036854775808"],
    "huge": ["1e300", "9223372036854775807", "9" * 30, HUGE],
    "fraction": ["0.5"],
    "text": ['"zzz no such thing"', '"8"', '"1e-3"'],
    "empty": ['""', '"   "'],
    "control": ['"a\\u0000b"', '"a\\u001b[2Jb"', '"a\\nb"', '"\\u009bx"'],
    "surrogate": ['"a\\ud800b"'],
    "long": ['"' + "x" * 100_000 + '"'],
    "list": ["[]", "[[]]", "[1, 2, 3]", "[" * 60 + "]" * 60],
    "table": ["{}", "{ a = 1 }", "{ a = " * 40 + "1" + " }" * 40],
    "date": ["1979-05-27", "07:32:00"],
}
_NUMBERS = {int, float}


def fields() -> list[tuple[str, str, Any]]:
    """Table, name and type of every field of a recipe."""
    return [
        (table, name, whole_type(field))
        for table, section in TABLES.items()
        for name, field in section.model_fields.items()
        if not field.exclude and not (table == "" and name in ("model", "data"))
    ]


def is_nonsense(table: str, name: str, kind: Any, sort: str, text: str) -> bool:
    """Whether a value can make no sense there, by rules that do not ask the recipe's own validation."""
    members = set(members_of(kind))
    if sort == "surrogate":
        return True
    if sort == "date":
        return Any not in members and dict not in {get_origin(member) for member in members}
    if members <= _NUMBERS:
        signed = name == "reward_right_from" and sort in ("negative", "fraction") and len(text) < 6
        unbounded = name == "seed" and text == "9223372036854775807"
        return not (signed or unbounded or (sort == "fraction" and float in members))
    if members == {bool}:
        return sort != "bool"
    if all(get_origin(member) is Literal for member in members):
        return text.strip('"') not in {str(value) for member in members for value in get_args(member)}
    if members == {str}:
        named = any(mark in _marks(kind) for mark in (Name, Place, Source))
        bad = sort in ("empty", "control", "long") and named
        return bad or sort in ("bool", "list", "table", "not finite", "negative", "huge", "fraction")
    origins = {get_origin(member) for member in members}
    if origins == {dict}:
        return sort != "table" or "a = {" in text
    if origins <= {list, tuple} and name != "fault":
        return sort != "list" or text != "[1, 2, 3]" or name != "temperatures"
    return name == "fault" and sort not in ("table",)


def _marks(kind: Any) -> list[Any]:
    """The named types of limits that an annotation has the bounds of."""
    own = list(getattr(kind, "__metadata__", ()))
    for part in get_args(kind):
        own += getattr(part, "__metadata__", ())
    return [named for named in (Name, Place, Source) if all(mark in own for mark in named.__metadata__)]


def bad_field(ground: Ground, folder: Path, rng: Random) -> Case:
    """One field of the whole recipe replaced by a value of another kind."""
    table, name, kind = rng.choice(fields())
    sort = rng.choice(list(VALUES))
    text = rng.choice(VALUES[sort])
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in ground.tables.items()}
    kept["folder"] = str(folder / "run")
    kept.get(table, kept).pop(name, None)
    if table == "model" and name == "path":
        kept["model"].pop("init")
    mark = "8191.5"
    (kept.setdefault(table, {}) if table else kept)[name] = float(mark)
    written = to_toml(kept)
    assert written.count(mark) == 1
    (folder / "recipe.toml").write_text(written.replace(mark, text), encoding="utf-8")
    label = f"{table}.{name}".strip(".")
    nonsense = is_nonsense(table, name, kind, sort, text)
    return Case(["run", "recipe.toml", "--dry-run"], f"{label} = {text[:60]}", nonsense)


def bad_text(ground: Ground, folder: Path, rng: Random) -> Case:
    """The whole recipe's text damaged."""
    raw = (
        ground.path("recipe.toml").read_bytes().replace(str(ground.path("run")).encode(), str(folder / "run").encode())
    )
    how, left = damaged(raw, rng)
    (folder / "recipe.toml").write_bytes(left)
    nonsense = not _is_text(left) or how in ("emptied", "doubled", "utf-16", "utf-32", "number", "conflict")
    return Case(["run", "recipe.toml", "--dry-run"], f"recipe.toml: {how}", nonsense)


def _is_text(raw: bytes) -> bool:
    try:
        return "\0" not in raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
