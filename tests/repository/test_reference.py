"""The pages of reference are what the program says now, and lack nothing that the other pages use."""

from __future__ import annotations

import re
import sys

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import reference_pages


@pytest.mark.parametrize("name", ["commands.md", "fields.md", "method-list.md", "api.md"])
def test_a_page_is_what_the_program_says(name: str) -> None:
    page = {
        "commands.md": reference_pages.commands_page,
        "fields.md": reference_pages.fields_page,
        "method-list.md": reference_pages.methods_page,
        "api.md": reference_pages.api_page,
    }[name]
    assert (ROOT / "docs" / name).read_text() == page(), "run `make reference`"


def test_every_field_of_a_recipe_is_on_the_page() -> None:
    from thence.cli.fields import field_flags

    page = (ROOT / "docs/fields.md").read_text()
    for flag in field_flags():
        table, _, field = flag[2:].replace("-", "_").rpartition(".")
        part = page.split(f"## `[{table}]`\n" if table else "## At the top of the file\n")[1].split("\n## ")[0]
        assert f"| `{field}` |" in part, flag


def test_every_name_that_a_page_or_an_example_imports_is_on_the_page() -> None:
    page = (ROOT / "docs/api.md").read_text()
    used = set()
    for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.py")]:
        for module, names in re.findall(r"^ *from (thence[\w.]*) import ([\w, ]+)$", file.read_text(), re.MULTILINE):
            used |= {(module, name.strip()) for name in names.split(",")}
    assert len(used) > 15
    for module, name in sorted(used):
        part = page.split(f"## {module}\n")[1:]
        assert part and f"### {name}\n" in part[0].split("\n## ")[0], f"from {module} import {name}"


def test_docstrings_become_markdown() -> None:
    said = reference_pages._docstring(_example)
    assert said == (
        "Half of `n`, as `thence.files` says: 2 \\* 3.\n\n    L = a*b\n\n"
        "- `n`: a number of two lines.\n\nRaises:\n\n- `UserError`: no number.\n"
    )
    assert (
        reference_pages._signature("half", _example) == "half(n: int | str, *, by: Mapping[str, float] = {}) -> float"
    )


def _example(n, *, by={}):  # noqa: B006
    """Half of ``n``, as :mod:`thence.files` says: 2 * 3.

        L = a*b

    Args:
        n: a number
            of two lines.

    Raises:
        UserError: no number.
    """


_example.__annotations__ = {"n": "int | str", "by": "Mapping[str, float]", "return": "float"}
