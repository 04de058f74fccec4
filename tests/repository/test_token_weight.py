"""The figure of docs/token-weight.md: picture, script and the Python on the page give the same weights."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.repository.blocks import blocks_of

sys.path.insert(0, str(ROOT / "tools"))

import token_weight_figure as figure

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = ROOT / "docs/token-weight.md"


def test_the_picture_is_what_the_script_draws() -> None:
    assert (ROOT / "docs/token-weight-cut.svg").read_text() == figure.picture(), "run tools/token_weight_figure.py"


def test_the_python_on_the_page_prints_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = (block for block in blocks_of(PAGE) if block.language in ("python", "text"))
    names: dict[str, Any] = {}
    exec(compile(code.text, code.place, "exec"), names)
    assert capsys.readouterr().out == told.text
    assert told.text.splitlines()[0] == str(
        [round(weight, 2) for weight in figure.weights(figure.LENGTHS, figure.CUTS)]
    )


@pytest.mark.matrix(3)
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize(
    ("address", "clicked", "cuts"),
    [
        ("", (), figure.CUTS),
        ("#cuts=1,5", (), (1, 5)),
        ("#cuts=", (), ()),
        ("#cuts=9,0,x", (), figure.CUTS),
        ("", ("cut-4",), (2, 6)),
        ("#cuts=2", ("cut-7", "cut-2"), (7,)),
        ("", ("count",), None),
        ("", ("count", "means"), figure.CUTS),
    ],
)
def test_the_script_gives_these_weights(
    address: str, clicked: tuple[str, ...], cuts: tuple[int, ...] | None, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(
        f'<img src="token-weight-cut.svg"><script src="{ROOT}/tools/site/_static/token-weight.js"></script><script>'
        f"addEventListener('load', () => {[*clicked]}.forEach((id) => document.getElementById(id).click()))</script>"
    )
    page = f"file://{tmp_path}/page.html{address}"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *flags, page], capture_output=True, text=True, timeout=60)
    shown = [float(number) for number in re.findall(r"<b>([\d.]+)</b>", done.stdout)]
    right = [1.0] * len(figure.LENGTHS) if cuts is None else figure.weights(figure.LENGTHS, cuts)
    assert shown == pytest.approx(right, abs=0.0051), done.stdout
    assert ("Every token counts the same" in done.stdout) == (max(right) - min(right) < 0.005)
