"""``thence audit``: recover the weight every token got from a trainer's real optimizer steps, and name the fault."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thence.cli.arguments import Parser, of
from thence.errors import UserError
from thence.files import to_json, write_atomically
from thence.settings.limits import Rate, Seconds, Seed
from thence.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from thence.audit.report import Report
    from thence.audit.result import CaseResult

USAGE = """\
thence audit TARGET [--python ENV/bin/python]     a training stack that has an adapter
thence audit command -- PROGRAM ... {model} ...   any program that reads a Hugging Face folder and a JSONL file

Placeholders of `command`: {model} {data} {out}, and of {micro_batch} {accumulation} {ranks} {epochs} {steps} {lr}
{seed} {precision} {port} those that the program has. Exit code: 0 no finding, 1 finding, 2 could not judge."""
OUTPUTS = ("json", "html", "junit")


def audit_command(argv: Sequence[str]) -> int:
    """Audit, print the report, write the files asked for. Returns 0: no finding; 1: finding; 2: could not judge."""
    argv = list(argv)
    program: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        argv, program = argv[:cut], argv[cut + 1 :]
    args = _parser().parse(argv)
    if args.target == "list":
        return _list()
    for flag in OUTPUTS:
        _check_output(f"--{flag}", getattr(args, flag))
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    _refuse_to_write_over(args)
    console = make_console()
    live = sys.stdout.isatty() and not args.quiet
    report = (
        _program(args, program, console, live) if args.target == "command" else _stack(args, program, console, live)
    )
    # The files first: a pipe that is closed early must not cost them. Nor may a full disk cost what is printed.
    failed = _write(args, report)
    if not args.quiet:
        from thence.audit.text import report_text

        # cleaned before it was coloured, so it goes beneath the guard
        console.file.write(report_text(report))
        console.file.flush()
    if failed is not None:
        raise failed
    return report.verdict.exit_code


def _parser() -> Parser:
    parser = Parser(prog="thence audit", usage=USAGE, description=(__doc__ or "").split(": ", 1)[1], add_help=True)
    parser.add_argument("target", metavar="TARGET", help="an adapter's name or file, `command`, or `list`")
    parser.add_argument("--python", metavar="PATH", help="the Python in which the stack is installed")
    parser.add_argument("--quick", action="store_true", help="only the cases that matter most")
    parser.add_argument("--all", action="store_true", help="also settings that nobody has by default")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="cases with PART in their name")
    parser.add_argument("--model-type", default="llama", metavar="TYPE", help="family of the tiny model")
    parser.add_argument("--seed", type=of(Seed), default=0, help="of the probe")
    parser.add_argument("--time-limit", type=of(Seconds), default=120.0, metavar="SECONDS", help="for one case")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what the stack wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the report as JUnit XML")
    parser.add_argument("--quiet", action="store_true", help="print nothing; the exit code tells")
    group = parser.add_argument_group("only for `command`")
    group.add_argument("--layout", default="prompt-completion", help="of {data}: rows, messages, prompt-completion ...")
    group.add_argument("--asked", default="token-mean", help="the objective that the program is meant to have")
    group.add_argument("--lr", type=of(Rate), help="learning rate of the program, if it takes plain SGD steps")
    return parser


def _list() -> int:
    from thence.audit.run.runner import adapter_names

    print("\n".join(adapter_names()))
    return 0


def _stack(args: argparse.Namespace, program: list[str], console: Console, live: bool) -> Report:
    from thence.audit.run.stack import audit_stack

    if program:
        raise UserError("a program after -- needs the target `command`", remedy="thence audit command -- PROGRAM ...")
    return audit_stack(
        args.target,
        python=args.python,
        quick=args.quick,
        extra=args.all,
        only=args.only,
        model_type=args.model_type,
        seed=args.seed,
        seconds=args.time_limit,
        keep=args.keep,
        tell=_teller(console, live),
    )


def _program(args: argparse.Namespace, program: list[str], console: Console, live: bool) -> Report:
    from thence.audit.run.program import audit_program

    if not program:
        raise UserError("no program was given", remedy="thence audit command -- PROGRAM --model {model} ...")
    return audit_program(
        program,
        layout=args.layout,
        asked=args.asked,
        lr=args.lr,
        quick=args.quick,
        only=args.only,
        model_type=args.model_type,
        seed=args.seed,
        seconds=args.time_limit,
        keep=args.keep,
        tell=_teller(console, live),
    )


def _teller(console: Console, live: bool):
    """Each case as it is judged, on a terminal; the whole report comes afterwards anyway."""

    def tell(result: CaseResult) -> None:
        if live:
            console.print(f"{result.case.name}: {result.status}, {result.seconds:.1f} s", style="dim")

    return tell


def _check_output(flag: str, path: Path | None) -> None:
    """Refuse a file that could not be written, before the audit has run. Raises UserError."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError("a folder, where a file was expected", remedy="give the path of a file", file=path, field=flag)
    if flag == "--html" and path.exists() and not path.is_file():  # a page is put in place by renaming
        raise UserError("not a plain file", remedy="give the path of a file", file=path, field=flag)
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        problem = f"cannot be written: {folder} is no folder that you may write to"
        raise UserError(problem, remedy="make the folder, or give another file", file=path, field=flag)


def _refuse_to_write_over(args: argparse.Namespace) -> None:
    """Raise UserError, before anything is audited, if a report would take the place of a file that is none."""
    asked = [(kind, getattr(args, kind)) for kind in ("json", "html", "junit") if getattr(args, kind)]
    for kind, path in asked:
        if path.is_dir() or sum(other.absolute() == path.absolute() for _, other in asked) > 1:
            problem = "this is a folder" if path.is_dir() else "two reports would be written into this file"
        elif path.is_file() and path.stat().st_size and not _is_report(kind, path.read_bytes()):
            problem = f"the file is there already, and is no {kind} report of an audit"
        else:
            continue
        raise UserError(problem, remedy="give another file", file=path, field=f"--{kind}")


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


def _write(args: argparse.Namespace, report: Report) -> OSError | None:
    """Write the files that were asked for, all that can be written. Returns the first error."""
    from thence.audit.junit import junit_xml
    from thence.pages.audit.page import write_page

    def as_json(path: Path) -> None:
        _put(path, to_json(report.to_dict(), indent=1) + "\n")

    def as_junit(path: Path) -> None:
        _put(path, junit_xml(report))

    failed = None
    for path, write in (
        (args.json, as_json),
        (args.html, lambda path: write_page(report, path)),
        (args.junit, as_junit),
    ):
        try:
            if path is not None:
                write(path)
        except OSError as error:
            failed = failed or error
    return failed
