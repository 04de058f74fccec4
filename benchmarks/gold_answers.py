"""Is every gold answer of the evaluation data graded right against itself, written as `\\boxed{...}`?

    python benchmarks/gold_answers.py DATA --out benchmarks/results/gold-answers.json

DATA holds LUFFY's `valid.all.parquet` (6,023 rows: 1,590 problems, of which AIME and AMC stand there 32 times), and
perhaps `valid.arc_c.parquet` and GSM8K's `test.jsonl`, as the suites look for them. A problem's answer is graded once
by each rule and counted with its number of rows. The record has every answer that is not graded right by the official
rule, and why; it is made again in under a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from thence.evaluate.problems import Problem, load_problems
from thence.evaluate.suites import Task, load_suite
from thence.verify import Grade, Verdict, load_reward

# name of the rule, and the response that it has to take
RULES = {
    "math": "\\boxed{{{answer}}}",
    "math-after-think": "So it is.\n</think>\n\\boxed{{{answer}}}",
    "math-boxed": "\\boxed{{{answer}}}",
}


@dataclass(frozen=True)
class Row:
    """A problem, how many rows of the file it stands for, and its grade by every rule."""

    problem: Problem
    rows: int
    grades: dict[str, Grade]


def main() -> int:
    """Grade, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the evaluation files")
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of one answer")
    args = parser.parse_args()
    start = time.perf_counter()
    tasks = [task for suite in ("paper-id", "paper-ood", "gsm8k") for task in load_suite(suite).tasks]
    tasks = [task for task in tasks if any((args.data / name).is_file() for name in task.files)]
    graded = {task.name: grade_task(task, args.data, args.seconds) for task in tasks}
    record = record_of(tasks, graded) | {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/gold_answers.py DATA --out benchmarks/results/gold-answers.json",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")},
        "seconds": round(time.perf_counter() - start, 1),
    }
    for name, row in record["tasks"].items():
        print(name, row)
    print(f"paper-id: {record['paper_id_rows_right']} of {record['paper_id_rows']} rows right; not right by math:")
    for case in record["not_right"]:
        print(" ", json.dumps(case, ensure_ascii=False))
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def grade_task(task: Task, data: Path, seconds: float) -> list[Row]:
    """Every problem of a task with its grades."""
    problems = load_problems(task, data)
    grades: dict[str, Sequence[Grade]] = {}
    for rule, form in RULES.items():
        with load_reward(rule, seconds=seconds) as grader:
            responses = [form.format(answer=problem.answer) for problem in problems]
            texts, answers = [problem.text for problem in problems], [problem.answer for problem in problems]
            grades[rule] = grader.grade_many(texts, responses, answers)
    copies = copies_of(task, data)
    return [
        Row(problem, copies[problem.text] if copies else 1, {rule: found[i] for rule, found in grades.items()})
        for i, problem in enumerate(problems)
    ]


def copies_of(task: Task, data: Path) -> Counter[str]:
    """How often each problem stands in the task's file; empty for other files than Parquet in LUFFY's layout."""
    import pyarrow.parquet as pq

    path = next(data / name for name in task.files if (data / name).is_file())
    if path.suffix != ".parquet":
        return Counter()
    rows = pq.read_table(path, columns=["data_source", "prompt"]).to_pylist()
    wanted = task.filter.get("data_source")
    return Counter(row["prompt"][-1]["content"] for row in rows if wanted in (None, row["data_source"]))


def record_of(tasks: Sequence[Task], graded: dict[str, list[Row]]) -> dict[str, Any]:
    """Counts for each task, and what is not right by the official rule."""
    table, cases = {}, []
    for task in tasks:
        rows = graded[task.name]
        table[task.name] = {
            "problems": len(rows),
            "rows": sum(row.rows for row in rows),
            "rows_right": {
                rule: sum(row.rows for row in rows if row.grades[rule].verdict is Verdict.RIGHT) for rule in RULES
            },
        }
        cases += [case_of(row) for row in rows if row.grades["math"].verdict is not Verdict.RIGHT]
    mine = [table[task.name] for task in tasks if task.group == "ID"]
    return {
        "tasks": table,
        "paper_id_rows": sum(row["rows"] for row in mine),
        "paper_id_rows_right": sum(row["rows_right"]["math"] for row in mine),
        "not_right": cases,
    }


def case_of(row: Row) -> dict[str, Any]:
    """An answer that the official rule does not take, with what was parsed of it."""
    grade = row.grades["math"]
    return {
        "task": row.problem.task,
        "key": row.problem.key,
        "source": Path(row.problem.source).name,
        "rows": row.rows,
        "answer": row.problem.answer,
        "verdict": {rule: found.verdict.value for rule, found in row.grades.items()},
        "extracted": grade.extracted,
        "why": why(row.problem.answer, grade),
        "parsed": parsed(row.problem.answer),
    }


def why(answer: str, grade: Grade) -> str:
    """Why an answer is not equal to itself, as far as can be told."""
    if grade.reason:
        return grade.reason
    if "$" in answer:
        return "the gold answer has dollar signs in it, which end the formula $answer$ early: a piece of it is read"
    return "the two readings below are not equal"


def parsed(answer: str) -> dict[str, list[str]]:
    """What math-verify reads in the gold answer as it is, and in the boxed one."""
    from math_verify import parse

    forms = {"gold": f"${answer}$", "boxed": f"\\boxed{{{answer}}}"}
    return {name: [str(item)[:200] for item in parse(form)] for name, form in forms.items()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    sys.exit(main())
