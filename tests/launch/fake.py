"""A launcher that runs nothing: a test says what becomes of each job."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Self

from thence.launch.base import LAST, Message, Needs, Order

Act = Callable[[Order, int], list[dict[str, Any]]]
"""What is said of a job at its so-many-th start, counted from 1."""


class FakeLauncher:
    """Runs up to ``room`` jobs at a time; each round of events ends the one that was started first."""

    def __init__(self, act: Act, room: int = 1, check: Callable[[list[Needs]], None] = lambda needs: None):
        self.act, self.room, self._check = act, room, check
        self.starts: list[Order] = []
        self.running: list[Order] = []
        self.most, self.open = 0, False

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.open = False

    def check(self, needs: Iterable[Needs]) -> None:
        self._check(list(needs))

    def has_room(self, needs: Needs) -> bool:
        return len(self.running) < self.room

    def start(self, order: Order) -> None:
        self.starts.append(order)
        self.running.append(order)
        self.most = max(self.most, len(self.running))

    def events(self, seconds: float) -> list[tuple[Hashable, Message]]:
        order = self.running[0]
        said = self.act(order, sum(one.key == order.key for one in self.starts))
        if any(word in said[-1] for word in LAST):
            self.running.pop(0)
        return [(order.key, message) for message in said]
