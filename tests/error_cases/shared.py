"""What cases copy: data, a finished run, one that was stopped, an evaluation, a comparison. Each is made once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from tests.compare.comparisons import make_comparison
from tests.recipes import ROWS, Tables, changed, file_recipe, write_rows
from thence.cli import main
from thence.compare.result import RESULTS, results_json
from thence.toml import to_toml
from thence.train.trainer import Trainer


def recipe_tables(here: Path) -> Tables:
    """Data, a tokenizer and a recipe of seconds, with paths relative to the folder."""
    made = file_recipe(here)
    return json.loads(json.dumps(made).replace(f"{here}/", ""))


def data(here: Path) -> None:
    """`recipe.toml` (SFT, then RL, then an evaluation), its data, a tokenizer and a reward of one's own."""
    made = recipe_tables(here)
    (here / "recipe.toml").write_text(to_toml(made))
    trained = changed(made, {"stages": ["sft", "eval"], "sft.steps": 2, "sft.checkpoint_every": 1})
    (here / "short.toml").write_text(to_toml(trained))


def run(here: Path) -> None:
    """`run`: SFT and an evaluation, finished."""
    data(here)
    _done("run", "short.toml")


def begun(here: Path) -> None:
    """`run`: stopped after the first of two steps of SFT, with a checkpoint."""
    data(here)
    original = Trainer.step

    def step(self: Trainer, *given: Any, **named: Any) -> Any:
        if self.steps_taken == 1:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    Trainer.step = step  # type: ignore[method-assign]
    try:
        _done("run", "short.toml", code=130)
    finally:
        Trainer.step = original  # type: ignore[method-assign]


def evaluation(here: Path) -> None:
    """`e`: an evaluation of the trained model on three problems."""
    run(here)
    write_rows(here / "sums.jsonl", [{"question": row["prompt"], "answer": row["answer"]} for row in ROWS[:3]])
    _done("eval", "run/stages/sft/model", "--suite", "sums.jsonl", *GRADED, "--folder", "e")


GRADED = ("--grader", "exact", "--max-tokens", "8", "--samples", "2")


def comparison(here: Path) -> None:
    """`c`: a comparison's results of six runs, and `c.toml`."""
    made = make_comparison({"sft": 0.0, "rl": 0.5}, seeds=3)
    named = tuple(replace(each, folder=f"runs/{each.arm}-{each.seed}") for each in made.runs)
    (here / "c").mkdir()
    (here / "c" / RESULTS).write_text(results_json(replace(made, runs=named)))
    described = {
        "name": "trial",
        "reference": "sft",
        "seeds": [0, 1, 2],
        "bases": {"rich": {"path": "world:chain/rich"}},
        "data": {"source": ["world:chain"], "limit": 60},
        "eval": {"reward": "exact"},
        "arms": {"sft": {"kind": "sft"}, "rl": {"kind": "rl"}},
    }
    (here / "c.toml").write_text(to_toml(described))


BASES: dict[str, Callable[[Path], None]] = {
    "data": data,
    "run": run,
    "begun": begun,
    "evaluation": evaluation,
    "comparison": comparison,
}


class Shared:
    """The folders to copy, made on first use under one folder."""

    def __init__(self, at: Path):
        self._at = at

    def copy(self, base: str, here: Path) -> None:
        """Copy a folder of BASES."""
        made = self._at / base
        if not made.exists():
            made.mkdir(parents=True)
            with inside(made):
                BASES[base](made)
        shutil.copytree(made, here, dirs_exist_ok=True)


def _done(*command: str, code: int = 0) -> None:
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        found = main(command)
    assert found == code, said.getvalue()


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
