"""Specifications of charts, and the script that draws them."""

from __future__ import annotations

import json
import re
import sys

import pytest
import vl_convert

from tests import ROOT
from thence.pages.figure import LIGHT, Key, Line, line_chart, still
from thence.pages.template import _environment

sys.path.insert(0, str(ROOT / "tools"))

import vega_bundle

HOSTILE = "</script><script>alert(1)</script> \u202etxt"


def chart(lines: list[Line], unit: str = "unit"):
    return line_chart(lines, [Key.of(line.name, i) for i, line in enumerate(lines)], unit, "words")


def test_the_script_of_the_pages_is_that_of_the_pinned_package() -> None:
    folder = ROOT / "src/thence/pages/vega"
    assert (folder / "vega.js").read_text(encoding="utf-8") == vega_bundle.bundle(), "run make vega"
    assert (folder / "VERSIONS").read_text() == vega_bundle.versions()
    pin = re.search(r"^vl-convert-python==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin and f"vl-convert-python {pin[1]}" in vega_bundle.versions()
    assert "BSD-3-Clause" in (folder / "LICENSE").read_text()


def test_words_of_others_cannot_end_a_specification_and_do_nothing() -> None:
    spec = chart([Line(HOSTILE, [1, 2], [1.0, 2.0])], unit=HOSTILE).spec
    text = _environment().from_string("<script>{{ spec | tojson }}</script>").render(spec=spec)
    assert text.count("<script") == 1 and "\u202e" not in text
    held = json.loads(text.removeprefix("<script>").removesuffix("</script>"))
    assert held["data"]["values"][0]["name"] == "</script><script>alert(1)</script> [U+202E]txt"


def test_a_long_line_is_drawn_as_means_and_its_band_keeps_its_ends() -> None:
    xs = list(range(1, 6001))
    line = Line("a", xs, [float(x) for x in xs], [x - 1.0 for x in xs], [x + 1.0 for x in xs])
    rows = chart([line]).spec["data"]["values"]
    assert len(rows) == 600
    assert rows[0] == {"name": "a", "x": 5.5, "y": 5.5, "lo": 0.0, "hi": 11.0}


@pytest.mark.parametrize(("value", "domain"), [(2.0, [0.0, 3.0]), (0.0, [0.0, 1.0]), (-2.0, [-3.0, 0.0])])
def test_a_flat_line_is_not_blown_up(value: float, domain: list[float]) -> None:
    spec = chart([Line("a", [1, 2], [value, value])]).spec
    assert spec["layer"][0]["encoding"]["y"]["scale"]["domain"] == domain


def test_a_picture_has_plain_colours_and_no_pointer() -> None:
    spec = still(chart([Line("a", [1, 2], [1.0, 2.0])]).spec, LIGHT)
    assert "var(" not in json.dumps(spec) and LIGHT.series[0] in json.dumps(spec) and "params" not in json.dumps(spec)
    assert vl_convert.vegalite_to_png({**spec, "width": 200, "height": 100}).startswith(b"\x89PNG")
