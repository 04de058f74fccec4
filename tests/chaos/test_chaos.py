"""A short campaign of kills, and that the campaign sees a command that loses something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.chaos.results import differences, left_over, results_of

pytestmark = pytest.mark.slow
FORGETFUL = """
import sys
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
import thence.pipeline.saving
from tests.chaos.campaign import Command, Kill, survey, try_case
from tests.chaos.scenarios import Scenario, run_of

torch.set_num_threads(1)
thence.pipeline.saving.rewind = lambda *given, **named: None  # keeps the lines of steps that are taken a second time
place = Path(sys.argv[1])
command = Command(Scenario("sft", run_of(["sft"])), place / "inputs")
calm = survey(command, place)
case = try_case(command, calm, [Kill("fsync state.json", 2)], place)
print(case.deaths, case.exit_code, case.differences)
"""


def in_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which may fork."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )


@pytest.mark.everything
def test_commands_that_are_killed_end_as_if_nobody_had_killed_them(tmp_path: Path) -> None:
    only = [part for name in ("run", "run-relift", "run-sdft", "eval") for part in ("--only", name)]
    out = tmp_path / "kills.json"
    code = "import sys\nfrom tests.chaos.campaign import main\nsys.exit(main(sys.argv[1:]))"
    done = in_python(code, "--kills", "9", "--seed", "1", *only, "--out", str(out))
    assert out.exists(), done.stderr[-3000:]
    told = json.loads(out.read_text())
    failed = [case for case in told["tried"] if not case["holds"]]
    assert not failed, json.dumps(failed, indent=1)[-4000:]
    assert done.returncode == 0 and told["kills"] >= 5
    assert {case["scenario"] for case in told["tried"]} == {"run", "run-relift", "run-sdft", "eval"}


def test_the_campaign_sees_a_run_that_writes_its_steps_twice(tmp_path: Path) -> None:
    done = in_python(FORGETFUL, str(tmp_path))
    assert done.stdout.splitlines()[-1] == "[-9] 0 ['metrics.jsonl: differs']", done.stdout + done.stderr


def test_a_result_that_differs_is_missing_or_is_too_much_is_named(tmp_path: Path) -> None:
    for name, loss in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"loss": loss, "seconds": loss}) + "\n")
    (tmp_path / "b" / "results.json").write_text("{}")
    calm, killed = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    assert differences(calm, killed) == ["metrics.jsonl: differs", "results.json: too much"]
    assert differences(killed, calm) == ["metrics.jsonl: differs", "results.json: missing"]
    assert differences(calm, calm) == []


def test_temporary_files_that_stay_are_named(tmp_path: Path) -> None:
    checkpoints = tmp_path / "stages" / "rl" / "checkpoints"
    for name in ("step-000001", "step-000002", ".writing-000003"):
        (checkpoints / name).mkdir(parents=True)
    (tmp_path / ".lock").write_text("")
    assert left_over(tmp_path) == ["stages/rl/checkpoints/.writing-000003", "stages/rl/checkpoints/step-000001"]
