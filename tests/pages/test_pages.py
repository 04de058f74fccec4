"""What every page and every table in a terminal has in common."""

from __future__ import annotations

import io
import re
from functools import partial
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from rich.console import Console

import thence.pages
from thence.pages.samples import EACH, ShownSample, excerpt, first_of_each
from thence.pages.table import Cell, Table, TableRow
from thence.pages.template import _environment, render
from thence.pages.terminal import TableView

ROOM = Path(thence.pages.__file__).parent
HOSTILE = '</title><script>alert(1)</script>{{ 7 * 7 }} \u202etxt \x1b[31m "'
BASE = '{% extends "base.html" %}'


def test_every_kind_of_page_extends_the_base_and_has_no_document_of_its_own():
    pages = sorted(ROOM.glob("*/page.html"))
    assert [page.parent.name for page in pages] == ["audit", "comparison", "evaluation", "overlay", "run"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(BASE) and not re.search(r"<(html|head|body|style)\b", text)


def test_there_is_one_environment():
    source = ROOM.parent
    found = [p for p in source.rglob("*.py") if re.search(r"jinja2 import .*Environment", p.read_text("utf-8"))]
    assert [str(p.relative_to(source)) for p in found] == ["pages/template.py"]


def test_a_new_page_is_one_template_and_what_it_shows_is_escaped():
    parts = '{% import "parts.html" as parts %}{% block body %}{{ parts.head(title, notes=[title]) }}{% endblock %}'
    page = _environment().from_string(BASE + parts).render(title=HOSTILE)
    assert "<script" not in page and "\u202e" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }} [U+202E]txt \u241b[31m") == 3
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://", page)


def test_a_value_that_a_page_lacks_is_an_error():
    with pytest.raises(UndefinedError):
        render("run", title="t")


TABLE = Table(
    "title",
    ("model", *(f"set {index}, T = 0.6" for index in range(6))),
    (
        TableRow(
            "a model", tuple(Cell(f"{index}1.5 ±1.0", f"{index}0.5 to {index}2.5") for index in range(6)), "group"
        ),
        TableRow("size", tuple(Cell(f"{index}12 x 4", strong=True) for index in range(6)), apart=True),
    ),
    ("a note",),
)


@pytest.mark.parametrize("width", [24, 60, 200])
def test_a_table_fits_the_terminal_and_loses_nothing(width: int):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(TableView(TABLE))
    text = console.export_text()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert text.count("T = 0.6") == 6
    for cell in (cell for row in TABLE.rows for cell in row.cells):
        assert cell.text in text and cell.sub in text
    assert ("further columns" in " ".join(text.split())) == (width < 200)


def test_headers_are_broken_at_hyphens_where_that_keeps_a_table_in_one_piece():
    names = ("in-distribution", "out-of-distribution")
    headers = ("model", *(f"{name}, T = {t}" for name in names for t in (0.6, 1)))
    row = TableRow("problems x samples", tuple(Cell("15.3", "13.7 to 17.0") for _ in headers[1:]))
    shown = {}
    for width in (60, 80, 120):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(TableView(Table("title", headers, (row,))))
        shown[width] = console.export_text()
    assert "further columns" in shown[60]
    assert "further columns" not in shown[80] and "out-of-\n" not in shown[120]
    assert "…" not in "".join(shown.values())
    for width in (60, 120):
        assert shown[width].count("out-of-distribution,") == 2
    assert shown[80].split().count("distribution,") == 4 and shown[80].split().count("out-of-") == 2


def test_samples_are_the_first_of_each_verdict_and_no_more_are_read():
    read = []

    def lines():
        for index in range(100):
            read.append(index)
            verdict = ("right", "wrong", "graded", "unknown", "nonsense", None)[index % 6]
            yield verdict, partial(ShownSample, verdict or "", "", "", "", "", "", f"{index}", "")

    found = first_of_each(lines())
    assert [sample.where for sample in found if sample.verdict == "wrong"] == ["1", "7", "13"]
    assert len(found) == 4 * EACH and len(read) < 20


def test_a_long_text_keeps_its_beginning_and_its_end():
    text = excerpt("a" * 5000 + "z")
    assert text.startswith("aaa") and text.endswith("az") and "1,501 characters left out" in text
    assert excerpt(None) == "" and excerpt(3) == "3"
