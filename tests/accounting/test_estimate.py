"""Times on given hardware, by hand; and budgets that end a stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.accounting.test_accounting import SMALL, recipe
from thence.accounting.budget import plan
from thence.accounting.estimate import Rates, StageTime, stage_times, total_seconds
from thence.accounting.flops import parameters, sampling_flops
from thence.accounting.hardware import Hardware, parse_hardware
from thence.accounting.planned import Plan
from thence.accounting.work import Outcome, Work

LLAMA = parameters(SMALL | {"model_type": "llama"})
RATES = Rates(training=0.5, sampling=0.25, links=0.5)
FACTS: dict[str, Any] = {"n_examples": 64, "mean_prompt_tokens": 10, "mean_response_tokens": 20}


def times(made: Plan, hardware: Hardware, rates: Rates = RATES) -> StageTime:
    (found,) = stage_times(made, hardware, rates)
    return found


def parts(time: StageTime) -> dict[str, float]:
    return {part.name: part.seconds for part in time.parts}


def test_the_time_of_sft_is_its_flops_its_optimizer_and_its_sum() -> None:
    hardware = parse_hardware("h100x8")
    made = plan(recipe(stages=["sft"], sft={"steps": 10, "batch": 16}, parallel="ddp"), **FACTS, ranks=8)
    (stage,) = made.stages
    assert stage.executed is not None
    found = times(made, hardware)
    computing = stage.executed.training / 8 / (67e12 * 0.5)  # float32
    optimizer = 10 * 7 * 4 * LLAMA.total / (3350e9 * 0.25)
    summed = 10 * 2 * 4 * LLAMA.total * 7 // 8 / (450e9 * 0.5)
    assert parts(found) == pytest.approx(
        {"forward and backward passes": computing, "optimizer": optimizer, "gradients": summed}, rel=1e-6
    )
    assert found.least == found.most == pytest.approx(computing + optimizer + summed)
    assert found.step == pytest.approx((found.most or 0) / 10)


def test_the_rank_with_the_most_rows_holds_up_the_others() -> None:
    hardware = parse_hardware("h100x8")
    given = recipe(stages=["sft"], sft={"steps": 10, "batch": 12}, parallel="ddp")
    found = parts(times(plan(given, **FACTS, ranks=8), hardware))["forward and backward passes"]
    (stage,) = plan(given, **FACTS, ranks=8).stages
    assert stage.executed is not None
    assert found == pytest.approx(2 / 1.5 * stage.executed.training / 8 / (67e12 * 0.5)), "two rows, and 1.5 on average"


def test_messages_of_fsdp2_go_on_beside_computing_unless_they_are_not_to() -> None:
    hardware = parse_hardware("h100x8")
    made = plan(recipe(stages=["sft"], sft={"steps": 10, "batch": 16}, parallel="fsdp2"), **FACTS, ranks=8)
    beside, waiting = times(made, hardware), times(made, hardware, replace(RATES, overlap=False))
    sent = sum(part.seconds for part in beside.parts if part.beside)
    computing = parts(beside)["forward and backward passes"]
    optimizer = parts(beside)["optimizer"]
    assert sent > computing
    assert beside.most == pytest.approx(sent + optimizer)
    assert waiting.most == pytest.approx(sent + computing + optimizer)


def test_sampling_reads_weights_for_every_token_and_the_cache_of_every_response() -> None:
    rl = {"steps": 2, "prompts": 8, "rollouts": 4, "rollout_rows": 8, "max_tokens": 100, "expected_tokens": 40}
    given = plan(recipe(stages=["rl"], rl=rl, parallel="ddp"), **FACTS, ranks=2)
    found = times(given, parse_hardware("h100x2"))
    weights = 4 * (LLAMA.matmul + LLAMA.vocab * LLAMA.hidden)
    cache = 2 * LLAMA.layers * LLAMA.kv_heads * LLAMA.head_dim * 4
    waves, responses = 2 * 2, 2 * 16  # 16 responses of a rank in two batches, eight in parallel

    def reading(longest: int) -> float:
        return (waves * longest * weights + responses * 40 * (10 + 20) * cache) / (3350e9 * 0.25)

    assert parts(found)["sampling"] == pytest.approx(reading(100))
    assert found.most is not None and found.least is not None
    assert found.most - found.least == pytest.approx(reading(100) - reading(40))


def test_what_is_not_known_of_a_device_makes_no_time() -> None:
    given = recipe(stages=["sft", "rl"], rl={"steps": 1, "prompts": 8, "rollouts": 4})
    found = stage_times(plan(given, **FACTS), parse_hardware("cpu"), RATES)
    assert total_seconds(found) is None
    assert [time.most for time in found] == [None, None]
    assert found[0].unknown == ("the peak of cpu in float32", "the memory bandwidth of cpu")
    unknown = plan(recipe(stages=["sft"]))
    assert times(unknown, parse_hardware("h100")).unknown == ("its FLOPs",)
    away = plan(recipe(stages=["sft"], parallel="fsdp2", sharding={"offload": True}), **FACTS)
    assert "the optimizer's speed in host memory" in times(away, parse_hardware("h100")).unknown
    between = plan(recipe(stages=["sft"], parallel="ddp"), **FACTS, ranks=16)
    assert times(between, parse_hardware("l40sx16")).unknown == ("the link of l40s between nodes",)


@pytest.mark.parametrize("budget", ["flops", "tokens"])
def test_a_budget_ends_a_stage(budget: str) -> None:
    rl = {"steps": 1_000_000, "prompts": 8, "rollouts": 4, "expected_tokens": 50}
    trained = 8 * 4 * 50
    limit = 100 * 8 * LLAMA.total * trained if budget == "flops" else 100 * trained
    made = plan(recipe(stages=["rl"], rl={**rl, budget: limit}), **FACTS)
    (stage,) = made.stages
    assert stage.optimizer_steps == 100
    assert stage.trained_tokens == stage.generated_tokens == pytest.approx(100 * trained)
    assert stage.rule_flops == pytest.approx(100 * 8 * LLAMA.total * trained)
    assert stage.rollouts is not None and stage.rollouts.batches == 100
    assert any("it ends at its budget" in text for text in made.assumptions)
    (whole,) = plan(recipe(stages=["rl"], rl={**rl, "steps": 3, budget: limit}), **FACTS).stages
    assert whole.optimizer_steps == 3, "the steps end it first"


def test_a_prompt_is_read_once_for_its_group_and_the_policy_scores_as_often_as_its_method_asks() -> None:
    rl = {"steps": 1, "prompts": 8, "rollouts": 4, "expected_tokens": 50}
    (stage,) = plan(recipe(stages=["rl"], rl=rl), **FACTS).stages
    (unscored,) = plan(recipe(stages=["rl"], rl=rl), **FACTS, passes={"rl": 0.0}).stages
    assert stage.executed is not None and unscored.executed is not None
    alone = 32 * sampling_flops(LLAMA, 10, 50)
    read_again = 24 * (2 * LLAMA.matmul * 10 + 4 * LLAMA.layers * LLAMA.heads * LLAMA.head_dim * 55)
    assert stage.executed.sampling == pytest.approx(alone - read_again - 24 * 2 * LLAMA.hidden * LLAMA.vocab)
    assert unscored.executed.scoring == 0 < stage.executed.scoring


def test_a_row_that_is_longer_than_a_micro_batch_stands_alone() -> None:
    short = {"sft": {"steps": 1, "micro_batch_tokens": 64}, "stages": ["sft"]}
    usual, long, shared = (
        plan(recipe(**short, **more), longest_row_tokens=longest, **FACTS, ranks=2).stages[0].micro_batch_tokens
        for longest, more in ((60, {}), (200, {}), (200, {"sharding": {"context": 2}}))
    )
    assert (usual, long, shared) == (64, 200, 100)


def test_an_evaluation_samples_from_a_whole_model_on_every_rank() -> None:
    given = recipe(stages=["eval"], eval={"rollout_rows": 16, "max_tokens": 50}, data={"limit": 100}, parallel="fsdp2")
    (stage,) = plan(given, **FACTS, ranks=4).stages
    assert stage.memory is not None and stage.rollout_rows == 16
    lines = {line.name: line.bytes for line in stage.memory.lines}
    assert lines["weights"] == 4 * LLAMA.total
    assert lines["key-value cache"] == 16 * (10 + 50) * 2 * LLAMA.layers * LLAMA.kv_heads * LLAMA.head_dim * 4


def test_the_rows_that_are_sampled_at_once_are_those_that_the_method_asks_for() -> None:
    rl = {"steps": 2, "prompts": 8, "rollouts": 4, "rollout_rows": 512, "max_tokens": 100, "expected_tokens": 40}
    given, outcome = recipe(stages=["rl"], rl=rl, parallel="ddp"), Outcome(32, 32)
    plain = plan(given, **FACTS, ranks=2, works={"rl": Work.just(outcome)})
    more = plan(given, **FACTS, ranks=2, works={"rl": Work(outcome, outcome, "", at_once=20)})
    assert [found.stages[0].rollout_rows for found in (plain, more)] == [16, 40]
