"""What must be true of every bad input, and how one case is run.

1. The command ends with 0, 1 or 2; nothing escapes, no traceback is printed, and thence blames itself for nothing.
2. An input that its generator calls nonsense gives a code other than 0.
3. A command that is refused (2) leaves every byte of the case's folder as it was; lock files apart.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from thence.cli import main

from .ground import Ground
from .known import known_fault

SECONDS = 60
OF_THENCE = "this is a fault of thence"


@dataclass(frozen=True)
class Case:
    """One command on a bad input.

    Args:
        said: what is bad, in words.
        nonsense: the command must not succeed.
    """

    argv: list[str]
    said: str
    nonsense: bool


Maker = Callable[[Ground, Path, Random], Case]
"""Lays a bad input into an empty folder."""


@dataclass(frozen=True)
class Ended:
    """How a case ended; `wrong` is empty where all that must be true is."""

    case: Case
    code: int | None
    err: str
    wrong: list[str]


class Hung(BaseException):
    """The command took longer than any case may."""


def run_case(make: Maker, ground: Ground, folder: Path, rng: Random) -> Ended:
    """Make a case in a folder of its own, run it there, and judge it. The folder is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        case = make(ground, folder, rng)
        kept = digest(folder)
        code, err, escaped = _call(case.argv)
        return Ended(case, code, err, _judged(case, code, err, escaped, changes(kept, digest(folder))))
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def _judged(case: Case, code: int | None, err: str, escaped: str, changed: list[str]) -> list[str]:
    wrong = [f"escaped: {escaped}"] if escaped else []
    if not escaped and code not in (0, 1, 2):
        wrong.append(f"exit code {code}")
    if "Traceback (most recent call last)" in err:
        wrong.append("a traceback")
    if OF_THENCE in err:
        wrong.append("blamed on thence")
    if case.nonsense and code == 0:
        wrong.append("nonsense was accepted")
    if code == 2 and changed:
        wrong.append(f"refused, but changed on disk: {', '.join(changed[:4])}")
    return wrong


def _call(argv: list[str]) -> tuple[int | None, str, str]:
    """Exit code, standard error, and what escaped."""
    code, escaped = None, ""
    with _captured() as err, _limited():
        try:
            code = main(argv)
        except Hung:
            escaped = f"more than {SECONDS} s"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            escaped = "".join(traceback.format_exception(error))[-1500:]
    return code, err(), escaped


@contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    out, err = sys.stdout, sys.stderr
    kept = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    sys.stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    sys.stderr = kept
    try:
        yield lambda: kept.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    finally:
        sys.stdout, sys.stderr = out, err


@contextmanager
def _limited() -> Iterator[None]:
    def hung(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def digest(folder: Path) -> dict[str, str]:
    """Every file under a folder with its content's digest; lock files apart."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock" and "__pycache__" not in path.parts:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is gone, new or changed."""
    gone = [f"{name} is gone" for name in before if name not in after]
    new = [f"{name} is new" for name in after if name not in before]
    return gone + new + [f"{name} changed" for name in before if name in after and before[name] != after[name]]


def campaign(
    kinds: dict[str, Maker],
    ground: Ground,
    work: Path,
    numbers: Iterable[int],
    seed: int,
    tell: Callable[[str], None] = print,
) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Run cases in turn over the kinds; a case is told by the seed, its kind and its number alone.

    Yields the kind, the exit code and, where something is wrong, what is.
    """
    names = list(kinds)
    for number in numbers:
        kind = names[number % len(names)]
        ended = one(kinds, kind, number, ground, work, seed)
        failed = failure(kind, number, seed, ended) if ended.wrong else None
        if failed:
            tell(f"{kind}:{number}: {ended.case.said}: {'; '.join(ended.wrong)[:300]}")
        yield kind, str(ended.code), failed


def counted(done: Iterable[tuple[str, str, dict[str, Any] | None]]) -> dict[str, Any]:
    """A campaign in numbers, with its failures."""
    codes: dict[str, Counter[str]] = {}
    failures = []
    for kind, code, failed in done:
        codes.setdefault(kind, Counter())[code] += 1
        failures += [failed] if failed else []
    kinds = {name: {"cases": of.total(), "by_exit_code": dict(sorted(of.items()))} for name, of in codes.items()}
    total = sum(of.total() for of in codes.values())
    known = Counter(failed["known"] for failed in failures if failed["known"])
    new = len(failures) - known.total()
    return {"cases": total, "kinds": kinds, "failed": new, "known_faults": dict(known), "failures": failures}


def one(kinds: dict[str, Maker], kind: str, number: int, ground: Ground, work: Path, seed: int) -> Ended:
    """A single case."""
    return run_case(kinds[kind], ground, work / "case", Random(f"{seed}:{kind}:{number}"))


def failure(kind: str, number: int, seed: int, ended: Ended) -> dict[str, Any]:
    """A failure as it is kept."""
    return {
        "case": f"{kind}:{number}",
        "input": ended.case.said,
        "command": ended.case.argv,
        "exit_code": ended.code,
        "wrong": ended.wrong,
        "known": known_fault(ended.case.said, ended.wrong),
        "stderr": ended.err[-800:],
        "reproduce": f"python -m tests.bad_inputs --seed {seed} --only {kind}:{number}",
    }
