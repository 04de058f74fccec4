"""What a finished run measured and spent, in one small file beside its many large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thence.compare.result import NOTHING, SUMMARY, Column, Measured, Spent
from thence.errors import DamagedFile, UserError
from thence.files import fitted, read_json, to_json, write_atomically
from thence.jsonl import read_lines, say_bad_lines
from thence.pipeline.undo import wrong_with_line
from thence.records import Record, read_record

OF_A_SAMPLE = ("split", "temperature", "index", "verdict")
CURVE = ("step", "loss", "grad_norm", "reward", "entropy", "response_tokens", "truncated", "flops", "lr")


@dataclass(frozen=True)
class Summary(Record):
    """What the run's own stage cost and how it went, and what its model can do."""

    own: Spent
    measured: tuple[Measured, ...]
    curve: Mapping[str, tuple[int | float | None, ...]]


def summarise(folder: Path) -> Summary:
    """Make the summary of a run whose stages are done, and keep it in its folder.

    Raises:
        DamagedFile: its lines or results cannot be read, or some are missing, so that the numbers would be wrong.
    """
    lines, eval_folder = _steps(folder / "metrics.jsonl"), folder / "stages" / "eval"
    remedy = f"put a whole copy back, or rename {eval_folder}: the same command then evaluates that model again"
    samples = _rows(eval_folder / "samples.jsonl", remedy)
    for sample in samples:
        fitted(eval_folder / "samples.jsonl", sample, lambda s: [s[k] for k in OF_A_SAMPLE], remedy)
    path, measured = eval_folder / "result.json", []
    try:
        result = read_json(path, remedy=remedy)
    except FileNotFoundError:
        raise DamagedFile("is not there, though its stage is done", remedy=remedy, file=path) from None
    if not samples:
        raise DamagedFile("it lacks samples", remedy=remedy, file=eval_folder / "samples.jsonl")
    fitted(path, result, lambda plain: measured.extend(_measured(row, samples) for row in plain["rows"]), remedy)
    if any(len(m.right) != row["problems"] for m, row in zip(measured, result["rows"], strict=True)):
        raise DamagedFile("it lacks samples", remedy=remedy, file=eval_folder / "samples.jsonl")
    summary = Summary(
        own=_spent(lines),
        measured=tuple(measured),
        curve={key: tuple(line.get(key) for line in lines) for key in CURVE if any(key in line for line in lines)},
    )
    write_atomically(folder / SUMMARY, to_json(asdict(summary)) + "\n")
    return summary


def read_summary(folder: Path) -> Summary | None:
    """The summary of a run; None where it is not done. Raises DamagedFile where it cannot be read."""
    path = folder / SUMMARY
    remedy = "put a whole copy back, or rename it: `thence compare` then makes it again from the run's other files"
    try:
        return read_record(path, Summary, remedy=remedy)
    except FileNotFoundError:
        return None


def _steps(path: Path) -> list[dict[str, Any]]:
    """The measured steps of a run, in order, one a step number; the later line of two counts."""
    remedy = f"put a whole copy back, or rename {path.parent}: the run is then repeated"
    steps: dict[int, dict[str, Any]] = {}

    def shape(line: dict[str, Any]) -> None:
        steps[int(line["step"])] = line
        sum(line[key] for key in ("trained_tokens", "flops", "seconds"))

    for line in _rows(path, remedy):
        fitted(path, line, shape, remedy)
    taken = max([max(steps, default=0), *map(_steps_of_stage, path.parent.glob("stages/*/done.json"))])
    missing = sorted(set(range(1, taken + 1)) - set(steps))
    if missing:
        raise DamagedFile(f"step {missing[0]} is missing, so its cost is not known", remedy=remedy, file=path)
    return [steps[step] for step in sorted(steps)]


def _steps_of_stage(path: Path) -> int:
    remedy = f"put a whole copy back, or rename {path.parent.parent.parent}: the run is then repeated"
    facts = read_json(path, remedy=remedy, shape=lambda facts: isinstance(facts.get("steps", 0), int))
    return int(facts.get("steps", 0))


def _rows(path: Path, remedy: str) -> list[dict[str, Any]]:
    found = read_lines(path, wrong_with_line)
    if found.bad:
        say_bad_lines(path, found.bad, "the run's numbers would be wrong without it")
        raise DamagedFile(f"a damaged line: {found.bad[0].why}", remedy=remedy, file=path, line=found.bad[0].number)
    return found.values


def no_accuracy(what: str) -> UserError:
    """The error of a comparison whose evaluation gives degrees, of which it can make no accuracy."""
    return UserError(
        f"the reward of [eval] gives degrees and states no threshold ({what}): a comparison is one of accuracies",
        remedy="state from which score a response is right: reward_right_from in [eval], or the function's attribute "
        "right_from; then compare into another folder",
        field="eval.reward",
    )


def _spent(lines: Sequence[Mapping[str, Any]]) -> Spent:
    if not lines:
        return NOTHING
    executed = [line.get("executed_flops") for line in lines]
    return Spent(
        steps=len(lines),
        trained_tokens=sum(line["trained_tokens"] for line in lines),
        generated_tokens=sum(line.get("sampled_tokens", 0) for line in lines),
        rule_flops=sum(line["flops"] for line in lines),
        executed_flops=None if None in executed else sum(value or 0.0 for value in executed),
        seconds=sum(line["seconds"] for line in lines),
    )


def _measured(row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Measured:
    if row.get("graded"):
        raise no_accuracy(f"{row['graded']} responses of {row['split']} at temperature {row['temperature']:g}")
    right: dict[int, int] = {}
    for sample in samples:
        if sample["split"] == row["split"] and sample["temperature"] == row["temperature"]:
            right[sample["index"]] = right.get(sample["index"], 0) + (sample["verdict"] == "right")
    return Measured(
        column=Column(row["split"], row["temperature"]),
        right=tuple(right[index] for index in sorted(right)),
        samples=row["samples"],
        mean_tokens=row["mean_tokens"],
        truncated=row["truncated"],
        unknown=row["unknown"],
    )
