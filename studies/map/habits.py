"""Count how the responses of finished runs work a problem, and where wrong ones go wrong.

A response writes a chain of labelled steps (docs/embedded-world.md). Its habit is the way it works them; a mistake is
the first thing in it that is not right: a step left out, a wrong product, a wrong sum, or another last value.

Run:  python studies/map/habits.py FOLDER [--out studies/map/habits.json]     (FOLDER: of the comparison, with its runs)

Runs that were counted before stay in the file when their folders, or the responses in them, are gone, so a study can be
counted in pieces.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LABELS = "abcd"
STEP = re.compile(r"([a-d])([-+*])(\d+)")
MODULUS = 100


def steps_of(question: str) -> tuple[int, list[tuple[str, str, int]]]:
    """The start value, and (label, operation, value) of each step."""
    start = re.match(r"\d+", question)
    assert start is not None, question
    return int(start[0]), [(label, sign, int(value)) for label, sign, value in STEP.findall(question)]


def values_of(start: int, steps: list[tuple[str, str, int]]) -> list[int]:
    """The value after each step."""
    found, value = [], start
    for _, sign, by in steps:
        value = (value + by if sign == "+" else value - by if sign == "-" else value * by) % MODULUS
        found.append(value)
    return found


def habit_of(working: str) -> str:
    """The way a response works: see the table of habits in docs/embedded-world.md."""
    if not working:
        return "head"
    if "," in working:
        return "slow"
    if ":" in working:
        return "written, split products"
    return "written" if re.search(r"[a-d][-+*]", working) else "terse"


def mistake_of(question: str, response: str) -> str:
    """What is first not right in a response; empty where nothing is."""
    working, mark, answer = response.partition("#")
    start, steps = steps_of(question)
    values = values_of(start, steps)
    last = f"{values[-1]:02d}"
    if not working:
        return "" if answer == last else "in the head"
    parts = re.split(f"([{LABELS}])", working)
    written = list(zip(parts[1::2], parts[2::2], strict=True))
    for place, (label, sign, _) in enumerate(steps):
        if place >= len(written) or written[place][0] != label:
            return "step left out"
        ends = re.findall(r"\d+", written[place][1])
        if not ends or int(ends[-1]) != values[place]:
            return "wrong product" if sign == "*" else "wrong sum or difference"
    if len(written) > len(steps):
        return "steps too many"
    return "" if mark and answer == last else "another last value"


def samples_of(run: Path, split: str) -> Iterator[dict[str, Any]]:
    """The kept responses of a run on a test set."""
    for file in sorted((run / "stages" / "eval" / "evaluation" / "samples").glob(f"{split}-*.jsonl")):
        with file.open() as lines:
            yield from (json.loads(line) for line in lines)


def counted(run: Path, split: str) -> dict[str, Any]:
    """Habits with their right answers, mistakes, and the mean length of the responses of one run."""
    habits: Counter[str] = Counter()
    right: Counter[str] = Counter()
    mistakes: Counter[str] = Counter()
    tokens = total = 0
    for sample in samples_of(run, split):
        working, _, answer = sample["text"].partition("#")
        habit = habit_of(working)
        habits[habit] += 1
        right[habit] += answer == sample["answer"]
        if answer != sample["answer"]:
            mistakes[mistake_of(sample["question"], sample["text"]) or "no mistake found"] += 1
        tokens += sample["tokens"]
        total += 1
    return {"responses": total, "tokens": tokens, "habits": habits, "right": right, "mistakes": mistakes}


def entropy_before_rl(run: Path) -> float | None:
    """Entropy of the first RL step, in nats a token; None where there is no RL."""
    if not (run / "metrics.jsonl").exists():  # of a base that is only measured
        return None
    with (run / "metrics.jsonl").open() as lines:
        for line in map(json.loads, lines):
            if line.get("kind") == "rl" and "entropy" in line:
                return float(line["entropy"])
    return None


def main() -> None:
    """Count every reported run of a comparison's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "habits.json")
    args = parser.parse_args()
    args.out.write_text(json.dumps(merged(args.folder, args.out), indent=1) + "\n")


def merged(folder: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The counts of every reported run, by arm: of those whose folder is there, and of others that were counted before.

    Raises:
        SystemExit: a run's folder is gone, and the run was not counted before.
    """
    before = json.loads(out.read_text()) if out.exists() else {}
    known = {(arm, line["base"], line["seed"]): line for arm, lines in before.items() for line in lines}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in json.loads((folder / "results.json").read_text())["runs"]:
        arm, base, seed = line["arm"], line["base"], line["seed"]
        run = folder / line["folder"]
        splits = {split: counted(run, split) for split in ("in-distribution", "out-of-distribution")}
        if all(counts["responses"] for counts in splits.values()):
            found[arm].append({"base": base, "seed": seed, "entropy": entropy_before_rl(run), **splits})
        elif (arm, base, seed) in known:
            found[arm].append(known[arm, base, seed])
        else:
            raise SystemExit(f"{folder}: the run of {arm} from {base}, seed {seed} is not there, nor in {out}")
    return found


if __name__ == "__main__":
    main()
