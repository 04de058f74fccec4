"""A run that is killed with SIGKILL and run again ends with the same bits as one that never was.

One process imports everything once and forks a child for every attempt, so that many points can be tried. A child that
has a point to die at counts its way there and kills itself; nothing of it can be cleaned up or flushed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import world_recipe

SFT_EXAMPLES, SFT_BATCH, SFT_STEPS, SFT_EVERY = 28, 8, 8, 3  # an epoch is 4 steps, the last of 4 rows; 2 epochs
RL_STEPS, RL_EVERY, RL_MINIS = 4, 2, 2
pytestmark = pytest.mark.slow
UNTIMED = ("seconds", "tokens_per_s", "sample_seconds", "train_seconds")

DRIVER = """
import json, os, signal, sys
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama

import thence.pipeline.saving as saving
import thence.pipeline.sampler as sampler
import thence.pipeline.run as running
import thence.train.checkpoint as checkpoint
import thence.train.policy as policy
import thence.train.trainer as trainer
from thence.pipeline.folder import RunFolder

torch.set_num_threads(1)
running.hold = lambda *given: None  # what is tried on the model writes checkpoints of its own; the points are the run's
os.fsync = lambda handle: None  # slow, and a killed process loses nothing that the system has taken from it


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Fate:
    '''Where the run stands, and the point at which it has to end.'''

    def __init__(self, point):
        self.stage, self.steps, self.passes, self.point = None, 0, 0, point

    def at(self, phase, step):
        if (self.stage, phase, step) == (self.point["stage"], self.point["phase"], self.point["step"]):
            die()


def before(owner, name, act):
    original = getattr(owner, name)

    def wrapped(*positional, **named):
        act(*positional, **named)
        return original(*positional, **named)

    setattr(owner, name, wrapped)


def arm(point):
    fate = Fate(point)

    def stage_begins(execution, name):
        fate.stage, fate.steps = name, 0

    def resumed(self, plain, tensors):
        fate.steps = plain["steps_taken"]

    def optimizer_step_begins(self, *rest, **named):
        fate.steps, fate.passes = self.steps_taken + 1, 0

    def forward(*rest, **named):
        fate.passes += 1
        if fate.passes == 2:  # one micro-batch is already in the gradient
            fate.at("mid-window", fate.steps)

    def log(self, line):
        fate.at("step-taken", line["step"])
        if (fate.stage, "half-a-line", line["step"]) == (point["stage"], point["phase"], point["step"]):
            with self.metrics.open("a") as file:
                file.write(json.dumps(line)[:25])
            die()

    def checkpoint_begins(folder, step, *rest, **named):
        fate.checkpoint = step
        fate.at("logged", step)

    def weights_written(tensors, path):
        path.write_bytes(b"half")
        fate.at("torn-checkpoint", fate.checkpoint)

    def flush(path):
        if path.name == "manifest.json" and path.parent.name.startswith(".writing"):
            fate.at("unnamed-checkpoint", fate.checkpoint)
        if path.name == "checkpoints":
            fate.at("old-and-new-checkpoint", fate.checkpoint)
        if path.name.startswith(".model"):
            fate.at("unnamed-model", 0)

    before(running, "run_stage", stage_begins)
    before(trainer.Trainer, "restore", resumed)
    before(trainer.Trainer, "step", optimizer_step_begins)
    before(policy, "objective", forward)
    before(torch.optim.AdamW, "step", lambda *rest, **named: fate.at("gradient-ready", fate.steps))
    before(sampler, "respond", lambda *rest: fate.at("sampling", fate.steps // 2 + 1))
    before(RunFolder, "log", log)
    before(saving, "write_checkpoint", checkpoint_begins)
    before(saving, "begin_checkpoint", checkpoint_begins)  # what follows is then done by another thread
    before(checkpoint, "save_file", weights_written)
    before(checkpoint, "flush", flush)
    before(RunFolder, "finish", lambda *rest: fate.at("model-published", 0))


def damage(folder):
    '''Change the last byte of the newest of two checkpoints' weights. Returns how many checkpoints there are.'''
    found = sorted(folder.glob("stages/*/checkpoints/step-*"))
    weights = found[-1] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return len(found)


def attempt(recipe, folder, point):
    '''Fork a child that runs the recipe, to its end or to the point. Returns the signal that ended it, or 0.'''
    if point is not None and point["phase"] == "damage":
        return damage(folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if point is not None:
                arm(point)
            running.run(recipe, {"folder": str(folder)})
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"failed in {folder}, to be killed at {point}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


job = json.loads(Path(sys.argv[1]).read_text())
deaths = []
for case in job["cases"]:
    folder = Path(job["folder"]) / case["name"]
    deaths.append([attempt(job["recipe"], folder, point) for point in [*case["points"], None]])
Path(sys.argv[2]).write_text(json.dumps(deaths))
"""


@dataclass(frozen=True)
class Point:
    """A moment at which a run is killed: before what its phase names, at a step of a stage."""

    stage: str
    step: int
    phase: str


IN_STEP = ("mid-window", "gradient-ready")
AFTER_STEP = ("step-taken", "half-a-line")
AT_CHECKPOINT = ("logged", "torn-checkpoint", "unnamed-checkpoint", "old-and-new-checkpoint")
AT_END = ("unnamed-model", "model-published")


def all_points() -> list[Point]:
    """Every moment that can be named."""
    points = [Point("rl", step, "sampling") for step in range(1, RL_STEPS + 1)]
    for stage, steps, every, minis in (("sft", SFT_STEPS, SFT_EVERY, 1), ("rl", RL_STEPS, RL_EVERY, RL_MINIS)):
        kept = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
        points += [Point(stage, step, phase) for step in range(1, steps * minis + 1) for phase in IN_STEP]
        points += [Point(stage, step, phase) for step in range(1, steps + 1) for phase in AFTER_STEP]
        points += [Point(stage, step, phase) for step in kept for phase in AT_CHECKPOINT]
        points += [Point(stage, 0, phase) for phase in AT_END]
    return points


CHOSEN: dict[str, list[Point]] = {
    "undisturbed": [],
    "epoch-edge": [Point("sft", 4, "step-taken")],
    "first-step-of-an-epoch": [Point("sft", 5, "gradient-ready")],
    "mid-window-twice": [Point("sft", 2, "mid-window"), Point("rl", 6, "mid-window")],
    "between-mini-batches": [Point("rl", 8, "gradient-ready")],
    "half-a-line-and-a-torn-checkpoint": [Point("sft", 5, "half-a-line"), Point("rl", 2, "torn-checkpoint")],
    "two-checkpoints-and-two-models": [Point("sft", 6, "old-and-new-checkpoint"), Point("sft", 0, "model-published")],
    "after-a-checkpoint": [Point("rl", 3, "sampling")],
    "with-samples-written": [Point("rl", 4, "step-taken")],
    "damaged-checkpoint": [Point("sft", 6, "old-and-new-checkpoint"), Point("sft", 6, "damage")],
}
BESIDE: dict[str, list[Point]] = {
    "beside": [],
    "beside-torn": [Point("sft", 6, "torn-checkpoint"), Point("rl", 2, "torn-checkpoint")],
    "beside-unnamed": [Point("sft", 3, "unnamed-checkpoint"), Point("rl", 4, "unnamed-checkpoint")],
    "beside-two-checkpoints": [Point("sft", 6, "old-and-new-checkpoint"), Point("rl", 4, "old-and-new-checkpoint")],
    "beside-between": [Point("sft", 7, "gradient-ready"), Point("rl", 3, "sampling")],
}
"""Of runs whose checkpoints are written while training goes on."""
UNDISTURBED = "undisturbed"
RANDOM = {f"random-{p.stage}-{p.step}-{p.phase}": [p] for p in random.Random(20).sample(all_points(), 10)}
CASES = CHOSEN | RANDOM


def make_recipe(folder: Path, beside: bool) -> dict[str, Any]:
    """SFT over an epoch's edge, then RL with state of every kind: reference model, mini-batches, drawn prompts."""
    sft = {"batch": SFT_BATCH, "epochs": 2, "held_out": 0, "micro_batch_tokens": 128, "checkpoint_every": SFT_EVERY}
    rl = {"steps": RL_STEPS, "mini_batch": 4 // RL_MINIS, "max_tokens": 12, "micro_batch_tokens": 64}
    sft["checkpoint_async"] = rl["checkpoint_async"] = beside
    rl |= {"checkpoint_every": RL_EVERY, "options": {"kl": 0.05}, "data": {"limit": 20, "seed": 1}}
    return world_recipe(
        folder,
        ["sft", "rl"],
        "response.count('1') / max(1, len(response))",
        {"num_key_value_heads": 1, "max_position_embeddings": 128},
        seed=5,
        sft=sft | {"data": {"limit": SFT_EXAMPLES}},
        rl=rl,
    )


def run_cases(folder: Path, cases: dict[str, list[Point]], beside: bool = False) -> dict[str, list[int]]:
    """Run the recipe for every case, killed at its points, then to the end. Returns the signals that ended it."""
    job, deaths, driver = folder / "job.json", folder / "deaths.json", folder / "driver.py"
    listed = [{"name": name, "points": [asdict(point) for point in points]} for name, points in cases.items()]
    job.write_text(json.dumps({"recipe": make_recipe(folder, beside), "folder": str(folder), "cases": listed}))
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), str(job), str(deaths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(deaths.read_text()), strict=True))


def final_weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("stages/*/model/*.safetensors"))
    }


def untimed_metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in UNTIMED} for line in lines]


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert len(final_weights(undisturbed)) == 2
    assert final_weights(folder) == final_weights(undisturbed)
    assert untimed_metrics(folder) == untimed_metrics(undisturbed)
    left = {path.relative_to(folder) for path in folder.rglob(".*")}
    assert left == {Path(".thence-run.json"), Path(".lock")}
    # the last training stage can be given more steps
    assert [str(path.relative_to(folder)) for path in folder.glob("stages/*/checkpoints/*")] == [
        f"stages/rl/checkpoints/step-{RL_STEPS:06d}"
    ]
    assert not (folder / "stages" / "sft" / "checkpoints").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("resume")
    return folder, run_cases(folder, CASES) | run_cases(folder, BESIDE, beside=True)


def test_the_undisturbed_run_does_what_the_points_assume(runs: tuple[Path, dict[str, list[int]]]) -> None:
    lines = untimed_metrics(runs[0] / UNDISTURBED)
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("sft", step) for step in range(1, SFT_STEPS + 1)),
        *(("rl", step) for step in range(1, RL_STEPS + 1)),
    ]
    assert lines[3]["epoch"] == 1.0
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(line["reward_std"] > 0 for line in lines if line["kind"] == "rl")
    assert {points[0].stage for points in RANDOM.values()} == {"sft", "rl"}
    assert len(RANDOM) == 10


@pytest.mark.parametrize("case", [name for name in [*CASES, *BESIDE] if name != UNDISTURBED])
def test_killed_and_run_again_it_ends_as_if_undisturbed(case: str, runs: tuple[Path, dict[str, list[int]]]) -> None:
    folder, deaths = runs
    # "damage" answers with the number of checkpoints that it found
    assert deaths[case] == [2 if point.phase == "damage" else 9 for point in (CASES | BESIDE)[case]] + [0]
    assert_same_run(folder / case, folder / UNDISTURBED)


@pytest.mark.parametrize("case", [name for name in CASES if name != UNDISTURBED])
def test_killed_and_run_again_the_samples_for_the_reader_are_there_once(
    case: str, runs: tuple[Path, dict[str, list[int]]]
) -> None:
    texts = [(runs[0] / name / "stages" / "rl" / "samples.jsonl").read_text() for name in (case, UNDISTURBED)]
    found, expected = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert found == expected
