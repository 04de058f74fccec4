"""Sampling ahead with real processes: 1 and 2 ranks, weights cut over them, adapters, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.on_ranks import assert_same, case, drive, largest_difference, lines, sampled
from tests.recipes import world_recipe
from thence.toml import to_toml

EVERYTHING = "THENCE_AHEAD_RANKS"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EVERYTHING not in os.environ, reason=f"several minutes of runs on ranks: set {EVERYTHING}=1"),
]

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "mini_batch": 2, "ahead": 1},
    "dapo": {"method": "dapo", "ahead": 2, "options": {"overlong_tokens": 12, "overlong_buffer": 4}},
    "srft": {"method": "srft", "ahead": 1, "options": {"entropy_level": "batch"}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"parallel": "fsdp2"},
    "lora": {"model": {"lora": {"rank": 2}}},
    "lora-fsdp2": {"parallel": "fsdp2", "model": {"lora": {"rank": 2}}},
}


def laid_out(base: dict[str, Any], layout: str) -> dict[str, Any]:
    changes = LAYOUTS[layout]
    return {**base, **changes, "model": {**base["model"], **changes.get("model", {})}}


@pytest.fixture(scope="module")
def runs(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    cases = [case(base, folder / f"{name}-{w}", w, rl) for name, rl in CASES.items() for w in (1, 2)]
    for name, worlds in {"more": (1, 2), "fewer": (2, 1), "again": (2, 2)}.items():
        place = folder / f"moved-{name}"
        cases.append(case(base, place, worlds[0], CASES["dapo"], stop=2))
        cases.append(case(base, place, worlds[1], CASES["dapo"], suffix="-on"))
    for layout in LAYOUTS:
        world = 2 if "fsdp2" in layout else 1
        cases.append(case(laid_out(base, layout), folder / layout, world, CASES["grpo"]))
    for suffix, more in {"": {"stop": 2}, "-on": {}}.items():
        cases.append(case(laid_out(base, "fsdp2"), folder / "parts", 2, CASES["grpo"], suffix=suffix, **more))
    drive(folder, cases, 1800)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_sample_and_train_what_one_does(name: str, runs: Path) -> None:
    assert_same(runs / f"{name}-2", runs / f"{name}-1")
    for one, other in zip(lines(runs / f"{name}-2"), lines(runs / f"{name}-1"), strict=True):
        assert one["staleness"] == other["staleness"]
        assert one["importance"] == pytest.approx(other["importance"], rel=1e-6)


@pytest.mark.parametrize("name", ["more", "fewer", "again"])
def test_batches_that_are_due_move_to_another_number_of_ranks(name: str, runs: Path) -> None:
    place = runs / f"moved-{name}"
    sampled(place), sampled(place, "-on")
    assert largest_difference(place, runs / "dapo-1") < 1e-6
    assert [line["step"] for line in lines(place)] == [1, 2, 3, 4]


def test_weights_that_are_cut_over_ranks_are_gathered_for_the_process_that_samples(runs: Path) -> None:
    assert_same(runs / "fsdp2", runs / "grpo-1")
    sampled(runs / "parts"), sampled(runs / "parts", "-on")
    assert largest_difference(runs / "parts", runs / "fsdp2") == 0


def test_adapters_are_merged_for_it(runs: Path) -> None:
    assert_same(runs / "lora-fsdp2", runs / "lora")
    found = lines(runs / "lora")
    assert all(line["mismatch_kl"] < 1e-9 for line in found[:1]) and found[1]["mismatch_kl"] > 0


# A run that is killed, or whose process is, as a user runs it.

KILLER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import thence.pipeline.rl_stage as rl_stage
from thence.cli import main

at, what = int(sys.argv[1]), sys.argv[2]
step = rl_stage.Loop.step

def begins(loop, number):
    if number == at:
        pid = os.getpid() if what == "trainer" else loop.batches.engine.pid
        os.kill(pid, signal.SIGKILL)
    return step(loop, number)

if what != "nobody":
    rl_stage.Loop.step = begins
sys.exit(main(sys.argv[3:]))
"""


def children_of(folder: Path) -> list[int]:
    """Processes that sample for a run, by what they have open."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if b"thence.pipeline.sampling_process" in words:
                environment = (place / "environ").read_bytes()
                found += [int(place.name)] if f"TMPDIR={folder}".encode() in environment else []
    return found


def started(recipe: Path, folder: Path, at: int, what: str) -> subprocess.CompletedProcess[str]:
    folder.with_name("tmp").mkdir(exist_ok=True)
    (folder.with_name("killer.py")).write_text(KILLER)
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root / "src"), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": str(folder.with_name("tmp"))}
    command = [sys.executable, str(folder.with_name("killer.py")), str(at), what]
    command += ["run", str(recipe), "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("what", ["trainer", "child"])
def test_a_run_that_is_killed_or_loses_its_process_goes_on_with_the_same_bits(tmp_path: Path, what: str) -> None:
    rl = {"steps": 4, "max_tokens": 12, "checkpoint_every": 2, "mini_batch": 2, "ahead": 2}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(world_recipe(tmp_path, ["rl"], "response.count('1') / 9", data={"limit": 9}, rl=rl)))
    alone, run = tmp_path / "alone", tmp_path / "run"
    done = started(recipe, alone, 0, "nobody")
    assert done.returncode == 0, done.stderr[-2000:]
    ended = started(recipe, run, 1 if what == "child" else 3, what)
    if what == "trainer":
        assert ended.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while children_of(tmp_path / "tmp") and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not children_of(tmp_path / "tmp"), "a process that samples outlives its trainer"
        assert not list((tmp_path / "tmp").glob("thence-sampling-*")), "what was written for it is left"
    else:
        assert ended.returncode == 2, ended.stderr[-2000:]
        assert "the process that samples ended unexpectedly" in ended.stderr and "SIGKILL" in ended.stderr
        assert "Traceback" not in ended.stderr
    again = started(recipe, run, 0, "nobody")
    assert again.returncode == 0, again.stderr[-2000:]
    weights = [(place / "stages/rl/model/model.safetensors").read_bytes() for place in (run, alone)]
    assert weights[0] == weights[1]
    rewards = [
        [json.loads(row)["reward"] for row in (p / "metrics.jsonl").read_text().splitlines()] for p in (run, alone)
    ]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 4
