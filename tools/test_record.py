"""What `make test-all` found, as a short record: tests and seconds by folder, and the names of those that failed.

python tools/test_record.py build/tests.xml [--out benchmarks/results/tests.json]
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from thence.files import to_json

ROOT = Path(__file__).resolve().parents[1]


def record(file: Path) -> dict[str, object]:
    """The record of a JUnit file."""
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    folders: dict[str, Counter[str]] = {}
    failed: list[str] = []
    for case in cases:
        place = case.get("classname", "").split(".")
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found = folders.setdefault("/".join(place[:2]) if len(place) > 2 else "tests", Counter())
        found[outcome] += 1
        found["seconds"] += round(float(case.get("time", 0)))
        if outcome == "failed":
            failed.append(f"{'.'.join(place)}::{case.get('name')}")
    return {
        "command": "make test-all",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "python": platform.python_version(),
        "tests": sum(sum(n for kind, n in found.items() if kind != "seconds") for found in folders.values()),
        "failed": failed,
        "folders": {name: dict(found) for name, found in sorted(folders.items())},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tests.json")
    given = parser.parse_args()
    given.out.write_text(to_json(record(given.file), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
