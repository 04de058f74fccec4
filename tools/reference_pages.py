"""Writes the pages of reference from the program itself. `make reference` runs it; a test says when a page is stale.

    python tools/reference_pages.py

docs/commands.md has the help of every command, docs/fields.md every field of a recipe and of a comparison,
docs/method-list.md every method with its formula, source and options, docs/api.md the public Python names.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
WIDTH = "100"
PUBLIC = {
    "thence": "",
    "thence.audit": "",
    "thence.methods.base": "Method Options TokenFacts Teacher Weights Sampler SideStep make_batch reward_of",
    "thence.methods.grpo": "Grpo GrpoOptions",
    "thence.objective": "Term Normaliser Logp Ratio Clip Prob Shape ShapeRatio TrSft Entropy NegativeKl",
    "thence.data.trajectory": "Prompt Trajectory",
    "thence.data.readers": "read_examples",
    "thence.data.chat": "chat_format end_token_ids render_all trained_share",
    "thence.data.worlds.vocabulary": "save_tokenizer",
    "thence.evaluate.problems": "load_problems",
    "thence.evaluate.suites": "load_suite",
    "thence.faults.catalogue": "FAULTS",
    "thence.faults.cut": "cut_rows",
    "thence.faults.step": "FaultyStep",
    "thence.rollout.vllm.engine": "VllmEngine",
    "thence.rollout.vllm.settings": "VllmSettings",
    "thence.settings.limits": "Coefficient",
}
"""Module -> its public names; none given: those of its `__all__`."""
HEAD = "<!-- Written by `make reference`; do not edit. -->\n"


def main() -> int:
    """Write the pages."""
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text)
        print(f"docs/{name}: {len(text.splitlines())} lines")
    return 0


def pages() -> dict[str, str]:
    """Name -> text of every page."""
    return {
        "commands.md": commands_page(),
        "fields.md": fields_page(),
        "method-list.md": methods_page(),
        "api.md": api_page(),
    }


def commands_page() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    from thence.cli.app import COMMANDS

    parts = [f"# Commands\n\n{HEAD}\nWhat `thence COMMAND --help` prints.\n\n```text\n{_help()}\n```\n"]
    parts += [f"## thence {name}\n\n{said}\n\n```text\n{_help(name)}\n```\n" for name, said in COMMANDS.items()]
    return "\n".join(parts)


def _help(*command: str) -> str:
    from thence.cli import main as thence

    told = io.StringIO()
    plain = {"COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}
    with patch.dict(os.environ, plain), contextlib.redirect_stdout(told):
        thence([*command, "--help"])
    return "\n".join(line.rstrip() for line in told.getvalue().strip("\n").splitlines())


def fields_page() -> str:
    """Every field of a recipe and of a comparison."""
    from thence.compare.recipe import ComparisonRecipe
    from thence.pipeline.changes import RULES
    from thence.recipe import KINDS, Recipe

    tables = dict(_tables(Recipe, "")) | {name: kind for kind, section in KINDS.items() for name in [kind]}
    tables = {name: KINDS.get(name, section) for name, section in tables.items()}
    nested = {place: table for kind in KINDS for place, table in _tables(KINDS[kind], kind)}
    parts = [
        f"# Fields of a recipe\n\n{HEAD}\n"
        "A recipe is a TOML file ([how](running.md)). Every field is also a flag of `thence run` and `thence check`:\n"
        "`--table.field VALUE`, with `-` for `_`. The last column says whether a field may change when a run is\n"
        "resumed; a stage that has not begun takes any settings.\n",
        *(_table_of(name, section, RULES) for name, section in (tables | nested).items()),
        "## When a run is resumed\n",
        "\n".join(f"- **{key}**: {says}" for key, says in _rules(RULES).items()) + "\n",
        "## Fields of a comparison\n",
        "A comparison is a TOML file too ([how](compare.md)).\n",
        *(_table_of(name, section, {}, "###") for name, section in _tables(ComparisonRecipe, "")),
    ]
    return "\n".join(parts)


def _tables(section: Any, place: str) -> Iterator[tuple[str, Any]]:
    """A table and those within it, with their dotted names; of a mapping to tables, NAME stands for the key."""
    from thence.settings.annotations import fields_in, members_of, whole_type

    yield place, section
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        for member in members_of(whole_type(field)):
            inner = f"{place}.{name}" if place else name
            if fields_in(member):
                yield from _tables(member, inner)
            for one in getattr(member, "__args__", ())[1:]:
                if fields_in(one):
                    yield from _tables(one, f"{inner}.NAME")


def _table_of(name: str, section: Any, rules: Mapping[str, Any], level: str = "##") -> str:
    title = f"`[{name}]`" if name else "At the top of the file"
    told = _plain(inspect.getdoc(section) or "")
    last = " resuming |" if rules.get(name) else ""
    lines = [f"{level} {title}\n\n{told}\n\n| field | takes | default | meaning |{last}"]
    lines.append("|---|---|---|---|" + ("---|" if last else ""))
    for field, said in section.model_fields.items():
        if said.exclude or _holds_tables(said):
            continue
        rule = rules.get(name, {}).get(field)
        cells = [f"`{field}`", _takes(said), _default(said), _plain(said.description or "")]
        lines.append("| " + " | ".join(map(_cell, [*cells, *([rule.key if rule else ""] if last else [])])) + " |")
    return "\n".join(lines) + "\n"


def _holds_tables(field: Any) -> bool:
    """Whether a field is a table that has a section of its own on the page, and says nothing beside."""
    from thence.settings.annotations import fields_in, members_of, whole_type

    return not field.description and any(fields_in(member) for member in members_of(whole_type(field)))


def _takes(field: Any) -> str:
    from thence.settings.annotations import takes, whole_type

    return takes(whole_type(field))


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _rules(rules: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {rule.key: rule.says for table in rules.values() for rule in table.values()}


def methods_page() -> str:
    """Every method, those of one file together, in the order of `thence methods`."""
    from thence.methods.registry import OWN

    files: dict[str, list[Any]] = {}
    for method in OWN:
        files.setdefault(method.__module__, []).append(method)
    parts = [
        f"# Every method\n\n{HEAD}\n"
        "From the files under `src/thence/methods`: formula, source, what differs from the released code, and the\n"
        "options of `[sft.options]` and `[rl.options]`. [methods.md](methods.md) explains what they share.\n"
    ]
    for module, methods in files.items():
        parts.append(f"## {', '.join(method.name for method in methods)}\n")
        parts.append(_plain(inspect.cleandoc(sys.modules[module].__doc__ or "")) + "\n")
        for method in methods:
            own = f"**{method.name}** ({method.exactness}; stage {method.stage}). Source: {_plain(method.source)}."
            parts.append(f"{own}\n\n    {method.formula}\n")
        parts += [_options(options, methods) for options in dict.fromkeys(method.Options for method in methods)]
    return "\n".join(parts)


def _options(options: Any, methods: list[Any]) -> str:
    names = ", ".join(f"`{method.name}`" for method in methods if method.Options is options)
    if not options.model_fields:
        return f"{names}: no options.\n"
    return _fields_of(options, f"option of {names}")


def api_page() -> str:
    """The public Python names, with their signatures and docstrings."""
    parts = [
        f"# Python reference\n\n{HEAD}\n"
        "The names that the pages and examples use, by module. [python.md](python.md) shows them at work.\n"
    ]
    for module, names in PUBLIC.items():
        home = importlib.import_module(module)
        parts.append(f"## {module}\n")
        listed = names.split() or [name for name in home.__all__ if not name.startswith("__")]
        parts += [_entry(name, getattr(home, name)) for name in listed]
    return "\n".join(parts)


def _entry(name: str, value: Any) -> str:
    if not inspect.isclass(value) and not isinstance(value, FunctionType):
        return f"### {name}\n\n{_about_value(value)}\n"
    parts = [f"### {name}\n"]
    if not hasattr(value, "model_fields"):
        parts.append(f"```text\n{_signature(name, value)}\n```\n")
    parts.append(_docstring(value))
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if method.startswith("_") or not isinstance(function, FunctionType | property | classmethod):
                continue
            inner = function.fget if isinstance(function, property) else function
            inner = inner.__func__ if isinstance(inner, classmethod) else inner
            if inner is not None and inner.__doc__:
                shown = method if isinstance(function, property) else _signature(method, inner)
                parts.append(f"**`{' '.join(shown.split())}`**\n\n{_docstring(inner)}")
        if hasattr(value, "model_fields") and value.model_fields:
            parts.append(_fields_of(value, "field"))
    return "\n".join(parts)


def _fields_of(value: Any, heading: str) -> str:
    """A model's fields as a table; those that are tables have a place of their own."""
    lines = [f"| {heading} | takes | default | meaning |", "|---|---|---|---|"]
    for name, field in value.model_fields.items():
        if not field.exclude and not _holds_tables(field):
            cells = [f"`{name}`", _takes(field), _default(field), _plain(field.description or "")]
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _about_value(value: Any) -> str:
    """What a value that is neither class nor function is."""
    if isinstance(value, ModuleType):
        return f"The module `{value.__name__}`. {(value.__doc__ or '').strip().splitlines()[0]}"
    if isinstance(value, Mapping):
        return f"A table of {len(value)}: {', '.join(f'`{key}`' for key in value)}."
    return f"`{re.sub(r'(?:[a-z_]+[.])+([A-Z])', chr(92) + '1', str(value))}`"


class _Text(str):
    """An annotation, which inspect shows as it stands and not in quotes."""

    __repr__ = str.__str__


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    told = [
        one.replace(annotation=_raw(one.annotation), default=_named(one.default))
        for one in signature.parameters.values()
        if one.name not in ("self", "cls")
    ]
    result = _raw(signature.return_annotation)
    text = name + str(signature.replace(parameters=told, return_annotation=inspect.Signature.empty))
    arrow = "" if result is inspect.Signature.empty or inspect.isclass(value) else f" -> {result}"
    if len(text + arrow) > int(WIDTH):
        text = f"{name}(\n    {_one_a_line(text[len(name) + 1 : -1])},\n)"
    return text + arrow


def _raw(annotation: Any) -> Any:
    return _Text(annotation) if isinstance(annotation, str) else annotation


def _named(default: Any) -> Any:
    """A function as its name: its address differs from run to run."""
    return _Text(default.__name__) if isinstance(default, FunctionType) else default


def _one_a_line(inside: str) -> str:
    """Parameters with a break after each comma that is outside of brackets."""
    depth, text = 0, ""
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        text += letter + ("\n   " if letter == "," and depth == 0 else "")
    return text


def _docstring(value: Any) -> str:
    """A docstring in Google's form as Markdown."""
    from docstring_parser import google

    whole = inspect.getdoc(value) or ""
    told = google.parse(whole)
    # not from the parser, which loses the indent of a formula
    text = _plain(re.split(r"^(?:Args|Returns|Yields|Raises):$", whole, flags=re.MULTILINE)[0].rstrip()) + "\n"
    lists = [
        ("", [(f"`{one.arg_name}`", one.description) for one in told.params]),
        ("Returns", [("", told.returns.description)] if told.returns and told.returns.description else []),
        ("Raises", [(f"`{one.type_name}`" if one.type_name else "", one.description) for one in told.raises]),
    ]
    for title, rows in lists:
        if rows:
            lines = [f"- {': '.join(part for part in (name, _plain(said or '', True)) if part)}" for name, said in rows]
            text += ("\n" + f"{title}:\n" if title else "") + "\n" + "\n".join(lines) + "\n"
    return text


def _plain(text: str, one_line: bool = False) -> str:
    """A docstring's text as Markdown: roles and double backticks become code, stars stay stars."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`").replace("::\n", ":\n")
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if not block.startswith("    ") or one_line:
            parts = re.split(r"(`[^`]*`)", " ".join(block.split()) if one_line else block)
            block = "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)
        blocks.append(block)
    return "\n\n".join(blocks)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
