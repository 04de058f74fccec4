"""The command line: thin; parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from thence.cli.arguments import Done
from thence.errors import UserError
from thence.explain import TRACEBACK, explained, foreign_exit, keep_traceback, of_thence, traceback_text
from thence.streams import OutputLost, give_up, guarded

USAGE = """\
thence: SFT, thence RL. Post-train language models to reason, correct by construction.

  thence run RECIPE [--table.field value ...]   run a recipe, or resume it where it was
  thence run RECIPE --dry-run                   the resolved recipe, its budget and memory; trains nothing
  thence recipes                                the recipes that come with thence
  thence methods [NAME]                         the training methods, or one explained
  thence compare COMPARISON                     arms x bases x seeds at equal FLOPs, with intervals
  thence check MODEL [--data FILE]              what training relies on, tried on this model and these rows
  thence sample FOLDER                          prompts with the model's responses and verdicts
  thence report RUN                             write the report page again and print the table
  thence eval MODEL --suite NAME                measure a model on benchmarks; --compare two, --regrade one
  thence audit TARGET                           what weight does a trainer really give to every token?
  thence doctor                                 environment, versions, known-bad versions of other stacks
  thence --version

`thence COMMAND --help` says more. RECIPE is the name of a shipped recipe or a TOML file."""


# commands whose work is lost to the reader when nobody reads on; the others end quietly, as `cat` does
WORKING = ("run", "compare", "check", "eval", "audit")


class Terminated(KeyboardInterrupt):
    """The system asked the process to end (SIGTERM)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``thence``. Returns the exit code: 0 done, 1 not done, 2 the request makes no sense.

    Nothing but a command's own return gives 0: not an exit that foreign code asks for, nor output that nobody got.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with guarded(), _ended_by_sigterm():
        try:
            code = _answer(arguments)
        except KeyboardInterrupt:  # a second one, while the first was being told
            code = 130
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OutputLost as error:
                code = _lost(error, arguments) if code == 0 or stream is sys.stdout else code
    return code


def _answer(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    try:
        if name in ("", "-h", "--help", "help"):
            print(USAGE)
            return 0 if arguments else 2
        if name in ("-V", "--version"):
            from thence import __version__

            print(f"thence {__version__}")
            return 0
        return _command(name)(rest)
    except Done:
        return 0
    except OutputLost as error:
        return _lost(error, arguments)
    except Terminated:
        _tell(f"thence: ended by SIGTERM{_resumes(name)}")
        return 143
    except KeyboardInterrupt:
        _tell(f"\nthence: stopped{_resumes(name)}")
        return 130
    except SystemExit as error:
        _show_traceback(error)
        _tell(f"thence: {foreign_exit(error)}")
        return 1
    except UserError as error:
        _show_traceback(error)
        _tell(f"thence: {error}")
        return 2
    except Exception as error:
        said = explained(error)
        if said is not None:
            _show_traceback(error)
            _tell(f"thence: {said}")
            return 1
        kept = None if _show_traceback(error) else keep_traceback(error)
        _tell(f"thence: {of_thence(error, kept)}")
        return 1


def _lost(error: OutputLost, arguments: Sequence[str]) -> int:
    """Standard output or error is gone: say so where it can be said, and let Python end without a complaint."""
    closed = error.errno == errno.EPIPE
    for stream, own in ((sys.stdout, "standard output"), (sys.stderr, "standard error")):
        if error.filename == own:
            give_up(stream)
    if not closed:
        remedy = f"send it elsewhere{_resumes(arguments[0]) if arguments else ''}"
        _tell(f"thence: {error.filename} cannot be written: {error.strerror}\n  remedy: {remedy}")
    elif arguments and arguments[0] in WORKING:
        _tell(f"thence: nobody reads {error.filename} any more: stopped{_resumes(arguments[0])}")
    return 1


def _tell(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OutputLost:  # there is nowhere left to say it; the exit code does
        give_up(sys.stderr)


def _show_traceback(error: BaseException) -> bool:
    wanted = os.environ.get(TRACEBACK, "") not in ("", "0")
    if wanted:
        _tell(traceback_text(error))
    return wanted


def _resumes(name: str) -> str:
    return "; run the same command again to resume" if name in ("run", "compare", "eval") else ""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as an exception, so that what is being written is cleaned up; in a program's main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the cleaning up short
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name == "run":
        from thence.cli.run import run_command as command
    elif name == "recipes":
        from thence.cli.recipes import recipes_command as command
    elif name == "methods":
        from thence.cli.methods import methods_command as command
    elif name == "compare":
        from thence.cli.compare import compare_command as command
    elif name == "check":
        from thence.cli.check import check_command as command
    elif name == "sample":
        from thence.cli.sample import sample_command as command
    elif name == "report":
        from thence.cli.report import report_command as command
    elif name == "eval":
        from thence.cli.eval import eval_command as command
    elif name == "audit":
        from thence.cli.audit import audit_command as command
    elif name == "doctor":
        from thence.cli.doctor import doctor as command
    else:
        raise UserError(f"unknown command {name!r}", remedy="`thence --help` lists the commands")
    return command
