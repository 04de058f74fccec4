"""The verdict of `benchmarks/soak.py` tells a leak from a level series."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import soak  # pyright: ignore[reportMissingImports]


def series(**changes: Callable[[float], float]) -> list[dict[str, Any]]:
    """An hour of samples that rise at first, as every run does, and are level with some noise afterwards."""
    noise = random.Random(0)
    samples = []
    for seconds in range(0, 3601, 10):
        row: dict[str, Any] = {
            "seconds": float(seconds),
            "done": 2 * seconds,
            "cpu_seconds": 0.8 * seconds,
            "rss_mb": 500 + min(seconds, 600) / 6 + noise.uniform(-3, 3),
            "children_rss_mb": 200 + noise.uniform(0, 150),
            "fds": 20 + (noise.random() < 0.1),
            "threads": 3,
            "children": 3 - (noise.random() < 0.1),
        }
        samples.append(row | {name: row[name] + change(seconds) for name, change in changes.items()})
    return samples


def test_a_level_series_is_level() -> None:
    found = soak.verdict(series())
    assert (found["verdict"], found["wrong"]) == ("level", [])


def test_other_work_on_the_machine_is_told_from_the_programs_own_slowness() -> None:
    late = {"done": lambda t: -0.4 * max(0, t - 1800), "cpu_seconds": lambda t: -0.16 * max(0, t - 1800)}
    found = soak.verdict(series(**late))
    assert found["wrong"] == ["speed changes by -20.0%, by +0.0% for a second of processor time"]


def test_a_program_that_needs_more_processor_time_is_named_on_a_machine_that_hides_it() -> None:
    found = soak.verdict(series(cpu_seconds=lambda t: 0.4 * max(0, t - 1800)))
    assert found["verdict"] == "not level"
    assert "speed changes by +0.0%, by -33.3%" in found["wrong"][0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rss_mb": lambda t: 30 * t / 3600}, "memory grows"),
        ({"children_rss_mb": lambda t: 100 * t / 3600}, "memory of the children grows"),
        ({"fds": lambda t: t // 900}, "fds grow"),
        ({"fds": lambda t: t > 2900}, "fds grow"),
        ({"threads": lambda t: t // 600}, "threads grow"),
        ({"children": lambda t: t // 600}, "children grow"),
        ({"done": lambda t: -0.4 * max(0, t - 1800)}, "speed changes by -20"),
    ],
)
def test_a_leak_is_named_and_nothing_else(changes: dict[str, Callable[[float], float]], said: str) -> None:
    found = soak.verdict(series(**changes))
    assert found["verdict"] == "not level"
    assert len(found["wrong"]) == 1 and said in found["wrong"][0]


def test_too_few_samples_get_no_verdict() -> None:
    with pytest.raises(ValueError, match="too few"):
        soak.verdict(series()[:3])


def test_thinning_keeps_the_last_sample_and_the_work_done() -> None:
    samples = series()
    kept = soak.thinned(samples)
    assert len(kept) <= 200 and kept[-1]["done"] == samples[-1]["done"]
    assert all(row["per_s"] == 2.0 for row in kept[1:])
