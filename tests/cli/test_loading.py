"""What is said while PyTorch is imported: at once, on one line, and gone when something else is written."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thence.cli import loading
from thence.streams import guarded


class Screen(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def slow_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two packages that stand for PyTorch and transformers; one imports the other."""
    (tmp_path / "slow_a").mkdir()
    (tmp_path / "slow_a" / "__init__.py").write_text("import slow_a.part\n")
    (tmp_path / "slow_a" / "part.py").write_text("")
    (tmp_path / "slow_b.py").write_text("import slow_a\n")
    (tmp_path / "slow_broken.py").write_text("raise ImportError('no')\n")
    monkeypatch.setattr(loading, "SLOW", {"slow_a": "Ay", "slow_b": "Bee", "slow_broken": "Broken"})
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("slow_a", "slow_a.part", "slow_b", "slow_broken"):
        sys.modules.pop(name, None)


def said(stream: Any, arguments: list[str], *names: str, then: str = "") -> str:
    """What standard error gets while a command imports packages and then prints."""
    finders = list(sys.meta_path)
    before, sys.stderr = sys.stderr, stream
    try:
        with guarded(), loading.loading_shown(arguments):
            for name in names:
                importlib.import_module(name)
            if then:
                print(then, file=sys.stderr)
    finally:
        sys.stderr = before
    assert sys.meta_path == finders
    return stream.getvalue()


def test_on_a_terminal_the_line_is_replaced_by_what_comes_next() -> None:
    text = said(Screen(), ["run", "x"], "slow_a", then="panel")
    assert text == f"loading Ay ...\r{' ' * len('loading Ay ...')}\rpanel\n"


def test_on_a_terminal_the_line_is_gone_when_nothing_comes_next() -> None:
    text = said(Screen(), ["run", "x"], "slow_a", "slow_b")
    assert text.startswith("loading Ay ...\r") and "\rloading Bee ...\r" in text
    assert text.endswith(" \r")


def test_what_a_slow_package_imports_itself_is_not_told_apart() -> None:
    assert said(io.StringIO(), ["run", "x"], "slow_b") == "loading Bee ...\n"


def test_where_output_is_piped_there_is_one_plain_line() -> None:
    assert said(io.StringIO(), ["run", "x"], "slow_a", "slow_b", then="panel") == "loading Ay ...\npanel\n"


@pytest.mark.parametrize(
    "arguments, spoken",
    [
        (["run", "x", "--quiet"], False),
        (["eval", "x", "--json"], False),
        (["audit", "command", "--json", "audit.json"], True),
        (["audit", "command", "--", "train.py", "--quiet"], True),
        (["methods"], False),
        (["data", "x"], True),
    ],
)
def test_who_is_silent_where_output_is_piped(arguments: list[str], spoken: bool) -> None:
    assert (said(io.StringIO(), arguments, "slow_a") != "") is spoken


def test_a_process_that_has_loaded_one_before_prints_no_line() -> None:
    importlib.import_module("slow_a")
    assert said(io.StringIO(), ["run", "x"], "slow_b") == ""


def test_a_list_on_a_terminal_says_it_too() -> None:
    assert said(Screen(), ["methods"], "slow_a").startswith("loading Ay ...")


def test_only_the_first_rank_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert said(io.StringIO(), ["run", "x"], "slow_a") == ""


def test_a_live_picture_is_left_alone() -> None:
    screen = Screen()
    screen.rich_proxied_file = None  # type: ignore[attr-defined]
    with loading.loading_shown(["run", "x"]):
        before, sys.stderr = sys.stderr, screen
        try:
            importlib.import_module("slow_a")
        finally:
            sys.stderr = before
    assert screen.getvalue() == ""


def test_an_import_that_fails_leaves_no_line() -> None:
    screen = Screen()
    with pytest.raises(ImportError, match="no"):
        said(screen, ["run", "x"], "slow_broken")
    assert screen.getvalue().endswith(" \r")
