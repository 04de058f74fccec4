"""``thence audit``: recover the weight every token got from a trainer's real optimizer steps, and name the fault."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from thence.cli.app import quiet_libraries
from thence.errors import UserError
from thence.files import to_json, write_atomically
from thence.settings.limits import Rate, Seconds, Seed
from thence.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from thence.audit.report import Report
    from thence.audit.result import CaseResult

PROGRAM = Group("Only for the target `command`", sort_key=9)


def audit_command(
    target: str,
    /,
    *,
    python: Annotated[str | None, Parameter(metavar="ENV/bin/python")] = None,
    quick: bool = False,
    all_: bool = False,
    only: Annotated[tuple[str, ...], Parameter(metavar="PART")] = (),
    model_type: Annotated[str, Parameter(metavar="TYPE")] = "llama",
    seed: Seed = 0,
    time_limit: Annotated[Seconds, Parameter(metavar="SECONDS")] = 120.0,
    keep: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    json_: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    html: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    junit: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    quiet: bool = False,
    layout: Annotated[str, Parameter(group=PROGRAM, metavar="NAME")] = "prompt-completion",
    asked: Annotated[str, Parameter(group=PROGRAM, metavar="NAME")] = "token-mean",
    lr: Annotated[Rate | None, Parameter(group=PROGRAM)] = None,
    frozen: Annotated[tuple[str, ...], Parameter(group=PROGRAM, metavar="PART")] = (),
    program: Annotated[list[str], Parameter(parse=False)],
) -> int:
    """Recover the weight every token got from a trainer's real optimizer steps, and name the fault.

    The target `command` audits any program that reads a Hugging Face folder and a JSONL file; it stands after --. Its
    placeholders are {model} {data} {out}, and of {micro_batch} {accumulation} {ranks} {epochs} {steps} {lr} {seed}
    {precision} {port} those that the program has. Exit code: 0 no finding, 1 finding, 2 could not judge.

    Examples:

      thence audit trl-sft --python ENV/bin/python --html audit.html
      thence audit command -- python train.py {model} {data} {out} --lr {lr}

    Args:
        target: An adapter's name or file, `command`, or `list` for the adapters' names.
        python: The Python in which the stack is installed.
        quick: Only the cases that matter most.
        all_: Also settings that nobody has by default.
        only: Only cases with PART in their name. May be given several times.
        model_type: Family of the tiny model.
        seed: Seed of the probe.
        time_limit: Time limit of one case.
        keep: Keep here what the stack wrote.
        json_: Write the report as JSON.
        html: Write the report as a page.
        junit: Write the report as JUnit XML.
        quiet: Print nothing; the exit code tells.
        layout: Layout of {data}: rows, messages, prompt-completion ...
        asked: The objective that the program is meant to have.
        lr: Learning rate of the program, if it takes plain SGD steps.
        frozen: Parameters with PART in their name are not trained on purpose. May be given several times.
    """
    if target == "list":
        return _list()
    files = {kind: path for kind, path in (("json", json_), ("html", html), ("junit", junit)) if path is not None}
    _check_outputs(files)
    quiet_libraries()
    console = make_console()
    shared: dict[str, Any] = {
        "quick": quick,
        "only": list(only),
        "model_type": model_type,
        "seed": seed,
        "seconds": time_limit,
        "keep": keep,
        "tell": _teller(console, sys.stdout.isatty() and not quiet),
    }
    if target == "command":
        report = _program(program, layout=layout, asked=asked, lr=lr, frozen=list(frozen), **shared)
    else:
        report = _stack(target, program, python=python, extra=all_, **shared)
    # The files first: a pipe that is closed early must not cost them. Nor may a full disk cost what is printed.
    failed = _write(files, report)
    if not quiet:
        from thence.audit.text import report_text

        # cleaned before it was coloured, so it goes beneath the guard
        console.file.write(report_text(report))
        console.file.flush()
    if failed is not None:
        raise failed
    return report.verdict.exit_code


def _list() -> int:
    from thence.audit.run.runner import adapter_names

    print("\n".join(adapter_names()))
    return 0


def _stack(target: str, program: list[str], **settings: Any) -> Report:
    from thence.audit.run.stack import audit_stack

    if program:
        raise UserError("a program after -- needs the target `command`", remedy="thence audit command -- PROGRAM ...")
    return audit_stack(target, **settings)


def _program(program: list[str], **settings: Any) -> Report:
    from thence.audit.run.program import audit_program

    if not program:
        raise UserError("no program was given", remedy="thence audit command -- PROGRAM --model {model} ...")
    return audit_program(program, **settings)


def _teller(console: Console, live: bool):
    """Each case as it is judged, on a terminal; the whole report comes afterwards anyway."""

    def tell(result: CaseResult) -> None:
        if live:
            console.print(f"{result.case.name}: {result.status}, {result.seconds:.1f} s", style="dim")

    return tell


def _check_outputs(files: Mapping[str, Path]) -> None:
    """Refuse, before anything is audited, what cannot be written or is no report. Raises UserError."""
    for kind, path in files.items():
        folder = path.absolute().parent
        there = path.exists()
        if path.is_dir():
            problem, remedy = "a folder, where a file was expected", "give the path of a file"
        elif kind == "html" and there and not path.is_file():  # a page is put in place by renaming
            problem, remedy = "not a plain file", "give the path of a file"
        elif not folder.is_dir() or not os.access(path if there else folder, os.W_OK):
            problem = f"cannot be written: {folder} is no folder that you may write to"
            remedy = "make the folder, or give another file"
        elif sum(other.absolute() == path.absolute() for other in files.values()) > 1:
            problem, remedy = "two reports would be written into this file", "give another file"
        elif path.is_file() and path.stat().st_size and not _is_report(kind, path.read_bytes()):
            problem, remedy = f"the file is there already, and is no {kind} report of an audit", "give another file"
        else:
            continue
        raise UserError(problem, remedy=remedy, file=path, field=f"--{kind}")


def _is_report(kind: str, content: bytes) -> bool:
    """Whether a file is what an earlier audit has written."""
    if kind != "json":
        return (b"thence audit</title>" if kind == "html" else b'<testsuites name="thence audit ') in content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"thence", "verdict", "cases", "probe"} <= value.keys()


def _put(path: Path, text: str) -> None:
    """Write a file whole or not at all; a pipe or a device as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors="replace")
    else:
        write_atomically(path, text)


def _write(files: Mapping[str, Path], report: Report) -> OSError | None:
    """Write the files that were asked for, all that can be written. Returns the first error."""
    from thence.audit.junit import junit_xml
    from thence.pages.audit.page import write_page

    failed = None
    for kind, path in files.items():
        try:
            if kind == "html":
                write_page(report, path)
            else:
                _put(path, junit_xml(report) if kind == "junit" else to_json(report.to_dict(), indent=1) + "\n")
        except OSError as error:
            failed = failed or error
    return failed
