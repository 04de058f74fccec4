"""Pages of made-up runs and evaluations, with hostile text in them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.evaluate.counting import Counting, run, settings_of
from tests.pages.test_report import HOSTILE, make_run
from thence.evaluate.summary import summarise
from thence.pages.evaluation.page import write_page

PARTS = """def parts(prompt, response, answer):
    right = float(response.endswith(f"#{answer}"))
    return {"right": right, "<b>form": 0.25 if answer == "0" else 0.5}


parts.right_from = 1.0
"""
WEIGHED = {"text": ["a=", "<b>", "12"], "weight": [0.1, -0.2, 0.0], "log-probability": [-0.5, -2.0, -0.01]}


def run_folder(folder: Path, rl: float) -> Path:
    """A finished run: 30 responses of each evaluation, those of the last of different lengths, and 3 of training."""
    make_run(folder, rl=rl, steps=5)
    path = folder / "stages" / "eval-rl" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"tokens": 5 + place}) + "\n" for place, row in enumerate(rows)))
    (folder / "stages" / "rl").mkdir()
    common = {"stage": "rl", "index": 7, "prompt": "3*4?", "response": HOSTILE, "answer": "12", "tokens": 3}
    rows = [
        common | {"step": 1, "verdict": "right", "score": 1.0, "weighed": WEIGHED},
        common | {"step": 2, "verdict": "wrong", "score": 0.0, "weighed": {"text": ["x"], "weight": [1, 2]}},
        common | {"step": 2, "verdict": "unknown", "score": None},
    ]
    (folder / "stages" / "rl" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluation_page(folder: Path) -> Path:
    """The page of an evaluation of six problems."""
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS)
    rows = [{"question": f"{i}+{i}=? {HOSTILE[:50]}", "answer": str(2 * i)} for i in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = run(
        folder / "kept",
        settings_of(folder / "sums.jsonl", grader=f"{folder / 'parts.py'}:parts"),
        Counting(right=lambda r: r.sample == 0),
    )
    return write_page(store, summarise(store))
