"""Environments in files, and a policy that says what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thence.data.trajectory import Prompt
from thence.recipe.tables import Environment
from thence.rollout.native import Response, Sampling
from thence.rollout.turns import Player

COUNTER = """
class Counter:
    '''Counts the turns; done at the third.'''

    def reset(self, row):
        self.row, self.turns = row, 0

    def step(self, text):
        self.turns += 1
        return f"{self.turns}", 0.5 * self.turns, self.turns == 3
"""


def write(folder: Path, body: str, name: str = "Own") -> str:
    """Write a class into a file; its spec. ``body`` is all of it, or the methods of `Own`, indented here."""
    file = folder / "own_environment.py"
    if "class " not in body:
        lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
        body = f"import time\n\n\nclass {name}:\n{lines}"
    file.write_text(body)
    return f"{file}:{name}"


class Scripted:
    """Samples what it is told, turn by turn; keeps what it was asked."""

    def __init__(self, tokenizer: Any, say: Callable[[int, int], str], end: int):
        self.tokenizer, self.say, self.end = tokenizer, say, end
        self.asked: list[list[tuple[int, ...]]] = []
        self.seeds: list[list[int]] = []

    def __call__(
        self, contexts: Sequence[Sequence[int]], seeds: Sequence[int], limits: Sequence[int]
    ) -> list[Response]:
        turn = len(self.asked)
        self.asked.append([tuple(context) for context in contexts])
        self.seeds.append(list(seeds))
        found = []
        for i, limit in enumerate(limits):
            ids = [*self.tokenizer.encode(self.say(turn, i), add_special_tokens=False), self.end]
            finish = "stop" if len(ids) <= limit else "length"
            found.append(Response(ids[:limit], [-0.5] * len(ids[:limit]), finish))
        return found


def player(spec: str, chat: Any, right_from: float | None = None, **settings: Any) -> Player:
    return Player(Environment(path=spec, **settings), right_from, chat)


def prompts(tokenizer: Any, count: int = 1) -> list[Prompt]:
    ids = tuple(tokenizer.encode("1+1?"))
    return [Prompt(i, ids, answer="2", text="1+1?", columns='{"level": 3}') for i in range(count)]


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"max_tokens": 40, "stop_ids": (0,), **changes})
