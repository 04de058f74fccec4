"""A backend that counts what it is asked, and evaluations with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thence.evaluate.backends import Generation, Request
from thence.evaluate.problems import Problem, load_problems
from thence.evaluate.run import evaluate
from thence.evaluate.store import Settings, Store
from thence.evaluate.suites import Task, load_suite


class Counting:
    """A stand-in for a model: right on the samples that `right` names, in the order of the requests.

    It can be told to stop (Ctrl-C) or break after so many samples.
    """

    name = "native"

    def __init__(self, right: Any = lambda request: True, stop_after: int | None = None, weights: str = "w0"):
        self.right, self.stop_after, self.weights = right, stop_after, weights
        self.asked: list[tuple[str, int, int]] = []

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
        for request in requests:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((request.problem.key, request.sample, request.seed))
            answer = request.problem.answer if self.right(request) else "no"
            yield request, Generation(f"{request.seed}<think>#{answer}", 7, "stop")

    def facts(self) -> dict[str, Any]:
        return {"backend": self.name, "weights": self.weights, "chat_template": None}

    def close(self) -> None:
        pass


def settings_of(data: Path, model: str = "m", limit: int | None = None, **fields: Any) -> Settings:
    suite = load_suite(str(data), {"samples": 3, "grader": "exact", **fields})
    return Settings(model=model, suite=suite.name, limit=limit, tasks={task.name: task for task in suite.tasks})


def problems_of(settings: Settings) -> dict[str, list[Problem]]:
    return {name: load_problems(task, None, settings.limit) for name, task in settings.tasks.items()}


def run(folder: Path, settings: Settings, backend: Counting) -> Store:
    return evaluate(settings, problems_of(settings), folder, lambda: backend)
