"""What the cases are made from: a tiny tokenizer, data, a finished run, an evaluation and a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.recipes import file_recipe
from thence.cli import main
from thence.toml import to_toml


@dataclass(frozen=True)
class Ground:
    """Where the whole, undamaged things lie; cases copy them."""

    folder: Path
    tables: dict[str, Any]
    comparison: dict[str, Any]

    def path(self, name: str) -> Path:
        """A file or folder of the ground."""
        return self.folder / name


def make_ground(folder: Path, with_comparison: bool = True) -> Ground:
    """Run one tiny run, one evaluation and, where asked for, one comparison to their ends."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = file_recipe(folder, after="share.right_from = 0.5")
    (folder / "recipe.toml").write_text(to_toml(tables))
    comparison = _comparison(folder)
    (folder / "comparison.toml").write_text(to_toml(comparison))
    ends = [main(["run", str(folder / "recipe.toml")]), main([*evaluation_of(folder, folder / "eval")])]
    if with_comparison:
        ends.append(main(["compare", str(folder / "comparison.toml"), "--jobs", "1"]))
    if any(ends):
        raise RuntimeError(f"the ground could not be made: exit codes {ends}")
    return Ground(folder, tables, comparison)


def evaluation_of(ground: Path, folder: Path) -> list[str]:
    """The command of the evaluation."""
    model, suite = str(ground / "run" / "stages" / "sft" / "model"), str(ground / "test.jsonl")
    return ["eval", model, "--suite", suite, "--max-tokens", "8", "--grader", "exact", "--folder", str(folder)]


def _comparison(folder: Path) -> dict[str, Any]:
    test = {"source": [str(folder / "test.jsonl")]}
    return {
        "name": "tiny",
        "folder": str(folder / "comparison"),
        "reference": "sft",
        "seeds": [0],
        "budget": {"steps": 1},
        "bases": {"small": {"path": str(folder / "run" / "stages" / "sft" / "model")}},
        "data": {"source": [str(folder / "train.jsonl")]},
        "sft": {"lr": 1e-2, "batch": 4, "steps": 1},
        "eval": {"max_tokens": 8, "reward": "exact", "data": test},
        "arms": {"base": {}, "sft": {"kind": "sft"}},
    }
