"""A comparison that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.recipes import model_table, write_reward
from thence.compare.plan import PlannedRun
from thence.toml import to_toml


class Quiet:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.finished_runs: list[PlannedRun] = []
        self.failures: dict[PlannedRun, str] = {}
        self.notes: list[tuple[PlannedRun, str]] = []

    def planned(self, foreseen) -> None:
        self.foreseen = foreseen

    def spent(self, said) -> None:
        self.said = said

    def begin(self, planner, runs) -> None:
        self.runs = list(runs)

    def started(self, job) -> None:
        pass

    def progress(self, job, stage, done, total) -> None:
        pass

    def noted(self, job, what) -> None:
        self.notes.append((job.run, what))

    def finished(self, job, seconds) -> None:
        self.finished_runs.append(job.run)

    def failed(self, run, why) -> None:
        self.failures[run] = why


def tables(folder: Path, **changes: Any) -> dict[str, Any]:
    """A comparison of tiny models: a tuned SFT, the same with a fault, RL after it, and RL from the base."""
    folder.mkdir(parents=True, exist_ok=True)
    reward = write_reward(folder, "response.count('1') / max(1, len(response))", after="share.right_from = 1e-9")
    base = {
        "stages": ["sft-pretrain", "eval"],
        "model": model_table(folder, tie_word_embeddings=True),
        "data": {"source": ["world:chain"], "limit": 16},
        "sft-pretrain": {"lr": 1e-2, "batch": 8, "steps": 2},
        "eval": {"data": {"limit": 2}},
    }
    (folder / "base.toml").write_text(to_toml(base))
    own: dict[str, Any] = {
        "name": "tiny",
        "folder": str(folder / "comparison"),
        "reference": "sft-then-rl",
        "seeds": [0, 1],
        "budget": {"tokens": 1500},
        "bases": {"small": {"recipe": str(folder / "base.toml")}},
        "tuning": {"eval": {"splits": {"dev": {"split": "dev", "limit": 4}}}},
        "data": {"source": ["world:chain"]},
        "sft": {"lr": 1e-2, "batch": 8, "epochs": 2, "data": {"limit": 16}, "checkpoint_every": 1},
        "rl": {
            "lr": 1e-2,
            "prompts": 4,
            "rollouts": 4,
            "max_tokens": 8,
            "reward": reward,
            "data": {"limit": 20},
            "checkpoint_every": 1,
        },
        "eval": {"max_tokens": 8, "samples": 2, "reward": reward, "data": {"split": "test", "limit": 5}},
        "arms": {
            "base": {},
            "sft": {"kind": "sft", "grid": {"lr": [1e-3, 1e-2]}},
            "broken": {
                "kind": "sft",
                "like": "sft",
                "settings": {"fault": {"names": ["first-micro-batch-only"], "accumulation": 4}},
            },
            "same": {
                "kind": "sft",
                "like": "sft",
                "settings": {"fault": {"names": ["first-and-last-only"], "accumulation": 2}},
            },
            "sft-then-rl": {"after": "sft", "kind": "rl"},
            "rl": {"kind": "rl"},
        },
    }
    return {**own, **changes}
