"""`thence export` of whole runs: the last checkpoint becomes the model that the run has published, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.pipeline.on_ranks import case, drive, sampled
from thence.cli import main
from thence.errors import UserError
from thence.train.run_models import find_trained

LAYOUTS = {"one": {}, "fsdp2": {"parallel": "fsdp2"}, "ddp": {"parallel": "ddp"}}
QUICK = {"method": "grpo", "mini_batch": 2, "steps": 2}


@pytest.fixture(scope="module")
def runs(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    cases = [case(base | more, folder / name, 1 if name == "one" else 2, QUICK) for name, more in LAYOUTS.items()]
    sft = {**base, "stages": ["sft", "rl"], "sft": {"lr": 1e-2, "batch": 4, "steps": 2, "checkpoint_every": 1}}
    cases.append(case(sft | {"parallel": "fsdp2"}, folder / "begun", 2, QUICK | {"steps": 3}, stop=2))
    cases.append(case({**base, "parallel": "fsdp2"}, folder / "stopped", 2, QUICK, stop=1))
    cases.append(case(base, folder / "new", 1, QUICK, stop=0))
    drive(folder, cases)
    for name in (*LAYOUTS, "begun", "stopped", "new"):
        sampled(folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_last_checkpoint_is_the_published_model(name: str, runs: Path, tmp_path: Path) -> None:
    stage = runs / name / "stages" / "rl"
    assert main(["export", str(stage / "checkpoints" / "step-000002"), str(tmp_path / "exported")]) == 0
    exported = contents(tmp_path / "exported")
    assert exported.pop("README.md"), "the card"
    assert exported == contents(stage / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


def test_of_a_run_it_takes_what_was_trained_last_and_says_what(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {
        "one": "the finished model of stage rl",
        "one:rl": "the finished model of stage rl",
        "stopped": "the checkpoint after step 1 of stage rl, which is not finished",
        "begun:rl": "the checkpoint after step 2 of stage rl, which is not finished",
        "begun:sft": "the finished model of stage sft",
    }
    for number, (name, words) in enumerate(said.items()):
        assert main(["export", str(runs / name), f"made-{number}"]) == 0
        told = capsys.readouterr().out
        assert f"exports {words}\n" in told and f"(F64), 0.00 GB: made-{number}" in told
        AutoModelForCausalLM.from_pretrained(tmp_path / f"made-{number}")
    exported = contents(tmp_path / "made-0")
    assert exported.pop("README.md"), "the card"
    assert exported == contents(runs / "one" / "stages" / "rl" / "model")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("new", "this run has no checkpoint yet"),
        ("new:rl", "stage rl has no checkpoint yet"),
        ("one:sft", "no training stage 'sft'"),
        ("one:base", "no training stage 'base'"),
    ],
)
def test_what_a_run_does_not_have_is_refused(name: str, words: str, runs: Path) -> None:
    with pytest.raises(UserError, match=words):
        find_trained(str(runs / name))


def test_the_command_refuses_before_it_opens_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["export", "nowhere", str(tmp_path / "mine")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["export", "nowhere", str(tmp_path / "new")]) == 2
    assert "no checkpoint or model of thence" in capsys.readouterr().err
