"""Public functions announce the errors that they raise, and the tool that looks for others finds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import ROOT

TOOL = ROOT / "tools" / "undocumented_raises.py"
PACKAGE = '''
def silent(n):
    """Counts."""
    if n < 0:
        raise ValueError("no")

def half(n):
    """Counts. Raises TypeError."""
    raise FileError("no")

def full(n):
    """Counts.

    Raises:
        MyError: always; a FileError is one.
    """
    raise FileError("no")

def caught(n):
    """Counts."""
    try:
        raise ValueError("no")
    except ValueError:
        return 0

def inner(n):
    """Counts."""
    def later():
        raise ValueError("no")
    return later

def _private(n):
    raise ValueError("no")
'''


def found(*folder: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, TOOL, *folder], capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def test_every_public_function_announces_the_errors_that_it_raises() -> None:
    code, lines = found()
    assert code == 0, "\n".join(lines)


def test_a_function_that_does_not_is_found(tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text("class MyError(Exception): ...\nclass FileError(MyError): ...\n")
    (tmp_path / "counting.py").write_text(PACKAGE)
    code, lines = found(str(tmp_path))
    assert code == 1
    assert lines == ["counting.py:2: silent raises ValueError", "counting.py:7: half raises FileError"]
