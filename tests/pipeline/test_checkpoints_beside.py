"""Checkpoints written while training goes on hold the state of their step, bit by bit, and nothing is left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.pipeline.on_ranks import case, drive, largest_difference, lines, sampled
from thence.train.checkpoint import is_whole

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "adapters": (1, {"lora": {"rank": 2}}),
    "ddp": (2, {"parallel": "ddp"}),
    "fsdp2": (2, {"parallel": "fsdp2"}),
    "fsdp2, adapters": (2, {"parallel": "fsdp2", "lora": {"rank": 2}}),
}
STOPPED = 3  # steps that were taken when the run was stopped; the third waits for the checkpoint of the second


def recipe(base: dict[str, Any], beside: bool, parallel: str = "auto", lora: dict[str, Any] | None = None) -> Any:
    sft = {"lr": 1e-2, "batch": 3, "steps": 4, "checkpoint_every": 2, "checkpoint_async": beside}
    model = {**base["model"], **({"lora": lora} if lora else {})}
    return {**base, "stages": ["sft"], "sft": sft, "parallel": parallel, "model": model}


QUICK = ("fsdp2",)
OTHERS = [pytest.mark.slow, pytest.mark.everything]
NAMES = [pytest.param(name, marks=[] if name in QUICK else OTHERS) for name in LAYOUTS]


@pytest.fixture(scope="module", params=NAMES)
def runs(request: Any, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one layout, stopped and then resumed, and one from begin to end; checkpoints written beside or not."""
    folder, cases = tmp_path_factory.mktemp("beside"), []
    world, settings = LAYOUTS[request.param]
    for beside in (False, True):
        given, stopped = recipe(base, beside, **settings), folder / f"stopped-{beside}"
        cases += [case(given, stopped, world, {}, stop=STOPPED, late=beside)]
        cases += [case(given, folder / f"whole-{beside}", world, {}, late=beside)]
        cases += [case(given, stopped, world, {}, suffix="-resumed", copy=f"{stopped}-copy")]
    drive(folder, cases)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor and every other file of the checkpoints. safetensors orders what it says of a file at random."""
    found: dict[str, bytes] = {}
    for path in sorted((folder / "stages" / "sft" / "checkpoints").glob("*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found |= {f"{name}/{key}": value.numpy().tobytes() for key, value in tensors.items()}
        elif path.name != "manifest.json":
            found[name] = path.read_bytes()
    return found


def test_a_checkpoint_holds_the_state_of_its_step_though_training_went_on(runs: Path) -> None:
    now, late = (runs / f"stopped-{beside}" for beside in (False, True))
    assert sampled(now) == sampled(late) == []  # SFT samples nothing; this raises what failed on a rank
    notes = json.loads(Path(f"{late}-notes/late-0.json").read_text())
    assert notes == [STOPPED], "the third step was taken when the checkpoint of the second was written"
    assert contents(Path(f"{now}-copy")) == contents(Path(f"{late}-copy"))
    (place,) = (Path(f"{late}-copy") / "stages" / "sft" / "checkpoints").iterdir()
    assert place.name == "step-000002" and is_whole(place)


def test_a_run_ends_with_the_same_bits_resumed_or_not(runs: Path) -> None:
    now = runs / "whole-False"
    for other in ("whole-True", "stopped-True"):
        assert sampled(runs / other, "-resumed" if "stopped" in other else "") == []
        assert largest_difference(runs / other, now, "sft") == 0.0
        assert len(lines(runs / other)) == 4
    assert contents(runs / "whole-True") == contents(now)
    assert not list((runs / "whole-True" / "stages" / "sft" / "checkpoints").glob(".*"))
