"""The process in which a reward function of the user's own runs. `thence.verify.own_function` starts it.

It loads the function once and then answers one request after the other: {"prompt", "response", "answer", "columns"} in,
and {"score", "components"}, {"raised"} or {"returned"} out; of a function that takes lists, lists in and "scores" out.
This goes over pipes that the function cannot reach: what it prints goes to standard error, and what it reads from
standard input is empty. Nothing that it does, `sys.exit` included, ends the run.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from thence.errors import UserError
from thence.foreign_text import one_line
from thence.framed import pack, read
from thence.verify.loading import BATCHED, COLUMNS, error_place, load_function, said, stated_threshold, wants_columns

REWARD = "reward"
"""The key of a function's dict that is the score itself."""
SHOWN = 60  # characters of a value that is no number
_SET_PDEATHSIG = 1


def main(spec: str, parent: int, started_by_main_thread: bool) -> None:
    """Serve until the parent closes the pipe.

    Args:
        spec: of the function.
        parent: process number of the parent, with which this process ends.
        started_by_main_thread: whether the thread that started this process lives as long as the parent.
    """
    end_with(parent, started_by_main_thread)
    requests, replies = own_pipes()
    try:
        function = load_function(spec)
        stated, right_from = stated_threshold(function, spec)
    except UserError as error:
        replies.write(pack(refused(error)))
        return
    file, batched = file_of(function), bool(getattr(function, BATCHED, False))
    wanted = wants_columns(function)
    replies.write(
        pack({"ready": True, "stated": stated, "right_from": right_from, "batched": batched, "columns": wanted})
    )
    while (request := read(requests)) is not None:
        replies.write(pack(_call(function, request, file, batched, wanted)))


def refused(error: UserError) -> dict[str, Any]:
    """What a process says that cannot load what it was started for."""
    facts = {"problem": error.problem, "remedy": error.remedy, "file": error.file, "line": error.line}
    return {"refused": facts | {"field": error.field}}


def _call(
    function: Callable[..., Any], request: dict[str, Any], file: str | None, batched: bool, wanted: bool
) -> dict[str, Any]:
    given = [request["prompt"], request["response"], request["answer"]]
    named: dict[str, Any] = {}
    if wanted:
        columns = request["columns"]
        named[COLUMNS] = list(map(_columns, columns)) if batched else _columns(columns)
    try:
        value = function(*given, **named)
        if batched and hasattr(value, "__len__") and not isinstance(value, (str, bytes, dict)):
            value = list(value)  # also of a tensor or an array
    except BaseException as error:
        found, line = error_place(error, file)
        return {"raised": said(error), "file": found, "line": line}
    if not batched:
        return as_reply(value)
    count = len(request["response"])
    if not isinstance(value, list) or len(value) != count:
        said_count = f" with {len(value)} values" if isinstance(value, list) else ""
        return {"returned": f"{shown(value)}{said_count}, not a list of {count} scores,"}
    return {"scores": list(map(as_reply, value))}


def _columns(text: str) -> dict[str, Any]:
    return json.loads(text) if text else {}


def as_reply(value: Any) -> dict[str, Any]:
    """What the function said of one response: its score and what that is made of, or what it returned instead.

    Of a dict, the score is its `reward`, or else the sum of its values; None for one of them: nobody can tell.
    """
    if value is None:
        return {"score": None}
    if isinstance(value, dict):
        numbers = {name: None if each is None else as_number(each) for name, each in value.items()}
        wrong = any(numbers[name] is None and value[name] is not None for name in numbers)
        if not numbers or wrong or not all(isinstance(name, str) for name in numbers):
            return {"returned": f"{shown(value)}, not a dict of names to finite numbers,"}
        known = {name: number for name, number in numbers.items() if number is not None}
        score = numbers[REWARD] if REWARD in numbers else math.fsum(known.values())
        if len(known) < len(numbers) and not (REWARD in numbers and numbers[REWARD] is not None):
            score = None
        return {"score": score, "components": {name: each for name, each in known.items() if name != REWARD}}
    score = as_number(value)
    return {"returned": shown(value)} if score is None else {"score": score}


def as_number(value: Any) -> float | None:
    """A finite number as a float (True and False, NumPy and torch scalars too); None for anything else."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return None
    try:
        score = float(value)
    except Exception:  # any class of `value`: it is not a number
        return None
    return score if math.isfinite(score) else None


def shown(value: Any) -> str:
    """A value for an error, in a few characters."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"a value that cannot be shown ({type(error).__name__})"
    kind = type(value).__name__
    if inspect.isawaitable(value):
        return f"a {kind}, which has to be awaited"
    short = one_line(text, SHOWN)
    return short if isinstance(value, (str, bytes, int, float, list, tuple, dict)) else f"{short} ({kind})"


def file_of(function: Callable[..., Any]) -> str | None:
    """The file in which a function was written."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None:
        return code.co_filename
    module = sys.modules.get(getattr(function, "__module__", None) or type(function).__module__)
    return getattr(module, "__file__", None)


def own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the two pipes out of the function's reach: it reads nothing and prints to standard error."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def end_with(parent: int, started_by_main_thread: bool) -> None:
    """End with the parent, however it ends, also in the middle of a call."""
    told = False
    if started_by_main_thread and sys.platform == "linux":  # the signal comes when the thread that started us ends
        told = ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGKILL) == 0
    if os.getppid() != parent:
        os._exit(1)
    if not told:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
