"""What is trained of each form of conversation under the chat templates of common model families.

    python benchmarks/chat_templates.py            # write docs/chat-templates.md
    python benchmarks/chat_templates.py --check    # exit with 1 where the page is not what the code does

The templates are in tests/data/templates: our own short versions of what each family documents. Tokenizers are made
here, a token a character besides the family's special tokens, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from thence.data.chat import ChatFormat, Rendered, chat_format, end_token_ids, render
from thence.data.example import Example
from thence.data.layouts import parse_row
from thence.data.problems import RowProblem
from thence.data.show import checks
from thence.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "tests" / "data" / "templates"
PAGE = ROOT / "docs" / "chat-templates.md"
LETTERS = "".join(map(chr, range(32, 127))) + "\n"
WEATHER = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "forecast", "arguments": '{"city": "Oslo"}'}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


ANSWER = said("It is 4.")
FORMS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user("2+2?"), ANSWER]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("2+2?"), ANSWER]},
    "empty system": {"messages": [{"role": "system", "content": ""}, user("2+2?"), ANSWER]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, user("2+2?"), ANSWER]},
    "several turns": {"messages": [user("Hello."), said("Good day."), user("2+2?"), ANSWER]},
    "reasoning": {"messages": [user("2+2?"), said("It is 4.", reasoning_content="Two pairs.")]},
    "think tags in the text": {"messages": [user("2+2?"), said("<think>\nTwo pairs.\n</think>\n\nIt is 4.")]},
    "reasoning of an earlier turn": {
        "messages": [user("Hello."), said("Good day.", reasoning_content="A greeting."), user("2+2?"), ANSWER]
    },
    "tool call": {"messages": [user("Weather?"), said("", tool_calls=[CALL])], "tools": [WEATHER]},
    "text and tool call": {"messages": [user("Weather?"), said("I look.", tool_calls=[CALL])], "tools": [WEATHER]},
    "after a tool's result": {
        "messages": [
            user("Weather?"),
            said("", tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "abcdef123", "name": "forecast", "content": '"sunny"'},
            said("It is sunny."),
        ],
        "tools": [WEATHER],
    },
    "thinking never closed": {"messages": [user("2+2?"), said("<think>\nTwo pairs. It is 4.")]},
    "only the first answer weighs": {
        "messages": [user("2+2?"), said("It is 4.", weight=1), user("Thanks."), said("Welcome.", weight=0)]
    },
}
OFF = "one turn, enable_thinking = false"


SIGNS = {
    "the template leaves out": ("(a)", "the template leaves out the thinking of earlier assistant turns"),
    "the template writes": ("(b)", "the template writes text of its own before the response, and it is trained"),
    "thinking in": ("(c)", "thinking in another model's tags is trained as ordinary text"),
}


@dataclass(frozen=True)
class Family:
    """A family of models: its template and what its tokenizer is like."""

    key: str
    title: str
    documentation: str
    jinja: str
    tokens: list[str]
    eos: str
    ends: list[str]
    bos: str | None = None
    adds_bos: bool = False
    variables: dict[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """A form of conversation under a template: what is trained, or why the row is refused."""

    example: Example
    row: Rendered | None
    trained: str
    refusal: str


def families() -> list[Family]:
    """All families of tests/data/templates/families.toml, in its order."""
    found = tomllib.loads((TEMPLATES / "families.toml").read_text(encoding="utf-8"))
    return [
        Family(key, jinja=(TEMPLATES / f"{key}.jinja").read_text(encoding="utf-8"), **about)
        for key, about in found.items()
    ]


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A token a character, and the family's special tokens."""
    core = Tokenizer(models.WordLevel({char: i for i, char in enumerate(["?unk", *LETTERS])}, unk_token="?unk"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens])
    if family.adds_bos and family.bos:
        begin = {"id": "begin", "ids": [core.token_to_id(family.bos)], "tokens": [family.bos]}
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="begin $A", special_tokens=[begin]
        )
    names = {"bos_token": family.bos} if family.bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=family.eos, unk_token="?unk", **names)
    tokenizer.chat_template = family.jinja
    return tokenizer


def model_of(family: Family, tokenizer: PreTrainedTokenizerFast) -> SimpleNamespace:
    """What a model's generation_config.json says about its end tokens."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in family.ends]
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends), config=None)


def cell(row: dict[str, Any], tokenizer: Any, chat: ChatFormat) -> Cell:
    """Render one row. Anything but a rendering or a refusal is an error of thence, and is raised."""
    example = Example(prompt="", source="row:1")
    try:
        example = parse_row("messages", row, source="row:1", group="row")
        rendered = render(example, tokenizer, template=chat)
    except (RowProblem, DataError) as problem:
        where = f"`{problem.field}`: " if problem.field else ""
        return Cell(example, None, "", where + problem.problem)
    trained = str(tokenizer.decode(rendered.response_ids or [], skip_special_tokens=False))
    return Cell(example, rendered, trained, "")


def cells(family: Family) -> Iterator[tuple[str, ChatFormat, Cell]]:
    """Every form under a family's template; thinking switched off where the template knows how."""
    tokenizer = tokenizer_of(family)
    chat = chat_format(tokenizer, "own", family.variables)
    for name, row in FORMS.items():
        yield name, chat, cell(row, tokenizer, chat)
    if "enable_thinking" in family.jinja:
        off = chat_format(tokenizer, "own", {**(family.variables or {}), "enable_thinking": False})
        yield OFF, off, cell(FORMS["one turn"], tokenizer, off)


def section(family: Family) -> list[str]:
    """A family's part of the page."""
    tokenizer = tokenizer_of(family)
    chat = chat_format(tokenizer, "own", family.variables)
    stops = end_token_ids(tokenizer, chat, model_of(family, tokenizer))
    end, *others = (f"`{token}`" for token in tokenizer.convert_ids_to_tokens(list(stops)))
    lines = [f"## {family.title}", "", f"Format: <{family.documentation}>.", ""]
    lines.append(f"End of turn: {end}. Other tokens that stop sampling: {', '.join(others) or 'none'}.")
    lines += ["", "| conversation | trained, or the reason for refusing the row |", "|---|---|"]
    found = list(cells(family))
    for name, _, one in found:
        lines.append(f"| {name} | {_shown(one)} |")
    first = next((c for _, _, c in found if c.row is not None), None)
    if first is not None and first.row is not None:
        looked = checks(first.example, first.row, tokenizer, chat, stop_ids=stops)
        lines += ["", *(f"* {check.name}: {check.reason}" for check in looked if check.ok is False)]
    return [*lines, ""] if lines[-1] else lines


def page() -> str:
    """The whole page."""
    lines = [
        "# Chat templates",
        "",
        "`python benchmarks/chat_templates.py` writes this page; `tests/data/test_templates.py` checks it. The",
        "templates are short versions of what each family documents (`tests/data/templates`), with its peculiarities.",
        "For your own model, run `thence check MODEL --data FILE`.",
        "",
        "`⏎` is a line break. A **refused** row stops the run with file and line, or is listed with `skip_bad`. Every",
        "text of a row is in the prompt or in the trained response, or the row is refused. The log counts what a",
        "template adds, and the one thing that it may leave out. They are marked here:",
        "",
        *(f"* {sign} {words}" for sign, words in SIGNS.values()),
        "",
    ]
    for family in families():
        lines += section(family)
    return "\n".join(lines).rstrip() + "\n"


def _shown(one: Cell) -> str:
    if one.row is None:
        return f"**refused**: {_escaped(one.refusal)}"
    text = f"`{_escaped(one.trained)}`"
    return text + "".join(
        f" {sign}" for note in one.row.notes for key, (sign, _) in SIGNS.items() if note.startswith(key)
    )


def _escaped(text: str) -> str:
    return text.replace("\n", "⏎").replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where the page is not up to date"
    )
    args = parser.parse_args()
    if args.check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
