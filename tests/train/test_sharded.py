"""Ranks that share weights (FSDP2) take the step of one process: layouts, families, tied and untied heads.

This file is also the script of the ranks: ``on_each_rank`` runs in each of them.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.oracle import VARIANTS, make_batch, make_case, relative
from tests.tiny_model import make_tiny_model
from tests.train.ranks import run_ranks
from thence.errors import StepRefused, UserError
from thence.objective import Batch
from thence.recipe import Lora
from thence.train.cut_probe import check_cut, gradient_sums
from thence.train.lora import add_adapters
from thence.train.parallel import Ranks, ShardLayout, SingleProcess, on_first_rank, shard, start_ranks, together
from thence.train.policy import Policy
from thence.train.step import StepSettings
from thence.train.trainer import Trainer

LENGTHS = [(3, 7), (3, 12), (2, 4), (4, 1), (5, 9), (1, 20), (2, 3)]
BY_NAME = {variant.name: variant for variant in VARIANTS}
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft, untied head": {"tied": False},
    "sft, one rank without rows": {"share": "first"},
    "sft, sums once a step": {"sharding": {"sum_every_pass": False}},
    "sft, weights stay gathered": {"sharding": {"reshard_after_forward": False}},
    "sft, both": {"sharding": {"sum_every_pass": False, "reshard_after_forward": False}, "share": "first"},
    "sft, packed": {"packing": True},
    "sft, activations computed again": {"checkpointing": True},
    "sft, every second layer again": {"checkpointing": 2, "packing": True, "share": "first"},
    "sft, adapters, every second layer again": {"checkpointing": 2, "lora": True},
    "sft, gpt2": {"kind": "gpt2"},
    "sft, qwen2": {"kind": "qwen2", "packing": True},
    "grpo": {"variant": "grpo-paper"},
    "grpo with entropy": {"variant": "grpo-entropy", "tied": False, "share": "first"},
    "dr_grpo": {"variant": "dr_grpo", "packing": True},
    "dapo": {"variant": "dapo", "checkpointing": True},
    "dapo, float32": {"variant": "dapo", "dtype": torch.float32},
}
ONLY_SILENT = "rows that weigh nothing on one rank"


def model_of(case: dict[str, Any]) -> Any:
    model = make_tiny_model(case.get("dtype", torch.float64), case.get("kind", "llama"))
    if not case.get("tied", True):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.1)
        model.config.tie_word_embeddings = False
    return model


def steps(case: dict[str, Any], ranks: Ranks, sharding: ShardLayout | None) -> dict[str, Any]:
    """Three optimizer steps and a scoring pass: parameters, reports, log-probabilities of this rank's rows."""
    variant, policy = BY_NAME[case.get("variant", "sft")], Policy(model_of(case))
    settings = StepSettings(25, case.get("packing", False), 1.0, case.get("dtype", torch.float64))
    policy.check(settings.packing)
    if case.get("lora"):
        add_adapters(policy.model, Lora(rank=3), 7)
    if sharding is not None:
        ranks = shard(policy, ranks, replace(sharding, **case.get("sharding", {})))  # type: ignore[arg-type]
    start = parameters(policy.model)
    trainer = Trainer(policy, 1e-3, settings, activation_checkpointing=case.get("checkpointing", False), ranks=ranks)
    plain, reports = make_tiny_model(), []
    for seed in (1, 2, 3):
        batch = make_batch(make_case(plain, variant, LENGTHS, 3, seed), variant, case.get("dtype", torch.float64))
        batch = share_of(batch, case.get("share", "dealt"), ranks)
        report = trainer.step(batch)
        reports.append([report.loss, report.grad_norm, report.entropy, float(report.trained_tokens), report.clip_share])
        trainer.statistics(batch.rows)
    said = torch.tensor(reports, dtype=torch.float64)
    return {"start": start, "parameters": parameters(policy.model), "reports": said}


def share_of(batch: Batch, share: str, ranks: Ranks) -> Batch:
    """This rank's rows; over all ranks those of the batch. The last rank may get nothing but silent rows, or none."""
    if share == "first":
        return replace(batch, rows=batch.rows if ranks.rank == 0 else ())
    if share == ONLY_SILENT:
        silent = tuple(replace(row, weights=torch.zeros_like(row.weights)) for row in batch.rows[:2])
        rows = batch.rows[2:] if ranks.rank == 0 else silent
        return replace(batch, rows=rows if ranks.world > 1 else batch.rows[2:] + silent)
    return replace(batch, rows=batch.rows[ranks.rank :: ranks.world])


def parameters(model: nn.Module) -> torch.Tensor:
    found = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    return torch.cat([value.flatten() for value in found])


def refused(ranks: Any) -> bool:
    """One rank's rows are bad: whether all refuse the step."""
    policy = Policy(make_tiny_model())
    shared = shard(policy, ranks, ShardLayout(compute_dtype=torch.float64))
    batch = share_of(make_batch(make_case(make_tiny_model(), BY_NAME["sft"], LENGTHS, 3, 1), BY_NAME["sft"]), "", ranks)
    if ranks.rank == ranks.world - 1:
        batch = replace(batch, rows=tuple(replace(row, weights=row.weights * float("nan")) for row in batch.rows))
    try:
        Trainer(policy, 1e-3, ranks=shared).step(batch)
    except StepRefused:
        return True
    return False


def what_the_check_says(ranks: Any, break_it: Any) -> str:
    """Of a cut policy that was broken: the check's error, empty without one."""
    policy = Policy(make_tiny_model())
    expected = gradient_sums(policy)
    shared = shard(policy, ranks, ShardLayout(compute_dtype=torch.float64))
    break_it(policy)
    try:
        check_cut(policy, shared, expected, torch.float64)
    except UserError as error:
        return error.problem
    return ""


def averages(policy: Any) -> None:
    """What FSDP does unless it is told otherwise."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(2.0)


def one_layer_averages(policy: Any) -> None:
    policy.model.model.layers[1].set_gradient_divide_factor(2.0)


def fails_on_one(ranks: Any) -> str:
    def act() -> None:
        if ranks.rank == 1:
            raise OSError("no space left")

    try:
        together(ranks, act)
    except UserError as error:
        return error.problem
    except OSError:
        return "own"
    return ""


def on_each_rank(replicas: int) -> dict[str, Any]:
    ranks, _ = start_ranks()
    sharding = ShardLayout(replicas=replicas, compute_dtype=torch.float64)
    silent = {"silent": {"share": ONLY_SILENT}}
    found: dict[str, Any] = {name: steps(case, ranks, sharding) for name, case in (CASES | silent).items()}
    found["refused"] = refused(ranks)
    found["clean"] = what_the_check_says(ranks, lambda policy: None)
    found["averages"] = what_the_check_says(ranks, averages)
    found["one layer averages"] = what_the_check_says(ranks, one_layer_averages)
    found["failure"] = fails_on_one(ranks)
    found["first"] = on_first_rank(ranks, lambda: 7)
    ranks.wait()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("two"), "tests.train.test_sharded", 2, 1)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("four"), "tests.train.test_sharded", 4, 1)


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("hsdp"), "tests.train.test_sharded", 4, 2)


def assert_as_alone(found: list[dict[str, Any]], name: str, case: dict[str, Any]) -> None:
    alone = steps(case, SingleProcess(), None)
    allowed = 1e-12 if case.get("dtype", torch.float64) == torch.float64 else 1e-5
    assert relative(alone["parameters"], alone["start"]) > 1e-4, "the steps move the model"
    for rank in found:
        assert relative(rank[name]["parameters"], alone["parameters"]) <= allowed
        assert torch.allclose(rank[name]["reports"], alone["reports"], rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_weights_take_the_steps_of_one_process(name: str, two: Any) -> None:
    assert_as_alone(two, name, CASES[name])


def test_rows_that_weigh_nothing_are_passed_by_all_ranks_together(two: Any) -> None:
    assert_as_alone(two, "silent", {"share": ONLY_SILENT})


def test_bad_rows_of_one_rank_are_refused_by_all(two: Any) -> None:
    assert [rank["refused"] for rank in two] == [True, True]


def test_the_check_before_the_first_step_sees_what_fsdp_does_by_default(two: Any) -> None:
    for rank in two:
        assert rank["clean"] == ""
        assert "would get a wrong gradient, off by 0.5" in rank["averages"]
        assert "model.layers.1." in rank["one layer averages"]


def test_what_fails_on_one_rank_ends_the_others_with_its_error(two: Any) -> None:
    assert [rank["failure"] for rank in two] == ["rank 1 failed: no space left", "own"]
    assert [rank["first"] for rank in two] == [7, None]


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_take_the_steps_of_one_process(name: str, four: Any) -> None:
    assert_as_alone(four, name, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_replicas_of_two_ranks_take_the_steps_of_one_process(name: str, two_by_two: Any) -> None:
    assert_as_alone(two_by_two, name, CASES[name])


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), torch.OutOfMemoryError),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), RuntimeError),
        (torch.distributed.DistBackendError("Connection closed by peer"), torch.distributed.DistError),
        (ValueError("FSDP does not support containers that do not implement forward"), UserError),
        (RuntimeError("cannot cut a tensor of this kind"), UserError),
    ],
)
def test_lack_of_memory_and_lost_ranks_are_not_called_a_model_that_cannot_be_cut(
    error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting = import_module("thence.train.parallel.shard")  # its package has a function of this name

    def fails(module: nn.Module, **options: Any) -> None:
        raise error

    monkeypatch.setattr(cutting, "fully_shard", fails)
    with pytest.raises(raised) as caught:
        cutting._cut(nn.Linear(2, 2), "LlamaForCausalLM", {})
    if raised is UserError:
        assert "LlamaForCausalLM cannot be cut over ranks" in str(caught.value) and caught.value.__cause__ is error
    else:
        assert caught.value is error
