"""The process in which environments of the user's own live. `thence.rollout.environments` starts it.

It loads the class once and holds one object of it for each rollout under way. Requests are {"op": "reset", "id", "row",
"seed"}, {"op": "step", "id", "text"} and {"op": "end", "id"}; replies are {"observation", ...}, {"raised"}, {"slow"} or
{"returned"}. Pipes and the end of the process are as for reward functions (`thence.verify.function_worker`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from thence.errors import UserError
from thence.framed import pack, read
from thence.verify.function_worker import as_number, end_with, file_of, own_pipes, refused, shown
from thence.verify.loading import ENVIRONMENT, SEED, error_place, load_environment, said, stated_threshold, wants_seed

MOST_CHARACTERS = 1_000_000
"""Of one observation; a model's context holds less."""


class _Late(BaseException):
    """The call took too long. Not an Exception: an environment's own `except Exception` must not stop it."""


def main(spec: str, parent: int, started_by_main_thread: bool) -> None:
    """Serve until the parent closes the pipe; arguments as for :func:`thence.verify.function_worker.main`."""
    end_with(parent, started_by_main_thread)
    requests, replies = own_pipes()
    try:
        made = load_environment(spec)
        stated, right_from = stated_threshold(made, spec, ENVIRONMENT)
    except UserError as error:
        replies.write(pack(refused(error)))
        return
    signal.signal(signal.SIGALRM, _ring)
    replies.write(pack({"ready": True, "stated": stated, "right_from": right_from}))
    held: dict[int, Any] = {}
    file = file_of(made.step)
    while (request := read(requests)) is not None:
        replies.write(pack(_answer(made, held, request, file)))


def _ring(*_: object) -> None:
    raise _Late


def _answer(made: type[Any], held: dict[int, Any], request: dict[str, Any], file: str | None) -> dict[str, Any]:
    place = request["id"]
    if request["op"] == "end":
        held.pop(place, None)
        return {}
    if request["op"] == "step":
        return _timed(lambda: held[place].step(request["text"]), as_step, request["seconds"], file)

    def reset() -> Any:
        held[place] = made()
        seed = {SEED: request["seed"]} if wants_seed(made) else {}
        return held[place].reset(request["row"], **seed)

    return _timed(reset, as_first, request["seconds"], file)


def _timed(
    call: Callable[[], Any], reply: Callable[[Any], dict[str, Any]], seconds: float, file: str | None
) -> dict[str, Any]:
    """What the environment did within its time."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return reply(call())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Late:
        return {"slow": True}
    except BaseException as error:
        found, line = error_place(error, file)
        return {"raised": said(error), "file": found, "line": line}


def as_first(value: Any) -> dict[str, Any]:
    """What `reset` returned: the first observation or None."""
    wrong = None if value is None else _wrong_text(value)
    return {"returned": f"{wrong}, not a text or None"} if wrong else {"observation": value}


def as_step(value: Any) -> dict[str, Any]:
    """What `step` returned: a tuple of observation, reward and done, or an object with attributes of these names."""
    if isinstance(value, tuple) and len(value) == 3:
        observation, reward, done = value
    elif all(hasattr(value, name) for name in ("observation", "reward", "done")):
        observation, reward, done = (getattr(value, name) for name in ("observation", "reward", "done"))
    else:
        return {"returned": f"{shown(value)}, not (observation, reward, done)"}
    if observation is not None and (wrong := _wrong_text(observation)):
        return {"returned": f"the observation {wrong}, not a text"}
    number = None if reward is None else as_number(reward)
    if reward is not None and number is None:
        return {"returned": f"the reward {shown(reward)}, not a finite number or None"}
    over = _truth(done)
    if over is None:
        return {"returned": f"{shown(done)} for done, not True or False"}
    if observation is None and not over:
        return {"returned": "no observation (None), and is not done"}
    return {"observation": observation, "reward": number, "done": over}


def _wrong_text(value: Any) -> str | None:
    """What is wrong with an observation; None: nothing."""
    if not isinstance(value, str):
        return shown(value)
    if len(value) > MOST_CHARACTERS:
        return f"of {len(value):,} characters (at most {MOST_CHARACTERS:,} are read)"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "with half a character (a lone surrogate)"
    return None


def _truth(value: Any) -> bool | None:
    """True or False, also of NumPy and torch; None: it is neither."""
    if isinstance(value, bool):
        return value
    try:
        plain = value.item()
    except Exception:  # any class of `value`: it is no truth value
        return None
    return plain if isinstance(plain, bool) else None
