"""The user's reward functions, each in a separate process, so that their faults do not reach the run.

The new process has this one's environment, working directory and module path. It loads the function once and then gets
one response after the other, in order. So a function may keep state from call to call. A `sys.exit`, a crash or an
endless loop ends that process and not the run, and a time limit holds for anything that the function does.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from thence.errors import UserError
from thence.foreign_text import one_line
from thence.verify.grader import Grader
from thence.verify.loading import REWARD, Kind, split_spec
from thence.verify.process import ChildProcess
from thence.verify.verdict import Grade, Verdict, unknown

log = logging.getLogger(__name__)

LOAD_SECONDS = 60.0
LEAVE_SECONDS = 2.0  # for what the function registered with atexit
GONE_SECONDS = 1.0
LARGEST = 1e6
"""Scores lie between minus this and this: more would drown every other response of a batch, or overflow."""
SLOW_IN_A_ROW = 3
_BOOT = (
    "import json, sys; own = json.loads(sys.argv[1]); sys.path[:] = own['path']; sys.argv[:] = own['argv']; "
    "from importlib import import_module; import_module(own['worker']).main(own['spec'], own['parent'], own['main'])"
)
WORKER = "thence.verify.function_worker"


class TooSlow(Exception):
    """The function did not answer within its time; its process is gone."""


class Ended(Exception):
    """The function's process ended by itself; says how."""


@dataclass(frozen=True)
class Stated:
    """What a function says of its own scores.

    Args:
        stated: whether it says from which score a response is right.
        right_from: that score; None: never.
        batched: it takes lists, all responses of a batch at once.
        columns: it takes what else the row of a response holds.
    """

    stated: bool = False
    right_from: float | None = None
    batched: bool = False
    columns: bool = False

    def verdict(self, score: float) -> Verdict:
        """What a score says of a response."""
        if self.stated:
            if self.right_from is None:
                return Verdict.GRADED
            return Verdict.RIGHT if score >= self.right_from else Verdict.WRONG
        return {1.0: Verdict.RIGHT, 0.0: Verdict.WRONG}.get(score, Verdict.GRADED)


class FunctionProcess:
    """A process that holds one reward function, or environments of one class. Not for several threads at once.

    Args:
        spec: of the function or class.
        seconds: wall-clock limit of one call; loading it may take as long, and a minute at least.
        setting: what the limit is called where it is set.
        kind: what is loaded.
        worker: the module whose `main` the process runs.

    Raises:
        UserError: the function cannot be loaded, or takes too long to load.
    """

    def __init__(self, spec: str, seconds: float, setting: str, kind: Kind = REWARD, worker: str = WORKER):
        split_spec(spec, kind)
        self.spec, self.seconds, self.setting, self.kind = spec, seconds, setting, kind
        main_thread = threading.current_thread() is threading.main_thread()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        own = {"path": path, "argv": sys.argv, "spec": spec, "parent": os.getpid(), "main": main_thread}
        own["worker"] = worker
        # A fixed hash seed unless the user has set one: the order of sets repeats from run to run.
        environment = {"PYTHONHASHSEED": "0", **os.environ}
        command = [sys.executable, "-c", _BOOT, json.dumps(own)]
        limit = max(LOAD_SECONDS, seconds)
        self._child = ChildProcess(command, environment, None, limit)
        # Also runs at the end of the interpreter.
        self._finalizer = weakref.finalize(self, _leave, self._child, os.getpid())
        self.stated = self._started(limit)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What the function did with a response: `score`, `raised` or `returned`; with a batch: `scores`.

        Args:
            request: `prompt`, `response`, `answer` and `columns`, or lists of them.
            seconds: how long it may take.

        Raises:
            TooSlow, Ended: the process is gone then.
        """
        try:
            self._child.send(request, seconds)
            return self._answer()
        except BaseException:  # also Ctrl-C: its answer would be taken for that of the next response
            self.kill()
            raise

    def close(self) -> None:
        """Let the process end."""
        self._finalizer()

    def kill(self) -> None:
        """End the process at once."""
        self._finalizer.detach()
        self._child.kill()

    def _started(self, limit: float) -> Stated:
        try:
            found = self._answer()
        except TooSlow:
            self.kill()
            raise UserError(
                f"{self.kind.word} {self.spec} is still being loaded after {limit:g} s",
                remedy=f"make the top of its file quicker, or raise {self.setting}",
                field=self.kind.field,
            ) from None
        except Ended as how:
            self.kill()
            raise UserError(
                f"{self.kind.word} {self.spec} cannot be imported: its process ended ({how})",
                remedy="fix what its file or module does when it is imported",
                field=self.kind.field,
            ) from None
        except BaseException:
            self.kill()
            raise
        if "refused" in found:
            self.kill()
            refused = found["refused"]
            raise UserError(refused.pop("problem"), **refused)
        return Stated(found["stated"], found["right_from"], found.get("batched", False), found.get("columns", False))

    def _answer(self) -> dict[str, Any]:
        """The next message of the process. Raises TooSlow after its deadline, Ended when it is gone."""
        child = self._child
        while True:
            with selectors.DefaultSelector() as selector:
                selector.register(child.output, selectors.EVENT_READ)
                if child.sending:
                    selector.register(child.input, selectors.EVENT_WRITE)
                # A process that it left behind may hold the pipe open: look now and then whether it lives itself.
                selector.select(min(max(child.deadline - time.monotonic(), 0.0), GONE_SECONDS))
            gone = child.dead()
            if child.sending:
                child.write()
            try:
                messages = child.receive()
            except EOFError:
                raise Ended(_how(child)) from None
            if messages:
                return messages[0]
            if gone:
                raise Ended(_how(child))
            if time.monotonic() >= child.deadline:
                raise TooSlow


class FunctionGrader(Grader):
    """The user's reward function. Its number is the score; who is right follows from the threshold that it states.

    The verdict of a score is RIGHT from `right_from` on and WRONG below. Without a threshold 1 (or True) is RIGHT and
    0 (or False) WRONG, and anything else is GRADED: a degree, which says neither. None is UNKNOWN, and so is a response
    for which the function took too long; the process begins afresh after that.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`.
        seconds: wall-clock limit of one call.
        right_from: overrides what the function states in its attribute of that name.
        slow_in_a_row: so many responses in a row that take too long are an error.
        setting: what the limit is called where it is set, for messages.

    Raises:
        UserError: the function cannot be loaded.
    """

    def __init__(
        self,
        spec: str,
        seconds: float = 10.0,
        right_from: float | None = None,
        slow_in_a_row: int = SLOW_IN_A_ROW,
        setting: str = "reward_seconds",
    ):
        self.spec, self.seconds = spec, seconds
        self._slow_in_a_row, self._setting = slow_in_a_row, setting
        self._slow, self._told = 0, False
        self._closed = False
        self._lock = threading.Lock()
        self._process: FunctionProcess | None = FunctionProcess(spec, seconds, setting)
        stated = self._process.stated
        self.threshold = stated if right_from is None else replace(stated, stated=True, right_from=right_from)

    def grade_many(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
        columns: Sequence[str] | None = None,
    ) -> list[Grade]:
        if self.threshold.columns and columns is None:
            raise UserError(
                f"reward {self.spec} takes the row's columns, and they are not kept here",
                remedy="evaluate again, which hands them over, or grade with a function of prompt, response and answer",
                field="reward",
            )
        given = columns if columns is not None else [""] * len(prompts)
        rows = [
            {"prompt": p, "response": r, "answer": a, "columns": c}
            for p, r, a, c in zip(prompts, responses, answers, given, strict=True)
        ]
        with self._lock:
            if self._closed:
                raise ValueError("the grader is closed")
            if self.threshold.batched:
                return self._grade_batch(rows) if rows else []
            return [self._grade(self._where(i, row), row) for i, row in enumerate(rows, start=1)]

    def close(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.close()
            self._process = None

    def verdict(self, score: float) -> Verdict:
        """What a score says of a response."""
        return self.threshold.verdict(score)

    def _where(self, number: int, row: dict[str, Any]) -> str:
        return f"response {number} of the batch (prompt {_short(row['prompt'])}, response {_short(row['response'])})"

    def _grade_batch(self, rows: list[dict[str, Any]]) -> list[Grade]:
        """All responses in one call, which has the time of all of them."""
        request = {name: [row[name] for row in rows] for name in rows[0]}
        where = f"a batch of {len(rows)} responses"
        found = self._asked(request, where, self.seconds * len(rows))
        if found is None:
            return [self._late()] * len(rows)
        return [
            self._graded(one, self._where(i, row))
            for i, (row, one) in enumerate(zip(rows, found["scores"], strict=True), start=1)
        ]

    def _grade(self, where: str, row: dict[str, Any]) -> Grade:
        found = self._asked(row, where, self.seconds)
        return self._late() if found is None else self._graded(found, where)

    def _asked(self, request: dict[str, Any], where: str, seconds: float) -> dict[str, Any] | None:
        """What the function did with a request; None: it took too long. Raises UserError."""
        process, self._process = self._process, None  # gone, unless it answers
        if process is None:
            process = FunctionProcess(self.spec, self.seconds, self._setting)
        try:
            found = process.ask(request, seconds)
        except TooSlow:
            self._too_slow(where, seconds)
            return None
        except Ended as how:
            raise UserError(
                f"reward function {self.spec} ended its process ({how}) on {where}",
                remedy="let it return a number, or None where it cannot tell; a crash is to be fixed in the function",
            ) from None
        self._process, self._slow = process, 0
        if "raised" in found:
            raise UserError(
                f"reward function {self.spec} {_on(found['raised'], where)}",
                remedy="fix it, or let it return None where it cannot tell",
                file=found["file"],
                line=found["line"],
            )
        self._refuse_returned(found, where)
        return found

    def _refuse_returned(self, found: dict[str, Any], where: str) -> None:
        if "returned" in found:
            raise UserError(
                f"reward function {self.spec} returned {found['returned']} on {where}",
                remedy="let it return a finite number, or None where it cannot tell",
            )

    def _graded(self, found: dict[str, Any], where: str) -> Grade:
        """The grade of what the function said of one response. Raises UserError."""
        self._refuse_returned(found, where)
        score = found["score"]
        if score is None:
            return unknown("the reward function returned None")
        if abs(score) > LARGEST:
            raise UserError(
                f"reward function {self.spec} returned {score:g} on {where}",
                remedy=f"let it return a number between -{LARGEST:,.0f} and {LARGEST:,.0f}: scale its scores down",
            )
        components = tuple(found.get("components", {}).items())
        return Grade(self.verdict(score), score, components=components)

    def _late(self) -> Grade:
        return unknown(f"time limit: the reward function took more than {self.seconds:g} s")

    def _too_slow(self, where: str, seconds: float) -> None:
        self._slow += 1
        if self._slow >= self._slow_in_a_row:
            several = f"{self._slow} responses in a row, the last of them " if self._slow > 1 else ""
            raise UserError(
                f"reward function {self.spec} took more than {seconds:g} s on {several}{where}",
                remedy=f"make it quicker, or raise {self._setting}",
            )
        if not self._told:
            self._told = True
            log.warning(
                "reward function %s took more than %g s on %s: nobody can tell its reward. The function is loaded "
                "again, without what it kept from earlier calls. %s sets the limit; this is said once",
                *(self.spec, seconds, where, self._setting),
            )


def _on(raised: str, where: str) -> str:
    """`raised ValueError: text` with the place put before the text."""
    head, colon, message = raised.partition(": ")
    return f"{head} on {where}{colon}{message}"


def _short(text: str) -> str:
    return one_line(repr(text), 60)


def _how(child: ChildProcess) -> str:
    with suppress(subprocess.TimeoutExpired):
        return child.ending(GONE_SECONDS)
    child.kill()
    return "it closed its pipes"


def _leave(child: ChildProcess, owner: int) -> None:
    # A process forked from the owner inherits this object but not the right to end the owner's children.
    if os.getpid() == owner:
        child.leave(LEAVE_SECONDS)
