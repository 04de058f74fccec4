"""Layers with C kernels: the model's own loss and gradient, and only where the kernels know what they do."""

from __future__ import annotations

import pytest
import torch

from tests.train.small_models import make, plain, rows_of, step_of
from thence.kernels import layer
from thence.models import quick_layers as module
from thence.models.packing import attending, packed_attention
from thence.models.quick_layers import quick_layers

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"num_key_value_heads": 1},
}
LENGTHS = [40, 2, 25, 9]


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel was asked."""
    if layer.layer_kernels(8) is None:
        pytest.skip("no C compiler")
    found = dict.fromkeys(("norm", "gated", "turned"), 0)

    def counted(name):
        kernel = getattr(layer.LayerKernels, name)

        def call(self, *args):
            found[name] += 1
            return kernel(self, *args)

        return call

    for name in found:
        monkeypatch.setattr(layer.LayerKernels, name, counted(name))
    return found


def roughened(kind, dtype=torch.float32, **fields):
    """A model whose norms are not all one: left out, they would go unnoticed."""
    model = make(kind, dtype, **{**FAMILIES.get(kind, {}), **fields})
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_packed_step_with_kernels_has_the_gradient_of_rows_alone(kind, calls):
    rows = rows_of(LENGTHS)
    expected, gradient = plain(roughened(kind).double(), rows)
    loss, found = step_of(roughened(kind), rows, True)
    assert all(calls.values())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert torch.linalg.vector_norm(found - gradient) <= 1e-5 * torch.linalg.vector_norm(gradient)


def test_without_kernels_the_step_is_the_same(monkeypatch, calls):
    rows = rows_of(LENGTHS)
    loss, gradient = step_of(roughened("llama"), rows, True)
    asked = dict(calls)
    monkeypatch.setattr(module, "layer_kernels", lambda _: None)
    plain_loss, plain_gradient = step_of(roughened("llama"), rows, True)
    assert calls == asked
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert torch.linalg.vector_norm(gradient - plain_gradient) <= 1e-5 * torch.linalg.vector_norm(gradient)


def test_weights_that_are_frozen_get_no_gradient(calls):
    model = roughened("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name and "mlp" not in name)
    step_of(model, rows_of(LENGTHS), True)
    assert all(calls.values())
    assert {p.grad is None for name, p in model.named_parameters() if "norm" in name or "mlp" in name} == {True}


def test_a_packed_pass_leaves_the_layers_as_they_were(calls):
    model = roughened("qwen3")
    token_ids = torch.arange(1, 30)[None]
    expected = model(input_ids=token_ids).logits
    step_of(model, rows_of(LENGTHS), True)
    seen = dict(calls)
    assert torch.equal(model(input_ids=token_ids).logits, expected)
    assert calls == seen
    assert not [part for part in model.modules() if "forward" in vars(part)]


def test_a_replaced_forward_of_another_is_left_alone(calls):
    model = roughened("llama")
    own = model.model.norm.forward
    model.model.norm.forward = own
    with quick_layers(model, packed_attention):
        assert model.model.norm.forward is own
    assert model.model.norm.forward is own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_numbers_than_float32_go_through_the_models_own_layers(dtype, calls):
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    model = roughened("llama", weights)
    with attending(model, True):
        before = dict(calls)
        assert [part for part in model.modules() if "forward" in vars(part)]
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            model.model(input_ids=torch.arange(1, 9)[None], position_ids=torch.arange(8)[None], packed_lengths=(8,))
        assert calls == before


def test_a_window_goes_through_the_models_own_attention(calls):
    rows = rows_of(LENGTHS)
    expected, gradient = plain(roughened("mistral", sliding_window=16).double(), rows)
    loss, found = step_of(roughened("mistral", sliding_window=16), rows, True)
    assert calls["norm"] and calls["gated"] and not calls["turned"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert torch.linalg.vector_norm(found - gradient) <= 1e-5 * torch.linalg.vector_norm(gradient)


def test_a_gate_that_is_not_silu_is_left_alone(calls):
    rows = rows_of(LENGTHS)
    expected, _ = plain(roughened("llama", hidden_act="gelu").double(), rows)
    loss, _ = step_of(roughened("llama", hidden_act="gelu"), rows, True)
    assert not calls["gated"] and calls["norm"]
    assert loss == pytest.approx(expected, rel=1e-5)


class NarrowLinear(torch.nn.Linear):
    """As a quantized projection may: it gives other numbers than it takes."""

    def forward(self, x):
        return super().forward(x).to(torch.bfloat16)


def test_queries_that_are_not_float32_are_turned_by_torch(calls):
    model, rows = roughened("llama"), rows_of(LENGTHS)
    for block in model.model.layers:
        block.self_attn.q_proj.__class__ = NarrowLinear
    expected, _ = plain(model, rows)
    model.zero_grad()
    loss, _ = step_of(model, rows, True)
    assert not calls["turned"] and calls["norm"]
    assert loss == pytest.approx(expected, rel=1e-3)


def test_heads_of_another_size_than_the_first_layers_are_turned_by_torch(calls):
    model, other = roughened("llama"), roughened("llama", head_dim=16)
    block, (cos, sin) = other.model.layers[0].self_attn, (torch.ones(1, 9, 16), torch.zeros(1, 9, 16))
    both = torch.nn.ModuleList([model, block])
    x = torch.linspace(-1, 1, 9 * 32).view(1, 9, 32)
    with quick_layers(block, packed_attention):
        expected, _ = block(x, (cos, sin), packed_lengths=(5, 4))
    calls["turned"] = 0
    with quick_layers(both, packed_attention):
        found, _ = block(x, (cos, sin), packed_lengths=(5, 4))
    assert not calls["turned"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("what", ["replaced", "looked at"])
def test_a_gate_that_is_replaced_or_looked_at_is_called(what, calls):
    model, rows, seen = roughened("llama"), rows_of(LENGTHS), []
    for block in model.model.layers:
        if what == "replaced":
            block.mlp.act_fn = torch.nn.GELU()
        block.mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    step_of(model, rows, True)
    before = len(seen)
    with attending(model, True):
        ids = torch.arange(1, 9)[None]
        model.model(input_ids=ids, position_ids=torch.arange(8)[None], packed_lengths=(8,))
    assert len(seen) == before + len(model.model.layers)
    assert calls["norm"] and not calls["gated"]


def test_a_gate_that_is_replaced_after_the_check_is_called(calls):
    model, rows = roughened("llama"), rows_of(LENGTHS)
    step_of(model, rows, True)
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.GELU()
    expected, _ = plain(model, rows)
    model.zero_grad()
    loss, _ = step_of(model, rows, True)
    assert loss == pytest.approx(expected, rel=1e-5)
