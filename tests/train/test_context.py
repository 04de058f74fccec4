"""Ranks that share rows, each with a piece of the tokens, take the step of one process.

This file is also the script of the ranks: ``on_each_rank`` runs in each of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.oracle import VARIANTS, make_batch, make_case, relative
from tests.tiny_model import make_tiny_model
from tests.train.ranks import run_ranks
from tests.train.small_models import SLIDING, make
from tests.train.test_sharded import parameters, share_of
from thence.errors import UserError
from thence.models import ulysses
from thence.models.ulysses import Piece
from thence.objective import TokenStats
from thence.train.cut_probe import check_cut, gradient_sums
from thence.train.micro_batches import lay_out, token_inputs
from thence.train.parallel import ContextGroup, DataParallel, Ranks, ShardLayout, SingleProcess, shard, start_ranks
from thence.train.parallel.ranks import sharing_rows
from thence.train.policy import Policy
from thence.train.step import StepSettings
from thence.train.trainer import Trainer

LENGTHS = [(3, 7), (3, 12), (2, 4), (4, 1), (5, 9), (1, 20), (2, 3)]
BY_NAME = {variant.name: variant for variant in VARIANTS}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, **SLIDING},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
    "cohere2": SLIDING,
}
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft, untied head": {"tied": False},
    "sft, all rows from one rank": {"share": "first"},
    "sft, activations computed again": {"checkpointing": True},
    "sft, small passes": {"budget": 5},
    "sft, gpt2": {"kind": "gpt2"},
    "sft, qwen2": {"kind": "qwen2"},
    "sft, windows and soft-capping": {"family": "gemma2"},
    "sft, windows and sinks": {"family": "gpt_oss"},
    "sft, layers without positions": {"family": "cohere2"},
    "sft, weights cut": {"cut": True},
    "sft, weights cut, sums once a step": {"cut": True, "sharding": {"sum_every_pass": False}},
    "sft, weights cut, small passes": {"cut": True, "budget": 5, "share": "first"},
    "sft, weights cut, activations computed again": {"cut": True, "checkpointing": True, "tied": False},
    "grpo": {"variant": "grpo-paper"},
    "grpo with entropy, weights cut": {"variant": "grpo-entropy", "cut": True},
    "dr_grpo": {"variant": "dr_grpo", "share": "first"},
    "dapo, weights cut": {"variant": "dapo", "cut": True},
    "dapo, float32": {"variant": "dapo", "dtype": torch.float32},
}


def model_of(case: dict[str, Any]) -> Any:
    dtype = case.get("dtype", torch.float64)
    if "family" in case:
        return make(case["family"], dtype, **FAMILIES[case["family"]])
    model = make_tiny_model(dtype, case.get("kind", "llama"))
    if not case.get("tied", True):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.1)
        model.config.tie_word_embeddings = False
    return model


def steps(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """As :func:`own_steps`, where ``x.float()`` in a model's code leaves float64 as it is: one rounding to float32 that
    falls the other way is larger than what is compared.
    """
    narrow = torch.Tensor.float

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float64 else narrow(x)

    with mock.patch.object(torch.Tensor, "float", wide):
        return own_steps(case, ranks)


def own_steps(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Three optimizer steps and a scoring pass: parameters, reports, and what was measured of the whole batch."""
    variant, policy = BY_NAME[case.get("variant", "sft")], Policy(model_of(case))
    settings = StepSettings(case.get("budget", 25), True, 1.0, case.get("dtype", torch.float64))
    policy.check(packing=True)
    if case.get("cut") and isinstance(ranks, DataParallel):
        layout = ShardLayout(compute_dtype=settings.compute_dtype, **case.get("sharding", {}))
        layout = replace(layout, replicas=case.get("replicas", 1))
        ranks = shard(policy, ranks, layout)
    trainer = Trainer(policy, 1e-3, settings, activation_checkpointing=case.get("checkpointing", False), ranks=ranks)
    reports, scored, held = [], [], [0]
    policy.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: held.append(inputs[0].numel())  # tokens of a pass that are on this rank
    )
    for seed in (1, 2, 3):
        batch = make_batch(make_case(make_tiny_model(), variant, LENGTHS, 3, seed), variant, settings.compute_dtype)
        batch = share_of(batch, case.get("share", "dealt"), ranks)
        seen: dict[int, torch.Tensor] = {}

        def observe(group: Any, stats: TokenStats, seen: Any = seen, batch: Any = batch) -> None:
            parts = stats.slope_T.split([batch.rows[i].n_trained for i in group])
            assert not seen.keys() & set(group)
            seen |= zip(group, parts, strict=True)

        report = trainer.step(batch, observe=observe)
        assert sorted(seen) == list(range(len(batch.rows)))
        numbers = (report.loss, report.grad_norm, report.entropy, report.logp, report.clip_share)
        reports.append([*numbers, float(report.tokens), float(report.trained_tokens), float(report.rows)])
        own = [(logp, entropy, seen[i].cpu()) for i, (logp, entropy) in enumerate(trainer.statistics(batch.rows))]
        places = range(len(LENGTHS))
        if case.get("share") == "first":
            places = places if ranks.rank == 0 else ()
        else:
            places = places[ranks.rank :: ranks.world]
        facts = dict(zip(places, own, strict=True))
        scored.append({i: fact for part in ranks.gather(facts) for i, fact in part.items()})
    rows = [torch.cat([torch.stack(by_row[i]) for i in sorted(by_row)], 1) for by_row in scored]
    return {
        "parameters": parameters(policy.model),
        "reports": torch.tensor(reports, dtype=torch.float64),
        "rows": torch.stack(rows),
        "held": max(held),
    }


def what_the_check_says(ranks: Ranks, name: str, put: Any) -> str:
    """Of attention in pieces that was broken: the error of the check before the first step, empty without one."""
    policy = Policy(make_tiny_model())
    policy.check(packing=True)
    expected = gradient_sums(policy)
    before = getattr(ulysses, name)
    setattr(ulysses, name, put(before))
    try:
        check_cut(policy, ranks, expected, torch.float64)
    except UserError as error:
        return f"{error.problem} [{error.field}]"
    finally:
        setattr(ulysses, name, before)
    return ""


def keys_without_gradient(to_heads: Any) -> Any:
    return lambda x, piece: to_heads(x.detach() if x.shape[1] == 2 else x, piece)


def heads_in_another_order(to_tokens: Any) -> Any:
    return lambda x, piece: to_tokens(x, piece).flip(1)


def refused(ranks: Ranks, **fields: Any) -> str:
    """What is said of a model with so many heads."""
    policy = Policy(make("llama", **fields))
    try:
        gradient_sums(policy, ranks)
    except UserError as error:
        return f"{error.problem} [{error.field}]"
    return ""


def on_each_rank(size: int, replicas: int) -> dict[str, Any]:
    alone, _ = start_ranks()
    ranks = sharing_rows(alone, size)
    found: dict[str, Any] = {name: steps({**case, "replicas": replicas}, ranks) for name, case in CASES.items()}
    found["clean"] = what_the_check_says(ranks, "_to_heads", lambda to_heads: to_heads)
    found["no gradient of keys"] = what_the_check_says(ranks, "_to_heads", keys_without_gradient)
    found["other order"] = what_the_check_says(ranks, "_to_tokens", heads_in_another_order)
    found["three heads"] = refused(ranks, hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    ranks.wait()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("two"), "tests.train.test_context", 2, 2, 1)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("four"), "tests.train.test_context", 4, 4, 1)


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two groups of two ranks; where weights are cut, in two replicas too."""
    return run_ranks(tmp_path_factory.mktemp("groups"), "tests.train.test_context", 4, 2, 2)


def assert_as_alone(found: list[dict[str, Any]], name: str, size: int) -> None:
    case = CASES[name]
    alone = steps(case, SingleProcess())
    allowed = 1e-12 if case.get("dtype", torch.float64) == torch.float64 else 1e-5
    if case.get("family") == "cohere2":  # its norm computes in float32, the gradient too
        allowed = 1e-8
    assert relative(alone["parameters"], parameters(model_of(case))) > 1e-4, "the steps move the model"
    for rank in found:
        assert relative(rank[name]["parameters"], alone["parameters"]) <= allowed
        assert torch.allclose(rank[name]["reports"], alone["reports"], rtol=allowed, atol=allowed)
        assert torch.allclose(rank[name]["rows"], alone["rows"], rtol=10 * allowed, atol=10 * allowed)
        longest = max(prompt + response for prompt, response in LENGTHS)
        assert rank[name]["held"] <= max(case.get("budget", 25), -(-longest // size))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_rows_take_the_steps_of_one_process(name: str, two: Any) -> None:
    assert_as_alone(two, name, 2)


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_that_share_rows_take_the_steps_of_one_process(name: str, four: Any) -> None:
    assert_as_alone(four, name, 4)


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_groups_that_share_rows_take_the_steps_of_one_process(name: str, two_by_two: Any) -> None:
    assert_as_alone(two_by_two, name, 2)


def test_the_check_before_the_first_step_sees_attention_that_is_wrong_in_pieces(two: Any) -> None:
    for rank in two:
        assert rank["clean"] == ""
        assert "would get a wrong gradient" in rank["no gradient of keys"]
        assert rank["other order"].endswith("[sharding.context]")


def test_heads_that_cannot_be_dealt_to_the_ranks_are_refused(two: Any) -> None:
    said = "3 attention heads (3 for keys and values) cannot be dealt evenly to 2 ranks [sharding.context]"
    assert [rank["three heads"] for rank in two] == [said, said]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_pieces_together_are_the_packed_rows(size: int) -> None:
    variant = BY_NAME["grpo-paper"]
    rows = make_batch(make_case(make_tiny_model(), variant, LENGTHS, 3, 1), variant).rows
    device = torch.device("cpu")
    whole = lay_out(rows, True, device)
    pieces = [lay_out(rows, True, device, ContextGroup(Piece(None, rank, size))) for rank in range(size)]  # type: ignore[arg-type]
    held = len(pieces[0].token_ids[0])
    tokens = torch.cat([piece.token_ids[0] for piece in pieces])
    predicts = torch.cat([piece.predicts_T + rank * held for rank, piece in enumerate(pieces)])
    assert tokens[: whole.tokens].equal(whole.token_ids[0]) and not tokens[whole.tokens :].any()
    assert len(tokens) - whole.tokens < size and sum(pieces[0].lengths) == len(tokens)
    assert predicts.equal(whole.predicts_T)
    assert sum(piece.tokens for piece in pieces) == whole.tokens
    inputs = [token_inputs(rows, piece) for piece in pieces]
    expected = token_inputs(rows, whole)
    for name in ("target_T", "weight_JT", "behaviour_T"):
        assert torch.cat([getattr(part, name) for part in inputs], -1).equal(getattr(expected, name))
    starts = [piece.share.start for piece in pieces if piece.share]
    assert starts == [sum(len(piece.target_T) for piece in pieces[:rank]) for rank in range(size)]


def test_rows_that_are_padded_are_not_cut() -> None:
    rows = make_batch(make_case(make_tiny_model(), BY_NAME["sft"], LENGTHS, 3, 1), BY_NAME["sft"]).rows
    with pytest.raises(ValueError, match="only packed rows"):
        lay_out(rows, False, torch.device("cpu"), ContextGroup(Piece(None, 0, 2)))  # type: ignore[arg-type]
