"""Shared by all tests: one thread, and a random model small enough for a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes import Tables, file_recipe

torch.set_num_threads(1)

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, POSITIONS = 40, 32, 2, 4, 2, 512


def make_tiny_model(dtype: torch.dtype = torch.float64, kind: str = "llama", seed: int = 0) -> Any:
    """A random causal language model in eval mode; its weights are large enough that probabilities differ much.

    One seed gives the same weights in every dtype (they are drawn in float32).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "initializer_range": 0.2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"num_key_value_heads": KV_HEADS, "intermediate_size": 2 * HIDDEN, "head_dim": HIDDEN // HEADS}
    config = AutoConfig.for_model(kind, **sizes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()
    torch.set_rng_state(state)
    return model


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(dtype, kind, seed)``: a fresh model every call (see :func:`make_tiny_model`)."""
    return make_tiny_model


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark ``matrix(n)``, n cases spread evenly over all of them are quick; the others are slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        mark = found[0].get_closest_marker("matrix")
        assert mark is not None
        wanted = mark.args[0]
        quick = {number * len(found) // wanted for number in range(wanted)}
        for number, item in enumerate(found):
            if len(found) > wanted and number not in quick:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """SFT, RL and an evaluation on files; everything but the model's size is as a user would have it."""
    return file_recipe(tmp_path)
