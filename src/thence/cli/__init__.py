"""The command line: thin; parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from thence.cli.loading import loading_shown
from thence.cores import take_free_cores
from thence.errors import UserError
from thence.explain import TRACEBACK, explained, foreign_exit, keep_traceback, of_thence, traceback_text
from thence.streams import OutputLost, give_up, guarded

# commands whose work is lost to the reader when nobody reads on; the others end quietly, as `cat` does
WORKING = ("run", "compare", "check", "eval", "audit")


class Terminated(KeyboardInterrupt):
    """The system asked the process to end (SIGTERM)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``thence``. Returns the exit code: 0 done, 1 not done, 2 the request makes no sense.

    Nothing but a command's own return gives 0: not an exit that foreign code asks for, nor output that nobody got.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["__complete"]:  # asked by the scripts of `thence completion`, which read control characters
        from thence.cli.app import make_app

        return make_app()(arguments, result_action="return_zero")
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
            from thence.cli.app import command, print_help

            asked = [word for word in rest if not word.startswith("-")] if name == "help" else []
            if len(asked) > 1:
                raise UserError(
                    f"thence help takes one command, not {len(asked)} ({', '.join(asked)})",
                    remedy=f"`thence help {asked[0]}` explains the first",
                )
            for word in asked:
                command(word)  # which refuses a name that there is not
            return print_help(*asked) if arguments else print_help() or 2
        if name in ("-V", "--version"):
            from thence import __version__

            print(f"thence {__version__}")
            return 0
        take_free_cores(os.environ)
        with loading_shown(arguments):
            return _command(name)(rest)
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
        if not _told_by_first_rank(error):
            _show_traceback(error)
            _tell(f"thence: {error}")
        return 2
    except Exception as error:
        if _told_by_first_rank(error):
            return 1
        said = explained(error)
        if said is not None:
            _show_traceback(error)
            _tell(f"thence: {said}")
            return 1
        kept = None if _show_traceback(error) else keep_traceback(error)
        _tell(f"thence: {of_thence(error, kept)}")
        return 1


def _told_by_first_rank(error: Exception) -> bool:
    """Whether the first rank of this run prints the error, and this process is another one."""
    return getattr(error, "on_all_ranks", False) and os.environ.get("RANK", "0") != "0"


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
    from thence.cli.app import command

    return command(name)
