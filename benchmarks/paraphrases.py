r"""Are the gold answers of the evaluation data graded right in other words, and near misses wrong?

    python benchmarks/paraphrases.py DATA --out benchmarks/results/paraphrases.json

DATA holds LUFFY's `valid.all.parquet` (6,023 rows: 1,590 problems, of which AIME and AMC stand there 32 times). Every
problem's answer is written in three other ways and as three near misses (`paraphrase_forms.py`); a gold answer that
several problems have takes the next ways each time. Both graders grade all of them; a problem counts with its number of
rows. `--sample N` takes every N-th problem. The record has every text that is not graded as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from answer_forms import form_of
from gold_answers import copies_of, cpu_name
from paraphrase_forms import Written, near_misses, paraphrases

from thence.evaluate.problems import load_problems
from thence.evaluate.suites import Task, load_suite
from thence.verify import Grade, load_reward
from thence.verify.math import RULES_VERSION

GRADERS = ("math", "math-boxed")


@dataclass(frozen=True)
class Case:
    """A response made from a gold answer, and how many rows of the data it stands for."""

    task: str
    gold: str
    rows: int
    written: Written


def main() -> int:
    """Write, grade, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the evaluation files")
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="take every N-th problem only")
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of one answer")
    parser.add_argument("--workers", type=int, help="grading processes (default: one a CPU)")
    args = parser.parse_args()
    start = time.perf_counter()
    cases = [case for task in load_suite("paper-id").tasks for case in cases_of(task, args.data, args.sample)]
    grades = {name: grade(cases, name, args.seconds, args.workers) for name in GRADERS}
    record = record_of(cases, grades) | {
        "sample": args.sample,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/paraphrases.py DATA --out benchmarks/results/paraphrases.json",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")}
        | {"rules": RULES_VERSION},
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(record["counts"], indent=1))
    for case in record["left_over"]:
        print(json.dumps(case, ensure_ascii=False))
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def cases_of(task: Task, data: Path, sample: int = 1) -> list[Case]:
    """The paraphrases and near misses of a task's gold answers."""
    copies = copies_of(task, data)
    turns: Counter[str] = Counter()
    found = []
    for problem in load_problems(task, data)[::sample]:
        kind = form_of(problem.answer).kind
        written = [*paraphrases(problem.answer, turns[kind]), *near_misses(problem.answer, turns[kind])]
        turns[kind] += 1
        found += [Case(task.name, problem.answer, copies[problem.text], one) for one in written]
    return found


def grade(cases: Sequence[Case], name: str, seconds: float, workers: int | None) -> list[Grade]:
    """The grade of every case by one grader."""
    with load_reward(name, seconds=seconds, workers=workers) as grader:
        return grader.grade_many(
            [""] * len(cases), [case.written.response for case in cases], [case.gold for case in cases]
        )


def record_of(cases: Sequence[Case], grades: dict[str, list[Grade]]) -> dict[str, Any]:
    """Counts of rows by grader, and by the way of writing; and every text not graded as it should be."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    ways: dict[str, dict[str, Counter[str]]] = {
        "paraphrases": defaultdict(Counter),
        "near misses": defaultdict(Counter),
    }
    left: dict[tuple[str, str], dict[str, Any]] = {}
    for name, found in grades.items():
        counts[name] = {}
        for group, is_right in (("paraphrases", True), ("near misses", False)):
            mine = [(case, one) for case, one in zip(cases, found, strict=True) if case.written.right is is_right]
            verdicts: Counter[str] = Counter()
            for case, one in mine:
                verdicts[one.verdict.value] += case.rows
                ways[group][case.written.way][f"{name} {one.verdict.value}"] += 1
                if one.verdict.value != ("right" if is_right else "wrong"):
                    entry = left.setdefault(
                        (case.gold, case.written.response),
                        {
                            "task": case.task,
                            "gold": case.gold,
                            "response": case.written.response,
                            "way": case.written.way,
                            "should_be": "right" if is_right else "wrong",
                        },
                    )
                    entry[name] = " ".join(filter(None, (one.verdict.value, one.reason)))
            counts[name][group] = {"rows": sum(case.rows for case, _ in mine), **verdicts, "texts": len(mine)}
    return {
        "problems": len(cases) // 6,
        "counts": counts,
        "ways": {group: {way: dict(found) for way, found in table.items()} for group, table in ways.items()},
        "left_over": list(left.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
