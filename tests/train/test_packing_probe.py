"""Packing is tried on the model at hand: rows see no neighbours, or the model is refused."""

from __future__ import annotations

import pytest
import torch

from tests.train.small_models import MIXTURE, SLIDING, make, plain, rows_of, step_of
from thence.errors import UserError
from thence.kernels.attention import packed_causal_attention
from thence.models import packing as packing_module
from thence.models.packing import way_of

WINDOWED = {
    "mistral": {"sliding_window": 16},
    "phi3": {"sliding_window": 16},
    "starcoder2": {"sliding_window": 16},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "cohere2": SLIDING,
    "olmo3": SLIDING,
    "gpt_oss": {**SLIDING, **MIXTURE},
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_packed_rows_longer_than_the_window_have_the_gradient_of_rows_alone(kind):
    model = make(kind, **WINDOWED[kind])
    rows = rows_of([40, 25, 40, 9])
    expected, gradient = plain(model, rows)
    for packing in (True, False, True):  # a padded step after a packed one is as it would have been
        loss, found = step_of(model, rows, packing)
        assert loss == pytest.approx(expected, rel=1e-7)
        assert torch.linalg.vector_norm(found - gradient) <= 1e-6 * torch.linalg.vector_norm(gradient)


def test_a_window_is_seen_by_the_test_above():
    """Without its window the model has another loss: a packed step that forgot it would be found out."""
    rows = rows_of([40, 25])
    assert (
        abs(plain(make("mistral", sliding_window=16), rows)[0] - plain(make("mistral", sliding_window=99), rows)[0])
        > 0.01
    )


def test_a_packed_pass_leaves_the_attention_as_it_was():
    model = make("gpt_oss", **WINDOWED["gpt_oss"])
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    token_ids = torch.arange(1, 30)[None]
    expected = model(input_ids=token_ids).logits
    step_of(model, rows_of([30, 12]), True)
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    assert torch.equal(model(input_ids=token_ids).logits, expected)


@pytest.mark.parametrize("kind", ["stablelm", "nemotron", "gptj", "gpt_neo"])
def test_models_that_do_not_hand_on_where_rows_end_are_packed_by_a_mask(kind):
    fields = {"gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}}.get(kind, {})
    if kind == "gpt_neo":
        fields = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16}
    model = make(kind, **fields)
    rows = rows_of([40, 25, 9])
    expected, gradient = plain(model, rows)
    assert way_of(model) == "mask"
    loss, found = step_of(model, rows, True)
    assert loss == pytest.approx(expected, rel=1e-7)
    assert torch.linalg.vector_norm(found - gradient) <= 1e-6 * torch.linalg.vector_norm(gradient)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_models_that_cannot_be_packed_are_refused_with_a_remedy(kind):
    fields = {"n_head": 4, "n_layer": 2} if kind == "bloom" else {"state_size": 4}
    model = make(kind, **fields)
    with pytest.raises(UserError, match="cannot be packed") as caught:
        step_of(model, rows_of([12, 9]), True)
    assert "packing = false" in str(caught.value)
    step_of(model, rows_of([12, 9]), False)


def test_state_that_runs_across_rows_is_found_out():
    model = make("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(UserError, match="cannot be packed"):
        way_of(model)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rows_whose_angles_would_follow_from_their_neighbours_are_refused(rope):
    table = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if rope == "longrope":
        table |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = make("llama", rope_parameters=table)
    step_of(model, rows_of([30, 9]), False)
    with pytest.raises(UserError, match="longer than the 32"):
        step_of(model, rows_of([40, 9]), False)


def rounds_a_lot() -> torch.nn.Module:
    """In float32 a rounding of its embeddings grows to some 1e-4 of its hidden states, as in small trained models."""
    model = make("llama", torch.float32, num_hidden_layers=8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 40
    return model


def test_a_model_that_makes_roundings_large_is_packed_by_its_attention(monkeypatch):
    assert way_of(rounds_a_lot()) == "attention"
    monkeypatch.setattr(packing_module, "ROUNDINGS", 0)
    assert way_of(rounds_a_lot()) == "mask"  # a model whose roundings nobody looks at is not


def test_rows_that_see_each_other_are_not_taken_for_rounding(monkeypatch):
    def contaminated(q, k, v, lengths, *given, **named):
        return packed_causal_attention(q, k, v, (sum(lengths),), *given, **named)

    monkeypatch.setattr(packing_module, "packed_causal_attention", contaminated)
    assert way_of(rounds_a_lot()) == "mask"
