"""What the pages show works: known commands, flags and fields; valid tables; Python that runs as it stands."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.repository.blocks import GENERATED, PAGES, Block, blocks_of, commands_of, words
from thence.accounting.hardware import parse_hardware
from thence.cli.app import COMMANDS, command
from thence.cli.parsing import bind
from thence.compare.contrasts import Contrast
from thence.compare.recipe import load_comparison, shipped_comparisons
from thence.data.readers import read_examples
from thence.errors import UserError
from thence.evaluate.suites import load_suite, shipped_suites
from thence.methods.registry import methods
from thence.recipe import load_recipe, shipped_recipes

CHECKED = [page for page in PAGES if page.name not in {"CHANGELOG.md", *GENERATED}]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
OWN_METHODS = ("sequence_ratio",)  # of examples/
STAND_IN = "quickstart"  # for a recipe that only the reader has


def by_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def by_place(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("page", CHECKED, ids=by_page)
def test_every_command_on_a_page_is_one_that_thence_takes(page: Path) -> None:
    wrong = []
    for place, given in commands_of(page):
        try:
            check_command(given)
        except (UserError, AssertionError) as error:
            wrong.append(f"{place}: thence {' '.join(given)}: {error}")
    assert not wrong, "\n".join(wrong)


def check_command(given: list[str]) -> None:
    """Refuse a command that thence would refuse to understand. Nothing is done. Raises UserError or AssertionError."""
    name, *rest = given
    if name in ("--version", "--help", "help"):
        return
    command(name)
    if not rest:  # the name of a command; what it needs is said elsewhere
        return
    if rest[-1] == "...":
        rest.pop()
    try:
        call = bind(name, rest)
    except UserError as error:
        if len(rest) == 1 and "needs a value" in error.problem:  # a flag that is only named
            return
        raise
    assert isinstance(call, partial)
    first = str(call.args[0]) if call.args and call.args[0] is not None else ""
    known = {
        "run": shipped_recipes(),
        "plan": shipped_recipes(),
        "recipes": shipped_recipes(),
        "compare": shipped_comparisons(),
        "methods": {*methods(), *OWN_METHODS},
    }.get(name)
    if known is not None and first and not is_the_readers(first):
        assert first in known, f"{first} is none of {', '.join(known)}"
    if "overrides" in call.keywords:
        own = {"rl.method": "grpo"} if call.keywords["overrides"].get("rl.method") in OWN_METHODS else {}
        load_recipe(first if first in shipped_recipes() else STAND_IN, call.keywords["overrides"] | own)
    suite = call.keywords.get("suite")
    assert suite is None or is_the_readers(suite) or suite in shipped_suites(), f"no suite {suite}"


def is_the_readers(name: str) -> bool:
    """Whether a name stands for something of the reader's: a file, or a word in capitals."""
    return name.isupper() or "/" in name or name.endswith((".toml", ".jsonl", ".py"))


@pytest.mark.parametrize(
    "given",
    [
        "tarin",
        "run quickstart --sft.lrr 1",
        "run quickstart --sft.lr high",
        "run nonesuch",
        "methods gpro",
        "eval --no",
    ],
)
def test_a_command_that_thence_does_not_take_is_found(given: str) -> None:
    with pytest.raises((UserError, AssertionError)):
        check_command(given.split())


def test_commands_are_found_where_they_stand() -> None:
    text = """\
Say `thence run a.toml --sft.lr 1` or `thence
doctor`.

```
thence run b.toml \\
  --rl.steps 4 && thence doctor   # thence methods
A=1 torchrun --nproc-per-node 2 -m thence run c.toml > log
x/bin/thence doctor
# thence methods
```

```python
thence run
```
"""
    found = [given for _, given in commands_of(ROOT / "README.md", text)]
    assert found == [
        ["run", "b.toml", "--rl.steps", "4"],
        ["doctor"],
        ["run", "c.toml"],
        ["doctor"],
        ["run", "a.toml", "--sft.lr", "1"],
        ["doctor"],
    ]
    assert words("""a 'b c' --x='["d"]' # e""") == ["a", "b c", '--x=["d"]']


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=by_place)
def test_a_table_on_a_page_is_valid(block: Block, tmp_path: Path) -> None:
    tables = tomllib.loads(block.text)
    if "arms" in tables:
        load_comparison(tables)
    elif "contrasts" in tables:
        named = [tables["covariate"]["arm"], *(contrast["arm"] for contrast in tables["contrasts"])]
        named += [name for contrast in tables["contrasts"] for name in Contrast(**contrast).others]
        bases = {"b": {"path": "base"}}
        given = {"reference": named[0], "seeds": [0, 1, 2, 3], "bases": bases, "arms": {name: {} for name in named}}
        load_comparison({**given, **tables})
    elif "bases" in tables:
        arms = {"a": {"kind": "sft", "grid": {"lr": [1e-4, 1e-3]}}}
        load_comparison({"reference": "a", "seeds": [0], "arms": arms, **tables})
    elif "tasks" in tables:
        (tmp_path / "suite.toml").write_text(block.text)
        load_suite(str(tmp_path / "suite.toml"))
    elif "like" in tables and "per_node" in tables:
        (tmp_path / "hardware.toml").write_text(block.text)
        parse_hardware(str(tmp_path / "hardware.toml"))
    elif "project" in tables or block.mark == "not run":
        assert block.mark != "not run" or block.said
    else:
        whole = {"stages", "model", "data"} <= set(tables)
        base = {} if whole else tomllib.loads(shipped_recipes()[STAND_IN].read_text())
        load_recipe(laid_over(base, tables))


def laid_over(base: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the tables of a block in place of its own, so that a block may show only a part."""
    model = {"model": {**base.get("model", {}), **tables.get("model", {})}}
    return {**base, **tables, **model}


@pytest.mark.parametrize("block", PYTHON, ids=by_place)
def test_python_on_a_page_has_a_mark_and_imports_what_is_there(block: Block) -> None:
    assert block.mark in ("run", "file") or (block.mark == "not run" and block.said), (
        "put <!-- run -->, <!-- file: NAME --> or <!-- not run: REASON --> on the line before the block"
    )
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "thence":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "json" and b.page.name == "data.md"], ids=by_place
)
def test_a_row_on_the_page_of_data_is_read(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(block.text)
    examples, bad = read_examples([str(file)])
    assert len(examples) == len(block.text.splitlines()) and not list(bad)


def test_the_python_page_shows_the_example() -> None:
    *_, shown = [block.text for block in blocks_of(ROOT / "docs/python.md")]
    assert (ROOT / "examples/own_reward.py").read_text().endswith("\n" + shown)


RUNNING = sorted({block.page for block in PYTHON if block.mark == "run"} - {ROOT / "docs/tutorial.md"})


@pytest.mark.parametrize("page", RUNNING, ids=by_page)
def test_python_on_a_page_runs_as_it_stands(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.mark == "file":
            Path(block.said).write_text(block.text)
    for block in blocks_of(page):
        if block.mark == "run" and block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
    capsys.readouterr()


def test_every_mark_belongs_to_a_block() -> None:
    for page in PAGES:
        marks = sum(line.lstrip().startswith(("<!-- run", "<!-- file", "<!-- not run")) for line in page.open())
        assert marks == sum(bool(block.mark) for block in blocks_of(page)), page


def test_there_is_something_to_check() -> None:
    assert set(COMMANDS) <= {given[0] for page in CHECKED for _, given in commands_of(page) if given}
    assert len(PYTHON) > 10 and len(RUNNING) > 4
