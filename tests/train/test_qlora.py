"""QLoRA: the policy with weights in 4 bits is the one that is sampled, published and resumed.

What computes in 4 bits needs bitsandbytes (``pip install "thence[qlora]"``), and skips without it.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.small_models import make
from thence.errors import CheckpointError, RecipeError, UserError
from thence.recipe import Lora
from thence.train.checkpoint import host_copy, write_checkpoint
from thence.train.lora import adapters_off, add_adapters, places_of, trained_tensors
from thence.train.policy import Policy
from thence.train.probe import check_adapters
from thence.train.quantized import (
    FourBit,
    check_base,
    check_quantizable,
    load_bitsandbytes,
    quantize,
    quantized_digest,
)
from thence.train.weights import named_weights, skeleton_of, whole

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
KINDS = ["llama", "qwen2", "mixtral"]


@pytest.fixture
def bitsandbytes() -> Any:
    try:
        return load_bitsandbytes()
    except UserError:
        pytest.skip('set up an environment with bitsandbytes: pip install "thence[qlora]"')


def adapted(kind: str = "qwen2", dtype: torch.dtype = torch.float32, **settings: Any) -> Policy:
    """A policy whose adapters are not zero, its weights as they are."""
    model = make(kind, dtype, **({"num_local_experts": 4} if kind == "mixtral" else {}))
    policy = Policy(model)
    policy.keep_skeleton(skeleton_of(model))
    add_adapters(model, Lora(rank=3, **settings), 7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trained():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return policy


def quantized(kind: str = "qwen2", **settings: Any) -> Policy:
    policy = adapted(kind, **settings)
    quantize(policy.model)
    return policy


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def nearest(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """NF4 by its definition, one number at a time as float64: blocks of 64 of the numbers as they lie in memory."""
    blocks = list(weight.flatten().split(64))
    scaled = [(block.double(), block.abs().max().double()) for block in blocks]
    found = [values.double()[((b / m)[:, None] - values.double()).abs().argmin(1)] * m for b, m in scaled]
    return torch.cat(found).view_as(weight)


@pytest.mark.parametrize("shape", [(64, 48), (7, 23), (5, 1), (100, 96)])
def test_a_weight_in_4_bits_is_the_nearest_of_16_values_times_its_blocks_largest(
    shape: tuple[int, int], bitsandbytes: Any
) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(shape[1], shape[0])
    packed = FourBit(layer)
    expected = nearest(layer.weight.detach(), packed.values)
    assert packed.values.min() == -1 and packed.values.max() == 1 and len(packed.values.unique()) == 16
    assert torch.allclose(packed.dequantized().double(), expected, rtol=1e-6, atol=0)
    assert packed.weight.numel() == (layer.weight.numel() + 1) // 2 and packed.weight.dtype == torch.uint8
    assert packed.absmax.numel() == -(-layer.weight.numel() // 64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_is_the_plain_model_of_its_whole_weights(kind: str, bitsandbytes: Any) -> None:
    plain, policy = adapted(kind), quantized(kind)
    changed = {
        name for name, value in named_weights(plain) if not torch.equal(value, dict(named_weights(policy))[name])
    }
    assert changed == {f"{name}.weight" for name in places_of(policy.model).adapted}
    assert {n: (v.shape, v.dtype) for n, v in named_weights(plain)} == {
        n: (v.shape, v.dtype) for n, v in named_weights(policy)
    }
    with whole(policy) as model:
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
        found = logits(model)
    assert (found - logits(policy.model)).abs().max() < 2e-5 * found.abs().max()
    assert (found - logits(plain.model)).abs().max() > 1e-3 * found.abs().max()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_gradient_of_autograd_and_nothing_else_has_one(
    kind: str, packing: bool, bitsandbytes: Any
) -> None:
    policy = quantized(kind)
    assert check_adapters(policy, packing)
    assert all(".lora_" in name for name in trained_tensors(policy.model))


def test_the_gradient_is_that_of_the_plain_model_with_these_weights(bitsandbytes: Any) -> None:
    """Not by the layer itself on both sides: the other model has plain layers that hold the dequantized weights."""
    policy, other = quantized(), adapted()
    for name, layer in places_of(other.model).adapted.items():
        layer.base_layer.weight.data = places_of(policy.model).adapted[name].base_layer.dequantized()
    for each in (policy, other):
        each.model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)[0, :, 5].sum().backward()
    expected = trained_tensors(other.model)
    for name, parameter in trained_tensors(policy.model).items():
        found, right = parameter.grad, expected[name].grad
        assert found is not None and right is not None
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def test_bfloat16_rounds_what_a_plain_layer_rounds_and_changes_no_weight(bitsandbytes: Any) -> None:
    policy, other = quantized(), adapted()
    for name, layer in places_of(other.model).adapted.items():
        layer.base_layer.weight.data = places_of(policy.model).adapted[name].base_layer.dequantized()
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    exact = logits(policy.model)
    with policy.computing(torch.bfloat16), other.computing(torch.bfloat16):
        found, expected = logits(policy.model), logits(other.model)
    assert (found - exact).abs().max() > 1e-3
    assert (found - expected).abs().max() < 2 * (expected - exact).abs().max()
    assert torch.equal(logits(policy.model), exact), "what has been computed in bfloat16 is not kept"
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_layer_in_4_bits_computes_in_the_type_of_a_plain_one(compute: torch.dtype, bitsandbytes: Any) -> None:
    plain = nn.Linear(70, 9)
    packed, x = FourBit(plain), torch.randn(4, 70)
    plain.weight.data = packed.dequantized()
    with Policy(make("llama", torch.float32)).computing(compute):
        found, expected = packed(x), plain(x)
    assert found.dtype == expected.dtype == compute
    assert torch.allclose(found.float(), expected.float(), rtol=0.02 if compute == torch.bfloat16 else 1e-5, atol=0.02)


def test_without_adapters_the_reference_is_the_quantized_model(bitsandbytes: Any) -> None:
    policy, moved = quantized(), quantized()
    with torch.no_grad():
        for parameter in moved.trained():
            parameter.add_(1.0)
    with adapters_off(policy.model), adapters_off(moved.model):
        assert torch.equal(logits(policy.model), logits(moved.model))
    assert not torch.equal(logits(policy.model), logits(moved.model))


def test_the_same_weights_give_the_same_bits_and_others_are_told(bitsandbytes: Any) -> None:
    one, again, other = quantized(), quantized(), adapted()
    with torch.no_grad():
        places_of(other.model).adapted["model.layers.1.mlp.up_proj"].base_layer.weight[3, 3] += 1.0
    quantize(other.model)
    assert quantized_digest(one.model) == quantized_digest(again.model) != quantized_digest(other.model)
    assert quantized_digest(adapted().model) is None
    digest = quantized_digest(one.model)
    check_base(again.model, digest, Path("step-000001"))
    for model, kept in ((other.model, digest), (one.model, None), (adapted().model, digest)):
        with pytest.raises(CheckpointError, match="other quantized weights"):
            check_base(model, kept, Path("step-000001"))


def test_copies_keep_the_bits_and_checkpoints_leave_them_out(bitsandbytes: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = quantized(modules_to_save=["model.norm"])
    assert torch.equal(logits(copy.deepcopy(policy.model)), logits(policy.model))
    kept = host_copy(policy.model)
    assert {n for n, p in kept.named_parameters() if not p.is_meta} == set(trained_tensors(policy.model))

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None: ...

    place = write_checkpoint(tmp_path, 1, kept, Tokenizer(), {}, {})
    assert set(load_file(place / "model.safetensors")) == set(trained_tensors(policy.model))


def test_without_bitsandbytes_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r'pip install "thence\[qlora\]"'):
        quantize(adapted().model)


@pytest.mark.parametrize(
    ("kind", "dtype", "said"), [("gpt2", torch.float32, "Conv1D"), ("llama", torch.float64, "is float64")]
)
def test_layers_that_cannot_be_quantized_are_refused(kind: str, dtype: torch.dtype, said: str) -> None:
    model = make(kind, dtype)
    add_adapters(model, Lora(rank=2), 0)
    with pytest.raises(RecipeError, match=said):
        check_quantizable(model)
