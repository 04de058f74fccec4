"""Two ranks under ``torchrun`` (gloo, data parallel) take the step that one process takes.

This file is also the script of the ranks: ``train_everything`` runs once in this process and once in each rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests import ROOT
from tests.oracle import VARIANTS, make_batch, make_case, relative
from tests.tiny_model import make_tiny_model
from thence.errors import StepRefused, UserError
from thence.objective import Batch, Row
from thence.train.parallel import SingleProcess, ranks, start_ranks
from thence.train.step import StepSettings
from thence.train.trainer import Trainer

DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
CHOSEN = [v for v in VARIANTS if v.name in ("sft", "grpo-paper", "grpo-entropy", "dr_grpo", "dapo")]
LENGTHS = [(3, 7), (3, 12), (2, 4), (4, 1), (5, 9), (1, 20)]
SHARES = ["dealt", "one rank without rows", "one rank without trained tokens", "many small sums"]
CASES = [(v.name, dtype, share) for v in CHOSEN for dtype in DTYPES for share in SHARES]
EXACT = ("trained_tokens", "tokens", "rows")
CLOSE = ("loss", "grad_norm", "entropy", "logp", "clip_share")


def prompt_only(row: Row, terms: int) -> Row:
    """A row of the same kind that has no response."""
    nothing = torch.zeros(0, dtype=row.weights.dtype)
    behaviour, reference = (None if old is None else nothing for old in (row.behaviour, row.reference))
    return Row(torch.arange(5), torch.zeros(5, dtype=torch.bool), torch.zeros(terms, 0), behaviour, reference)


def share_of(batch: Batch, share: str, rank: int, world: int) -> Batch:
    """This rank's rows; over all ranks the same rows as in one process."""
    rows = batch.rows
    if share == "one rank without trained tokens":
        empty = tuple(prompt_only(rows[0], len(batch.terms)) for _ in range(2))
        parts = (rows, empty)
    elif share == "one rank without rows":
        parts = (rows, ())
    else:
        parts = (rows[0::2], rows[1::2])
    return replace(batch, rows=parts[rank] if world == 2 else parts[0] + parts[1])


def train_everything() -> dict:
    """Two optimizer steps of every case on this process's ranks: gradients, parameters, reports."""
    mine, _ = start_ranks()
    found: dict = {"ranks": mine.gather((mine.rank, mine.world))}
    for name, dtype, share in CASES:
        ranks.BUCKET_ELEMENTS = 3000 if share == "many small sums" else 16 * 2**20
        variant = next(v for v in CHOSEN if v.name == name)
        model, plain = make_tiny_model(DTYPES[dtype]), make_tiny_model()
        settings = StepSettings(50, False, 1.0, DTYPES[dtype])
        trainer = Trainer(model, 1e-3, settings, ranks=mine)
        reports, first = [], torch.empty(0)
        for seed in (1, 2):
            batch = make_batch(make_case(plain, variant, LENGTHS, 3, seed), variant, DTYPES[dtype])
            reports.append(trainer.step(share_of(batch, share, mine.rank, mine.world)))
            if seed == 1:
                first = torch.cat([p.grad.flatten() for p in model.parameters()])
        parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
        numbers = [{field: getattr(report, field) for field in EXACT + CLOSE} for report in reports]
        found[name, dtype, share] = {"gradient": first, "parameters": parameters, "reports": numbers}
    found["refused"] = refuse(mine)
    mine.wait()
    return found


def refuse(mine) -> tuple[bool, bool]:
    """Only the last rank's rows are bad: whether the step was refused here, and the parameters left alone."""
    model = make_tiny_model()
    batch = make_batch(make_case(model, CHOSEN[0], LENGTHS, 3, 1), CHOSEN[0])
    rows = batch.rows
    if mine.rank == mine.world - 1:
        rows = tuple(replace(row, weights=row.weights * float("nan")) for row in rows)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        Trainer(model, 1e-3, ranks=mine).step(replace(batch, rows=rows))
    except StepRefused:
        return True, all(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
    return False, False


@pytest.fixture(scope="module")
def one_process() -> dict:
    return train_everything()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, torch\nfrom tests.train import test_parallel\n"
        f"torch.save(test_parallel.train_everything(), {str(folder)!r} + '/' + os.environ['RANK'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return [torch.load(folder / rank, weights_only=True) for rank in ("0", "1")]


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [v.name for v in CHOSEN])
def test_two_ranks_give_the_update_of_one_process(one_process, two_ranks, name, dtype, share):
    alone, (left, right) = one_process[name, dtype, share], (rank[name, dtype, share] for rank in two_ranks)
    assert alone["gradient"].norm() > 0.1
    assert relative(left["gradient"], alone["gradient"]) <= TOLERANCE[dtype]
    assert relative(left["parameters"], alone["parameters"]) <= TOLERANCE[dtype]
    assert torch.equal(left["parameters"], right["parameters"])
    assert left["reports"] == right["reports"]
    for got, expected in zip(left["reports"], alone["reports"], strict=True):
        assert [got[field] for field in EXACT] == [expected[field] for field in EXACT]
        for field in CLOSE:
            assert got[field] == pytest.approx(expected[field], rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


@pytest.mark.slow
def test_bad_rows_of_one_rank_are_refused_by_all(one_process, two_ranks):
    assert [rank["refused"] for rank in two_ranks] == [(True, True)] * 2
    assert one_process["refused"] == (True, True)


@pytest.mark.slow
def test_ranks_know_themselves_and_gather_in_order(two_ranks):
    assert [rank["ranks"] for rank in two_ranks] == [[(0, 2), (1, 2)]] * 2


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    mine, _ = start_ranks()
    assert isinstance(mine, SingleProcess)
    assert (mine.rank, mine.world, mine.gather("a"), mine.sum_counts([3, 4])) == (0, 1, ["a"], [3, 4])


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this machine has no GPU: torch sees 1"):
        start_ranks()


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("LOCAL_RANK", "")]
)
def test_a_variable_of_the_environment_that_is_no_number_is_named(monkeypatch, name, value):
    for other, number in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", name: value}.items():
        monkeypatch.setenv(other, number)
    with pytest.raises(UserError, match=f"{name} is {value!r}, not a whole number") as refused:
        start_ranks()
    assert refused.value.field == name
