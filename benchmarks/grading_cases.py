"""How many pairs of gold answer and response are graded as a careful person says?

    python benchmarks/grading_cases.py CASES.jsonl --out benchmarks/results/grading-cases.json

Every line of CASES.jsonl is {"gold": ..., "response": ..., "right": true or false}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from thence.verify import load_reward
from thence.verify.math import RULES_VERSION

GRADERS = ("math", "math-boxed")


def main() -> int:
    """Grade, print what differs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--out", type=Path, help="also write the record to this file")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.cases.read_text(encoding="utf-8").splitlines() if line.strip()]
    record: dict[str, Any] = {"cases": len(rows), "rules": RULES_VERSION, "errors": {}}
    for name in GRADERS:
        with load_reward(name) as grader:
            found = grader.grade_many(
                [""] * len(rows), [row["response"] for row in rows], [row["gold"] for row in rows]
            )
        record["errors"][name] = [
            row | {"verdict": grade.verdict.value, "reason": grade.reason}
            for row, grade in zip(rows, found, strict=True)
            if (grade.verdict.value == "right") is not row["right"]
        ]
        print(name, len(record["errors"][name]), "of", len(rows))
        for error in record["errors"][name]:
            print(" ", json.dumps(error, ensure_ascii=False))
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
