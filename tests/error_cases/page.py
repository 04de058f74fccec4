"""Runs every case in a separate folder and makes a page of the output."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from thence.cli import main
from thence.explain import TRACEBACK
from thence.foreign_text import clean

from .case import Case
from .cases import THEMES
from .shared import Shared, inside

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
SECRET = "hunter2-a-password"
ENVIRONMENT = {
    "COLUMNS": "110",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "MY_KEY": SECRET,
    "OMP_NUM_THREADS": "2",  # a set number gets no advice about other programs, which would be on the page by chance
    TRACEBACK: "0",
}
INTRODUCTION = """\
# Messages and what to do

{count} bad inputs and the message that each gets. The tests write this page: they ran every command below in a separate
folder and copied its output. Paths, dates, process numbers, ports and versions are replaced.

```
python -m tests.error_cases    # writes this page; tests/error_cases/test_error_cases.py says whether it is up to date
```

A message names the file with its line, the field or flag, the problem, and after `remedy:` what to do. A command that
is refused before it begins changes nothing. A command that fails later (a server, a step) already has its folder; the
same command resumes there, and existing files stay.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | not done: something failed, or the output could not be written |
| 2 | refused: the request, the recipe, the data or a file cannot be used as it is |
| 130, 143 | stopped by Ctrl-C or SIGTERM; `run`, `compare` and `eval` resume with the same command |

`THENCE_TRACEBACK=1` in front of a command also prints Python's traceback, for a report of a fault in thence.
"""


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        code: exit code.
        said: standard output and error, normalised.
        before, after: the content of every file by its name, locks left out.
    """

    case: Case
    code: int
    said: str
    before: Mapping[str, bytes]
    after: Mapping[str, bytes]


def outcomes(themes: Sequence[str] = tuple(THEMES)) -> dict[str, list[Outcome]]:
    """Run all cases of these themes. Returns their outcomes by theme."""
    with tempfile.TemporaryDirectory() as name, _quiet():
        at = Path(name).resolve()
        shared = Shared(at / "shared")
        return {
            theme: [_run(case, at / f"case-{n}-{m}", shared) for m, case in enumerate(THEMES[theme])]
            for n, theme in enumerate(themes)
        }


def page(found: Mapping[str, list[Outcome]]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION.format(count=sum(map(len, found.values())))]
    for theme, of_theme in found.items():
        parts.append(f"\n## {theme}\n")
        for outcome in of_theme:
            shown = clean(f"$ thence {outcome.case.command}").replace("PORT", "8000")
            if outcome.case.process:
                shown += f" > {outcome.case.process}"
            parts.append(f"\n### {outcome.case.title}\n\n```\n{shown}\n{outcome.said.rstrip()}\n```\n")
            parts.append(f"\nExit code {outcome.code}.\n")
    return "".join(parts)


def content(folder: Path) -> dict[str, bytes]:
    """The content of every file by its name, locks left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def _run(case: Case, here: Path, shared: Shared) -> Outcome:
    here.mkdir()
    if case.base:
        shared.copy(case.base, here)
    case.prepare(here)
    with inside(here), case.around(here) as given:
        before = content(here)
        words = shlex.split(case.command.replace("PORT", str(given)))
        if case.process:
            with Path(case.process).open("w") as output:
                command = [sys.executable, "-m", "thence", *words]
                done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
            code, said = done.returncode, done.stderr
        else:
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                code = main(words)
            said = stream.getvalue()
        return Outcome(case, code, normalised(said, here), before, content(here))


RULES = (
    (r"(?<=127\.0\.0\.1:)\d+", "8000"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?([+-]\d\d:\d\d|Z)?", "2026-01-31 12:00:00"),
    (r"\b\d\d:\d\d:\d\d\b", "12:00:00"),
    (r"\bprocess \d+", "process 4711"),
    (r"\bpid \d+", "pid 4711"),
    (r"\bon host \S+", "on host machine"),
    (r"\b(loss|entropy|norm) +\d+\.\d+", r"\1 1.00"),
    (r"the loss is \d+\.\d+", "the loss is 3.25"),
    (r"diverged in step \d+", "diverged in step 2"),  # processors differ
    # what stands at the middle of a file that names the machine
    (r"(results\.json):\d+: not valid JSON: .*", r"\1:20: not valid JSON: Unterminated string starting at"),
    (r"(\(|hash )[0-9a-f]{12}\b", r"\g<1>0123456789ab"),  # of a design: another field, another hash
    (r"[\d,]+ tok/s", "1,000 tok/s"),
    (r"\bthence \d+\.\d+\.\d+", "thence 1.2.3"),
    (r"math-verify \d+\.\d+\.\d+", "math-verify 1.2.3"),
    (r"[ \t]+$", ""),
)


def normalised(said: str, here: Path) -> str:
    """Without what differs from one machine or moment to the next."""
    said = said.replace(str(here), "/home/me/work").replace(sys.executable, "python")
    said = said.replace(str(Path(__file__).parents[2]), "/home/me/thence").replace(os.uname().nodename, "machine")
    for pattern, word in RULES:
        said = re.sub(pattern, word, said, flags=re.MULTILINE)
    return said


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The environment of the page, and loggers as a fresh process has them; both are put back."""
    before = dict(os.environ)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        root.handlers[:], root.level = handlers, level
