"""Recipes that run in seconds: a tiny random model, the embedded world's tokenizer, a reward function in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thence.data.worlds.vocabulary import VOCABULARY, save_tokenizer

Tables = dict[str, Any]
ROWS = [{"prompt": f"{i}+{i}?", "completion": f"{i}+{i}={2 * i}#{2 * i}", "answer": str(2 * i)} for i in range(8)]


def llama(**changes: Any) -> Tables:
    """The configuration of a llama with one layer of width 16, for `model.init`."""
    return {
        "model_type": "llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    } | changes


def model_table(folder: Path, **sizes: Any) -> Tables:
    """[model] with random weights; the tokenizer is saved into the folder."""
    save_tokenizer(folder / "tokenizer")
    return {"init": llama(**sizes), "tokenizer": str(folder / "tokenizer")}


def write_reward(folder: Path, value: str, name: str = "share", after: str = "") -> str:
    """Write ``own.py`` whose function returns the expression ``value``; returns what `rl.reward` is set to."""
    file = folder / "own.py"
    lines = [f"def {name}(prompt, response, answer):", f"    return {value}", *([after] if after else [])]
    file.write_text("\n".join(lines) + "\n")
    return f"{file}:{name}"


def write_rows(path: Path, rows: list[Tables]) -> str:
    """Write a JSONL file; returns its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def world_recipe(
    folder: Path, stages: list[str], value: str = "1.0", sizes: Tables | None = None, /, **tables: Any
) -> Tables:
    """A recipe on the embedded world.

    Args:
        folder: where tokenizer and reward function go.
        stages: [sft], [rl] and [eval] are in the recipe where a stage is of that kind, or ``tables`` has it.
        value: what the reward function of RL and evaluations returns, an expression of prompt, response and answer.
        sizes: changes of the model's configuration.
        tables: laid over the recipe, each table over its own.
    """
    reward = write_reward(folder, value)
    own: Tables = {
        "stages": stages,
        "model": model_table(folder, **(sizes or {})),
        "data": {"source": ["world:chain"]},
        "sft": {"lr": 1e-2, "batch": 8},
        "rl": {"lr": 1e-2, "prompts": 4, "rollouts": 4, "reward": reward},
        "eval": {"max_tokens": 8, "reward": reward},
    }
    used = {"stages", "model", "data", *(stage.split("-")[0] for stage in stages), *tables}
    return {
        key: {**own.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in {**own, **tables}.items()
        if key in used
    }


def file_recipe(folder: Path, after: str = "") -> Tables:
    """SFT, RL and an evaluation on files in the folder, with a step each; ``after`` follows the reward function."""
    reward = write_reward(folder, "float(len(response) % 2)", after=after)
    data, test = write_rows(folder / "train.jsonl", ROWS), write_rows(folder / "test.jsonl", ROWS[:3])
    return {
        "folder": str(folder / "run"),
        "stages": ["sft", "rl", "eval"],
        "model": model_table(folder, max_position_embeddings=64),
        "data": {"source": [data]},
        "sft": {"batch": 4, "steps": 1, "lr": 1e-3},
        "rl": {"steps": 1, "prompts": 2, "rollouts": 2, "max_tokens": 8, "reward": reward},
        "eval": {"max_tokens": 8, "reward": "exact", "data": {"source": [test]}},
    }


def changed(tables: Tables, flags: Tables) -> Tables:
    """A deep copy with dotted names set, as flags set them."""
    result = json.loads(json.dumps(tables))
    for dotted, value in flags.items():
        *path, leaf = dotted.split(".")
        node = result
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return result


LETTER = "a"


class Recipes:
    """Makes recipes of a tiny model in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, stages: list[str], **tables: Any) -> dict[str, Any]:
        own: dict[str, Any] = {
            "folder": str(self.folder / "run"),
            "data": {"limit": 20},
            "sft": {"steps": 2, "micro_batch_tokens": 512},
            "rl": {"steps": 2, "max_tokens": 12},
            "eval": {"data": {"split": "test", "limit": 3}},
        }
        merged = {k: {**own.get(k, {}), **v} if isinstance(v, dict) else v for k, v in (own | tables).items()}
        value = f"response.count({LETTER!r}) / max(1, len(response))"
        return world_recipe(self.folder, stages, value, {"tie_word_embeddings": True}, **merged)
