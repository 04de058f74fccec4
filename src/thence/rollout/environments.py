"""The user's environments, in processes of their own: begin a rollout, hand a turn on, take what comes back.

A process holds the environments of many rollouts, one object each. A step that takes too long is interrupted, and its
rollout ends; where it cannot be interrupted its process is ended, and with it all rollouts that it holds. What an
environment raises, or returns instead of what it should, is an error that names class, file, line and row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from thence.errors import UserError
from thence.verify.loading import ENVIRONMENT
from thence.verify.own_function import LARGEST, SLOW_IN_A_ROW, Ended, FunctionProcess, Stated, TooSlow

log = logging.getLogger(__name__)
WORKER = "thence.rollout.environment_worker"
MARGIN = 2.0
"""Seconds after the limit of a step within which its process must have interrupted it; else the process is ended."""
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What an environment said to a turn.

    Args:
        observation: what the policy reads next; None where the rollout is over.
        reward: None: it says nothing of this turn, or cannot tell.
        done: the rollout is over.
    """

    observation: str | None
    reward: float | None
    done: bool


@dataclass(frozen=True)
class Failure:
    """A rollout that its environment could not continue. Nobody can tell its score.

    Args:
        finish: why.
        reason: the same in words.
    """

    finish: Literal["error", "timeout"]
    reason: str


@dataclass(frozen=True)
class Played:
    """A rollout under way.

    Args:
        place: number of its environment among all of the pool.
        where: the row that it is of, for messages.
    """

    place: int
    where: str


class EnvironmentPool:
    """Processes with environments of one class. `close` ends them.

    Args:
        spec: `package.module:Class` or `path/to/file.py:Class`.
        seconds: wall-clock limit of one `reset` or `step`.
        processes: how many; rollouts are dealt to them in turn.
        slow_in_a_row: an error ends the run (UserError), and so do so many steps in a row that take too long. None:
            nothing does; the rollout has no score, which the log says once.

    Raises:
        UserError: the class cannot be loaded.
    """

    def __init__(self, spec: str, seconds: float, processes: int = 1, slow_in_a_row: int | None = SLOW_IN_A_ROW):
        self._slots = [_Slot(spec, seconds, slow_in_a_row) for _ in range(processes)]
        self._begun = 0

    @property
    def stated(self) -> Stated:
        """What the class says of its own scores."""
        return self._slots[0].stated

    def begin(
        self, rows: Sequence[dict[str, Any]], seeds: Sequence[int], wheres: Sequence[str]
    ) -> list[tuple[Played, str | Failure | None]]:
        """Make an environment for each row and reset it. Each comes with its first observation, if it has one."""
        played = [Played(self._begun + i, where) for i, where in enumerate(wheres)]
        self._begun += len(played)
        asked = {p.place: {"row": row, "seed": seed} for p, row, seed in zip(played, rows, seeds, strict=True)}

        def reset(slot: _Slot, p: Played) -> str | Failure | None:
            found = slot.ask("reset", p, asked[p.place])
            return found if isinstance(found, Failure) else found["observation"]

        return list(zip(played, self._each(played, reset), strict=True))

    def step(self, played: Sequence[Played], texts: Sequence[str]) -> list[Step | Failure]:
        """Hand each its policy's turn."""
        said = {p.place: text for p, text in zip(played, texts, strict=True)}

        def step(slot: _Slot, p: Played) -> Step | Failure:
            found = slot.ask("step", p, {"text": said[p.place]})
            return found if isinstance(found, Failure) else Step(found["observation"], found["reward"], found["done"])

        return self._each(played, step)

    def end(self, played: Sequence[Played]) -> None:
        """Give up the environments of rollouts that are over."""
        self._each(played, lambda slot, p: slot.end(p))

    def failed(self, played: Played, error: UserError) -> Failure:
        """What becomes of a rollout whose observation cannot be read: the error is raised, or its reason kept."""
        return self._slots[played.place % len(self._slots)].failed(error)

    def close(self) -> None:
        """End the processes. May be called twice."""
        for slot in self._slots:
            slot.close()

    def _each(self, played: Sequence[Played], act: Callable[[_Slot, Played], T]) -> list[T]:
        """Do something with each, in the processes side by side, and in each process one after the other."""
        shares = [[i for i, p in enumerate(played) if p.place % len(self._slots) == s] for s in range(len(self._slots))]

        def share(s: int) -> list[tuple[int, T]]:
            return [(i, act(self._slots[s], played[i])) for i in shares[s]]

        if len(self._slots) == 1:
            return [value for _, value in share(0)]
        with ThreadPoolExecutor(len(self._slots)) as threads:
            found = dict(pair for part in threads.map(share, range(len(self._slots))) for pair in part)
        return [found[i] for i in range(len(played))]


class _Slot:
    """One process, started again when it is gone, and what it holds."""

    def __init__(self, spec: str, seconds: float, slow_in_a_row: int | None):
        self._spec, self._seconds, self._slow_in_a_row = spec, seconds, slow_in_a_row
        self._process: FunctionProcess | None = self._started()
        self.stated = self._process.stated
        self._held: set[int] = set()
        self._slow, self._told = 0, False

    def ask(self, op: str, played: Played, request: dict[str, Any]) -> dict[str, Any] | Failure:
        """What the environment of a rollout did. Raises UserError where an error ends the run."""
        if op == "step" and played.place not in self._held:
            return Failure("error", "its environment ended with the process, because of another rollout")
        process, self._process = self._process, None  # gone, unless it answers
        if process is None:
            process = self._started()
        self._held.add(played.place)
        try:
            whole = {"op": op, "id": played.place, "seconds": self._seconds, **request}
            found = process.ask(whole, self._seconds + MARGIN)
        except TooSlow:
            self._held = set()
            return self._late(op, played)
        except Ended as how:
            self._held = set()
            problem = f"environment {self._spec}: {op} ended its process ({how}) on {played.where}"
            return self.failed(UserError(problem, remedy="fix the crash in the environment"))
        self._process = process
        if "slow" in found:
            return self._late(op, played)
        self._slow = 0
        if "raised" in found:
            head, colon, message = found["raised"].partition(": ")
            problem = f"environment {self._spec}: {op} {head} on {played.where}{colon}{message}"
            file, line = found["file"], found["line"]
            return self.failed(UserError(problem, remedy=self._remedy("fix it"), file=file, line=line))
        if "returned" in found or abs(found.get("reward") or 0.0) > LARGEST:
            what = found.get("returned", f"the reward {found.get('reward')}, which is beyond {LARGEST:,.0f}")
            problem = f"environment {self._spec}: {op} returned {what}, on {played.where}"
            wanted = "a text or None" if op == "reset" else "a tuple (observation, reward, done) of str, float, bool"
            return self.failed(UserError(problem, remedy=self._remedy(f"let it return {wanted}")))
        return found

    def end(self, played: Played) -> None:
        """Give up the environment of a rollout. What it does when it goes is nobody's concern."""
        process, self._process = self._process, None
        if process is None or played.place not in self._held:
            self._process = process
            return
        self._held.discard(played.place)
        try:
            process.ask({"op": "end", "id": played.place}, self._seconds + MARGIN)
            self._process = process
        except (TooSlow, Ended):
            self._held = set()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _started(self) -> FunctionProcess:
        return FunctionProcess(self._spec, self._seconds, "environment.seconds", ENVIRONMENT, WORKER)

    def _remedy(self, first: str) -> str:
        return (
            f'{first}; or set environment.on_error = "unknown", and such rollouts are left out'
            if self._slow_in_a_row is not None
            else first
        )

    def failed(self, error: UserError) -> Failure:
        """What becomes of a rollout whose environment is at fault: the error is raised, or its reason kept."""
        if self._slow_in_a_row is not None:
            raise error
        self._tell(f"{error.problem}: nobody can tell the score of this rollout; this is said once")
        return Failure("error", error.problem)

    def _late(self, op: str, played: Played) -> Failure:
        self._slow += 1
        problem = f"environment {self._spec}: {op} took more than {self._seconds:g} s on {played.where}"
        if self._slow_in_a_row is not None and self._slow >= self._slow_in_a_row:
            raise UserError(
                f"{problem}, the last of {self._slow} in a row" if self._slow > 1 else problem,
                remedy=self._remedy("make it quicker, or raise environment.seconds"),
            )
        self._tell(f"{problem}: nobody can tell the score of this rollout; this is said once")
        return Failure("timeout", f"time limit: {op} of the environment took more than {self._seconds:g} s")

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            log.warning("%s", what)
