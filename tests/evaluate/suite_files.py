"""Files of problems as suites name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thence.evaluate.suites import Task, load_suite

SYSTEM = "Think in tags, then box the answer."
AIME = {"Find $1+1$.": "2", "Find $2+2$.": "4"}
AMC = {"Half of 284?": "142.0"}
ARC = ("Which effect?\n\nA) Density will decrease.\nB) Years will become longer.\n", "B")


def luffy_row(source: str, text: str, answer: str, index: int) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"content": SYSTEM, "role": "system"}, {"content": text, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index, "split": "default"},
        "__index_level_0__": index,
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(suite: str, name: str, **overrides: Any) -> Task:
    return next(task for task in load_suite(suite, overrides).tasks if task.name == name)


MMLU = [
    {"question": f"Question {i}?", "options": ["one", "two", "three", "four"], "answer": "C", "answer_index": 2}
    for i in range(40)
]
