"""A rank fails in the middle of a run: all ranks end soon, one error says why, and the run resumes to the same end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.on_ranks import largest_difference, lines
from thence.toml import to_toml
from thence.train.checkpoint import checkpoints, is_whole

FAULTS = """
import os, signal, sys

import torch

import thence.pipeline.rl_stage as rl_stage
import thence.train.checkpoint as checkpoint
from thence.train.policy import Policy

torch.set_num_threads(1)


def break_down(kind, at):
    step, forward, flush, passes = rl_stage.Loop.step, Policy.forward, checkpoint.flush, []

    def begins(loop, number):
        if number == at and kind == "raises":
            raise ValueError("the data of this rank are gone")
        if number == at and kind == "disk fails":
            raise OSError(5, os.strerror(5), "/data/rows.jsonl")
        if number == at and kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(loop, number)

    def spoiled(policy, *given, **named):
        loss, stats = forward(policy, *given, **named)
        passes.append(1)
        return (loss * float("nan") if kind == "not finite" and len(passes) > 2 * at else loss), stats

    def flushed(path):
        if kind == "disk full" and f"writing-{at + 1:06d}" in str(path):
            raise OSError(28, os.strerror(28), str(path))
        return flush(path)

    rl_stage.Loop.step, Policy.forward, checkpoint.flush = begins, spoiled, flushed
"""
DRIVER = (
    FAULTS
    + """
import json, socket, time
from pathlib import Path

import torch.distributed as dist
import transformers.models.llama.modeling_llama

import thence.pages.run.page
import thence.pipeline.run
from thence.cli import main


def rank_of(case, rank, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    word = "failed" if case.get("fault") else "ended"
    said = os.open(f"{case['folder']}-said-{rank}-{word}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    if case.get("fault") and rank == case["rank"]:
        break_down(case["fault"], 2)
    return main(["run", case["recipe"], "--folder", case["folder"]])


for case in json.loads(Path(sys.argv[1]).read_text()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, children, codes = time.monotonic(), [], []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = rank_of(case, rank, port)
            finally:
                os._exit(code)
        children.append(child)
    for child in children:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    found = {"codes": codes, "seconds": time.monotonic() - started}
    Path(f"{case['folder']}-{'failed' if case.get('fault') else 'ended'}.json").write_text(json.dumps(found))
"""
)
ON_RANK = {"raises": 1, "disk fails": 1, "killed": 1, "not finite": 1, "disk full": 0}
QUICK = [("fsdp2", "killed"), ("fsdp2", "disk full"), ("fsdp2-beside", "disk full")]
ALL = [(layout, kind) for layout in ("fsdp2", "ddp") for kind in ON_RANK]
ALL += [(f"{layout}-beside", kind) for layout in ("fsdp2", "ddp") for kind in ("killed", "not finite", "disk full")]
OTHERS = [pytest.mark.slow, pytest.mark.everything]
CASES = [pytest.param(*case, marks=[] if case in QUICK else OTHERS) for case in ALL]


def fail_and_resume(base: dict[str, Any], folder: Path, wanted: list[tuple[str, str]]) -> Path:
    cases = []
    for layout in dict.fromkeys(layout for layout, _ in wanted):
        recipe = folder / f"{layout}.toml"
        parallel, _, beside = layout.partition("-")  # beside: checkpoints are written while training goes on
        rl = {**base["rl"], "checkpoint_async": bool(beside)}
        recipe.write_text(to_toml({**base, "parallel": parallel, "rl": rl}))
        given = {"recipe": str(recipe)}
        cases.append(given | {"folder": str(folder / f"{layout}-whole")})
        for kind in (kind for other, kind in wanted if other == layout):
            place = given | {"folder": str(folder / f"{layout}-{kind}")}
            cases += [place | {"fault": kind, "rank": ON_RANK[kind]}, place]
    (folder / "driver.py").write_text(DRIVER)
    (folder / "job.json").write_text(json.dumps(cases))
    command = [sys.executable, str(folder / "driver.py"), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def quick(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fail_and_resume(base, tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fail_and_resume(base, tmp_path_factory.mktemp("slow"), [case for case in ALL if case not in QUICK])


@pytest.fixture
def failed(layout: str, kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("quick" if (layout, kind) in QUICK else "slow")


def said(folder: Path, layout: str, kind: str) -> list[str]:
    return [(folder / f"{layout}-{kind}-said-{rank}-failed").read_text() for rank in range(2)]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_all_ranks_end_and_the_run_resumes_to_the_same_end(kind: str, layout: str, failed: Path) -> None:
    found = json.loads((failed / f"{layout}-{kind}-failed.json").read_text())
    assert all(code != 0 for code in found["codes"]) and found["seconds"] < 60
    assert json.loads((failed / f"{layout}-{kind}-ended.json").read_text())["codes"] == [0, 0]
    assert largest_difference(failed / f"{layout}-{kind}", failed / f"{layout}-whole") == 0.0
    assert len(lines(failed / f"{layout}-{kind}")) == 4
    places = checkpoints(failed / f"{layout}-{kind}" / "stages" / "rl" / "checkpoints")
    assert places and all(map(is_whole, places))


WORDS = {
    "raises": "ValueError: the data of this rank are gone",
    "disk fails": "/data/rows.jsonl: the disk or network drive failed",
    "killed": "the processes of this run lost each other",
    "not finite": "training diverged in step",
    "disk full": "the disk is full",
}


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_one_error_says_why(kind: str, layout: str, failed: Path) -> None:
    texts = said(failed, layout, kind)
    assert sum(text.count(WORDS[kind]) for text in texts) == 1
    if kind in ("not finite", "disk full"):
        assert "thence:" not in texts[1], "the first rank alone prints what all ranks know"


@pytest.mark.matrix(1)
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_torchrun_starts_a_killed_worker_again_and_the_run_ends_as_if_undisturbed(
    layout: str, base: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml({**base, "parallel": layout}))
    first = "os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    killed = f"{FAULTS}\nif {first} and 'disturbed' in sys.argv[-1]:\n    break_down('killed', 2)\n"
    killed += "from thence.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    (tmp_path / "killed.py").write_text(killed)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name in ("whole", "disturbed"):
        command = [*launch, "--max-restarts", "2", str(tmp_path / "killed.py"), "run", str(tmp_path / "recipe.toml")]
        command += ["--folder", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("resumed after step 2" in done.stdout + done.stderr) == (name == "disturbed")
    assert largest_difference(tmp_path / "disturbed", tmp_path / "whole") == 0.0
    assert len(lines(tmp_path / "disturbed")) == 4
