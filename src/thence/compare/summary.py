"""What a finished run measured and spent, in one small file beside its many large ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thence.compare.result import NOTHING, Column, Measured, Spent
from thence.errors import UserError
from thence.files import read_jsonl, write_atomically

SUMMARY = "summary.json"
CURVE = ("step", "loss", "grad_norm", "reward", "entropy", "response_tokens", "truncated", "flops", "lr")


@dataclass(frozen=True)
class Summary:
    """What the run's own stage cost and how it went, and what its model can do."""

    own: Spent
    measured: tuple[Measured, ...]
    curve: Mapping[str, tuple[float | None, ...]]


def summarise(folder: Path) -> Summary:
    """Make the summary of a run whose stages are done, and keep it in its folder."""
    lines = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    result = json.loads((folder / "stages" / "eval" / "result.json").read_text(encoding="utf-8"))
    samples = read_jsonl(folder / "stages" / "eval" / "samples.jsonl")
    summary = Summary(
        own=_spent(lines),
        measured=tuple(_measured(row, samples) for row in result["rows"]),
        curve={key: tuple(line.get(key) for line in lines) for key in CURVE if any(key in line for line in lines)},
    )
    write_atomically(folder / SUMMARY, json.dumps(asdict(summary)) + "\n")
    return summary


def read_summary(folder: Path) -> Summary | None:
    """The summary of a run; None where it is not done."""
    try:
        plain = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    measured = tuple(
        Measured(**{**each, "column": Column(**each["column"]), "right": tuple(each["right"])})
        for each in plain["measured"]
    )
    return Summary(Spent(**plain["own"]), measured, {key: tuple(values) for key, values in plain["curve"].items()})


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
