"""Small runs, evaluations and comparisons that take seconds: what the campaign of kills disturbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.recipes import llama, write_reward
from thence.data.worlds.vocabulary import save_tokenizer
from thence.toml import to_toml

MODEL = llama(num_key_value_heads=1)
SFT = {"lr": 1e-2, "batch": 8, "steps": 4, "checkpoint_every": 2, "data": {"limit": 20}}
RL = {
    "lr": 1e-2,
    "steps": 3,
    "prompts": 4,
    "rollouts": 4,
    "max_tokens": 8,
    "checkpoint_every": 1,
    "data": {"limit": 20, "seed": 1},
}
ROUNDS = {"groups": [2, 1, 1], "thresholds": [0.5, 0.9], "fractions": [0.25, 1.0]}
METHODS: dict[str, dict[str, Any]] = {
    "relift": {},
    "exgrpo": {},
    "bread": {},
    "sasr": {},
    "trapo": ROUNDS,
    "sdpo": {"form": "{solution};{prompt}"},
    "sdft": {"form": "{solution};{prompt}", "divergence": "jsd", "top_k": 6, "teacher": "average"},
}
"""Methods that carry something from one step to the next, beside the optimizer's moments (sdft and sdpo a moving
average), or sample in rounds."""


@dataclass(frozen=True)
class Scenario:
    """A command that is killed and run again.

    Args:
        make: writes what the command reads into a folder and returns its arguments, given the folder that it writes.
        share: of the kills; a comparison takes ten times as long as a run.
        side_by_side: the command starts processes of its own that do the work.
    """

    name: str
    make: Callable[[Path, Path], list[str]]
    share: float = 1.0
    side_by_side: bool = False


def _foundation(inputs: Path) -> str:
    """A tokenizer, a reward function; returns how a recipe names the function."""
    inputs.mkdir(parents=True, exist_ok=True)
    if not (inputs / "tokenizer").exists():
        save_tokenizer(inputs / "tokenizer")
    return write_reward(inputs, "1.0 if sum(map(ord, response)) % 3 == 0 else 0.0", "odd")


def run_of(stages: list[str], method: str = "grpo", **options: Any) -> Callable[[Path, Path], list[str]]:
    """``thence run`` of these stages; the same text of arguments every time."""

    def make(inputs: Path, folder: Path) -> list[str]:
        reward = _foundation(inputs)
        tables: dict[str, Any] = {
            "name": "chaos",
            "stages": stages,
            "seed": 5,
            "model": {"init": MODEL, "tokenizer": str(inputs / "tokenizer")},
            "data": {"source": ["world:chain"]},
            "sft": SFT,
            "rl": {**RL, "reward": reward, "method": method, "options": options},
            "eval": {"max_tokens": 8, "samples": 2, "reward": reward, "data": {"limit": 6}},
        }
        used = {stage.split("-")[0] for stage in stages}
        tables = {k: v for k, v in tables.items() if k not in ("sft", "rl", "eval") or k in used}
        recipe = inputs / f"{'-'.join(stages)}-{method}.toml"
        recipe.write_text(to_toml(tables), encoding="utf-8")
        return ["run", str(recipe), "--folder", str(folder)]

    return make


def evaluation(inputs: Path, folder: Path) -> list[str]:
    """``thence eval`` of the shipped base on problems in a file."""
    _foundation(inputs)
    rows = [{"question": f"{i}a+{i}?", "answer": str(2 * i)} for i in range(8)]
    sums = inputs / "sums.jsonl"
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = "--grader exact --samples 4 --max-tokens 8 --rows 4 --chat-template none --temperature 1"
    return ["eval", "world:chain/rich", "--suite", str(sums), *settings.split(), "--folder", str(folder)]


def comparison(inputs: Path, folder: Path) -> list[str]:
    """``thence compare`` of two arms over two processes."""
    reward = _foundation(inputs)
    base = {
        "stages": ["sft-pretrain", "eval"],
        "model": {"init": MODEL, "tokenizer": str(inputs / "tokenizer")},
        "data": {"source": ["world:chain"], "limit": 16},
        "sft-pretrain": {"lr": 1e-2, "batch": 8, "steps": 2},
        "eval": {"data": {"limit": 2}, "max_tokens": 8},
    }
    (inputs / "base.toml").write_text(to_toml(base), encoding="utf-8")
    own: dict[str, Any] = {
        "name": "chaos",
        "reference": "sft-then-rl",
        "seeds": [0],
        "budget": {"tokens": 1200},
        "bases": {"small": {"recipe": str(inputs / "base.toml")}},
        "data": {"source": ["world:chain"]},
        "sft": {"lr": 1e-2, "batch": 8, "epochs": 2, "data": {"limit": 16}, "checkpoint_every": 1},
        "rl": {k: v for k, v in RL.items() if k != "steps"} | {"reward": reward},
        "eval": {"max_tokens": 8, "samples": 2, "reward": reward, "data": {"split": "test", "limit": 5}},
        "arms": {
            "base": {},
            "sft": {"kind": "sft"},
            "sft-then-rl": {"after": "sft", "kind": "rl"},
            "rl": {"kind": "rl"},
        },
    }
    recipe = inputs / "comparison.toml"
    recipe.write_text(to_toml(own), encoding="utf-8")
    return ["compare", str(recipe), "--jobs", "2", "--folder", str(folder)]


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("run", run_of(["eval-base", "sft", "rl", "eval-rl"], kl=0.05)),
        *(Scenario(f"run-{method}", run_of(["rl"], method, **options)) for method, options in METHODS.items()),
        Scenario("eval", evaluation),
        Scenario("compare", comparison, share=0.25, side_by_side=True),
    )
}
