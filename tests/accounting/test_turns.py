"""What rollouts of several turns cost: the sum of their turns, and rows with their observations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thence.accounting.batches import Lengths, Turns, group_flops
from thence.accounting.budget import plan
from thence.accounting.flops import causal_pairs, forward_flops, parameters
from thence.accounting.planned import Plan
from thence.recipe import load_recipe

SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 80, "vocab_size": 97, "max_position_embeddings": 4096}
COUNTS = parameters(SMALL | {"model_type": "llama"})


def planned(environment: dict[str, Any] | None, **rl: Any) -> Plan:
    stage = {"steps": 5, "prompts": 4, "rollouts": 2, "max_tokens": 100, "expected_tokens": 60, **rl}
    stage |= {} if environment is None else {"environment": {"path": "shop.py:Shop", **environment}}
    model = {"init": {"model_type": "llama", **SMALL}, "tokenizer": "t"}
    tables = {"model": model, "stages": ["rl"], "rl": stage}
    return plan(load_recipe(tables), mean_prompt_tokens=30, mean_response_tokens=60, n_examples=10)


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 9), st.integers(0, 9), st.integers(1, 4))
def test_turns_cost_what_each_of_them_reads_and_samples(
    prompt: int, turns: int, said: int, observed: int, group: int
) -> None:
    """Token by token: a turn reads its row, then each sampled token but its last; a group reads its prompt once."""
    alone, row = 0.0, prompt
    for _ in range(turns):
        alone += forward_flops(COUNTS, row, causal_pairs(row), 1)
        alone += sum(forward_flops(COUNTS, 1, causal_pairs(1, prefix=row + i), 1) for i in range(said - 1))
        row += said + observed
    once = forward_flops(COUNTS, prompt, causal_pairs(prompt), 1)
    lengths = Lengths(prompt, turns * said, 0, Turns(turns, (turns - 1) * observed))
    assert group_flops(COUNTS, lengths, group, group) == pytest.approx(group * alone - (group - 1) * once, rel=1e-12)


def test_half_a_turn_more_costs_half_of_what_a_turn_more_does() -> None:
    one, both, two = (group_flops(COUNTS, Lengths(30, 60, 0, Turns(n, 40)), 8, 2) for n in (1, 1.5, 2))
    assert one < both == pytest.approx((one + two) / 2)


def test_observations_are_read_in_training_and_trained_by_no_rule() -> None:
    """A stage whose prompts are longer by the observations reads as much, and samples as much as it trains."""
    plain, turns = planned(None), planned({"expected_turns": 1, "expected_observation_tokens": 40})
    longer = plan_of_prompts(70)
    for stage in (turns.stages[0],):
        assert stage.rule_flops == plain.stages[0].rule_flops and stage.trained_tokens == plain.stages[0].trained_tokens
        assert stage.executed is not None and longer.stages[0].executed is not None
        assert stage.executed.training == longer.stages[0].executed.training
        assert stage.executed.scoring == longer.stages[0].executed.scoring


def plan_of_prompts(tokens: float) -> Plan:
    model = {"init": {"model_type": "llama", **SMALL}, "tokenizer": "t"}
    stage = {"steps": 5, "prompts": 4, "rollouts": 2, "max_tokens": 100, "expected_tokens": 60}
    tables = {"model": model, "stages": ["rl"], "rl": stage}
    return plan(load_recipe(tables), mean_prompt_tokens=tokens, mean_response_tokens=60, n_examples=10)


def test_a_plan_says_what_it_does_not_count_of_an_environment() -> None:
    said = " ".join(planned({}).assumptions)
    assert "rl.environment.expected_turns and rl.environment.expected_observation_tokens" in said
    counted = " ".join(planned({"expected_turns": 2.5, "expected_observation_tokens": 40}).assumptions)
    assert "not fully counted" not in counted and "2.5 turns and 40 tokens of observations" in counted


def test_memory_holds_the_longest_observations() -> None:
    def cache(found: Plan) -> int:
        memory = found.stages[0].memory
        assert memory is not None
        return next(line.bytes for line in memory.lines if "cache" in line.name)

    short, long = (planned({"max_observation_tokens": tokens}) for tokens in (1, 1000))
    assert cache(planned(None)) < cache(short) < cache(long)
