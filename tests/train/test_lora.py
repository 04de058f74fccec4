"""Adapters: their gradient, the weights that they are merged into, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.oracle import VARIANTS, make_batch, make_case
from tests.tiny_model import make_tiny_model
from tests.train.small_models import make, plain, rows_of, step_of
from thence.cli import main
from thence.data.worlds.vocabulary import save_tokenizer
from thence.errors import RecipeError, UserError
from thence.models.layers import output_head
from thence.objective import BareRow
from thence.recipe import Lora
from thence.train.lora import adapters_off, add_adapters, has_adapters, published_tensors, save_adapter, trained_tensors
from thence.train.merge import merge
from thence.train.policy import Policy, Unadapted
from thence.train.probe import check_adapters
from thence.train.step import StepSettings, policy_statistics
from thence.train.trainer import Trainer
from thence.train.weights import named_parts, named_weights, skeleton_of, whole

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SMALL_KINDS = {"llama": {}, "gpt2": {"n_inner": 48}, "qwen2": {}, "mixtral": {"num_local_experts": 4}}


def adapted(settings: Lora, dtype: torch.dtype = torch.float64, stir: bool = True, **fields: Any) -> Policy:
    """A policy whose adapters are no longer zero."""
    model = make(fields.pop("kind", "llama"), dtype, **fields)
    policy = Policy(model)
    policy.keep_skeleton(skeleton_of(model))
    add_adapters(model, settings, 7)
    if stir:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in policy.trained():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return policy


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def test_fresh_adapters_leave_the_model_as_it_was_and_train_nothing_else() -> None:
    before = logits(make("llama"))
    policy = adapted(Lora(rank=4), stir=False)
    assert torch.equal(logits(policy.model), before)
    assert type(policy.model).__name__ == "LlamaForCausalLM"
    trained = trained_tensors(policy.model)
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float64}
    assert all(value.abs().max() > 0 for name, value in trained.items() if "lora_A" in name)


def test_adapters_follow_from_seed_and_name_alone() -> None:
    def drawn(settings: Lora, seed: int) -> dict[str, torch.Tensor]:
        model = make("llama")
        torch.manual_seed(seed * 31)
        add_adapters(model, settings, seed)
        return trained_tensors(model)

    first, again, other = drawn(Lora(rank=4), 1), drawn(Lora(rank=4, targets=["q_proj"]), 1), drawn(Lora(rank=4), 2)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("layers.0", "layers.1")])


@pytest.mark.parametrize("packing", [False, True])
def test_the_step_gives_adapters_the_gradient_of_plain_autograd(packing: bool) -> None:
    policy = adapted(Lora(rank=3, targets=["q_proj", "down_proj"], modules_to_save=["norm", "lm_head"]))
    rows = rows_of([12, 5, 9])
    (loss, found), (expected_loss, expected) = step_of(policy.model, rows, packing), plain(policy.model, rows)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert (found - expected).norm() <= 1e-12 * expected.norm() and expected.norm() > 0.1


@pytest.mark.parametrize("kind", SMALL_KINDS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-13), (torch.float32, 1e-4)])
def test_the_whole_model_is_plain_and_gives_the_logits_of_the_adapted_one(
    kind: str, dtype: torch.dtype, allowed: float
) -> None:
    policy = adapted(Lora(rank=3, alpha=5.0), dtype, kind=kind, **SMALL_KINDS[kind])
    base = make(kind, dtype, **SMALL_KINDS[kind])
    with whole(policy) as model:
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
        assert not has_adapters(model)
        assert (logits(model) - logits(policy.model)).abs().max() < allowed
        assert (logits(model) - logits(base)).abs().max() > 1e-2
    assert {name for name, _ in named_weights(policy)} == {n for n, _ in base.named_parameters()} | {
        n for n, _ in base.named_buffers() if n in base.state_dict()
    }


def test_merging_is_the_weight_plus_the_scaled_product() -> None:
    policy = adapted(Lora(rank=3, alpha=5.0, targets=["q_proj"]))
    layer: Any = policy.model.model.layers[1].self_attn.q_proj
    found = dict(named_weights(policy))["model.layers.1.self_attn.q_proj.weight"]
    expected = layer.base_layer.weight + 5 / 3 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert torch.equal(found, expected)
    assert adapted(Lora(rank=3)).model.model.layers[0].mlp.up_proj.scaling == {"default": 2}


@pytest.mark.parametrize("saved", [[], ["norm", "embed_tokens", "lm_head"]])
def test_with_its_adapters_off_a_policy_scores_as_before_training(saved: list[str]) -> None:
    rows = [BareRow(TOKENS[0], torch.arange(8) > 2)]
    settings = StepSettings(compute_dtype=torch.float64)
    policy, before = adapted(Lora(rank=3, modules_to_save=saved)), Policy(make("llama"))
    expected = policy_statistics(before, rows, 1.0, settings)[0][0]
    assert torch.equal(policy_statistics(Unadapted(policy), rows, 1.0, settings)[0][0], expected)
    assert not torch.allclose(policy_statistics(policy, rows, 1.0, settings)[0][0], expected)
    assert all(p.requires_grad for p in policy.trained()) and policy.trained()


def test_only_adapters_are_kept_and_the_optimizer_holds_nothing_else() -> None:
    model = make_tiny_model()
    add_adapters(model, Lora(rank=2), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, 1e-2)
    sft = next(v for v in VARIANTS if v.name == "sft")
    trainer.step(make_batch(make_case(model, sft, [(3, 7), (2, 4)], 3, 1), sft))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert {name for name, _ in named_parts(model)} == set(trained_tensors(model))
    assert {key.split("/")[1] for key in trainer.state()[1]} == set(trained_tensors(model))


@pytest.mark.parametrize("saved", [[], ["model.norm", "lm_head"]])
@pytest.mark.parametrize("packing", [False, True])
def test_a_model_with_adapters_holds_what_the_step_relies_on(saved: list[str], packing: bool) -> None:
    policy = adapted(Lora(rank=3, modules_to_save=saved), stir=False)
    before = {name: value.clone() for name, value in trained_tensors(policy.model).items()}
    assert "tensors" in check_adapters(policy, packing)
    assert all(torch.equal(value, before[name]) for name, value in trained_tensors(policy.model).items())


def test_a_model_that_reads_a_weight_past_its_adapter_is_refused() -> None:
    policy = adapted(Lora(rank=3, targets=["q_proj"]), stir=False)
    layer: Any = policy.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.base_layer.forward
    with pytest.raises(UserError, match="past its adapter"):
        check_adapters(policy)


def test_peft_opens_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    policy = adapted(Lora(rank=3, targets=["q_proj", "o_proj"], modules_to_save=["model.norm"]))
    save_adapter(policy.model, dict(published_tensors(policy.model)), "some/base", tmp_path)
    opened = PeftModel.from_pretrained(make("llama"), str(tmp_path))
    assert torch.equal(logits(opened), logits(policy.model))
    assert "some/base" in (tmp_path / "adapter_config.json").read_text()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 40_000


@pytest.mark.parametrize(
    ("settings", "fields", "said"),
    [
        ({"targets": ["q_porj"]}, {}, "'q_porj' is not there in LlamaForCausalLM"),
        ({"targets": ["q_proj", "norm"]}, {}, "'norm' is no linear layer"),
        ({"targets": ["lm_head"]}, {}, "lm_head is the output layer"),
        ({"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}, "tied"),
        ({"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}, "tied"),
        ({"modules_to_save": ["mlp"]}, {}, "an adapter is asked for in it"),
        ({"modules_to_save": ["model"]}, {}, "is the whole model"),
        ({"modules_to_save": ["nrom"]}, {}, "'nrom' is no module"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: Any, fields: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        adapted(Lora(rank=2, **settings), **fields)
    assert refused.value.field.startswith("model.lora.") and refused.value.remedy


def test_an_unknown_target_is_answered_with_the_linear_layers() -> None:
    with pytest.raises(RecipeError) as refused:
        adapted(Lora(rank=2, targets=["query"]))
    assert all(name in refused.value.remedy for name in ("q_proj", "down_proj"))
    assert "lm_head" not in refused.value.remedy


def test_an_adapter_on_the_output_layer_is_never_passed_over() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = make("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    with pytest.raises(UserError, match="has an adapter"):
        output_head(model)


def test_without_peft_the_command_to_install_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError) as refused:
        add_adapters(make("llama"), Lora(rank=2), 0)
    assert "pip install" in refused.value.remedy


def test_adapters_are_on_again_after_an_error() -> None:
    policy = adapted(Lora(rank=2))
    expected = logits(policy.model)
    with pytest.raises(KeyError), adapters_off(policy.model):
        raise KeyError
    assert torch.equal(logits(policy.model), expected)


def test_adapters_of_a_model_without_weights_are_without_weights() -> None:
    with torch.device("meta"):
        model = make("llama")
    add_adapters(model, Lora(rank=2), 0)
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in model.parameters())


def saved_base(folder: Path, **fields: Any) -> str:
    make("llama", **fields).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def test_an_adapter_of_peft_is_merged_into_its_model(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    policy = adapted(Lora(rank=3, alpha=5.0, targets=["q_proj", "o_proj"], modules_to_save=["model.norm"]))
    (tmp_path / "adapter").mkdir()
    save_adapter(policy.model, dict(published_tensors(policy.model)), base, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert (logits(opened) - logits(policy.model)).abs().max() < 1e-12
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    with pytest.raises(UserError, match="not an empty folder"):
        merge(tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_model_is_not_merged(tmp_path: Path) -> None:
    policy = adapted(Lora(rank=3, targets=["q_proj"]))
    (tmp_path / "adapter").mkdir()
    save_adapter(policy.model, dict(published_tensors(policy.model)), "", tmp_path / "adapter")
    with pytest.raises(UserError, match="does not say which model"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    for other in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 64}):
        base = saved_base(tmp_path / str(other), **other)
        with pytest.raises(UserError, match="the adapter is not one of"):
            merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="holds no adapter"):
        merge(tmp_path, tmp_path / "merged")


@pytest.mark.parametrize("which", [True, 2])
def test_recomputed_activations_give_adapters_the_same_update(which: bool | int) -> None:
    found = []
    sft = next(v for v in VARIANTS if v.name == "sft")
    for again in (False, which):
        model = make_tiny_model()
        add_adapters(model, Lora(rank=2), 0)
        trainer = Trainer(model, 1e-2, activation_checkpointing=again)
        for seed in (1, 2):
            trainer.step(make_batch(make_case(model, sft, [(3, 7), (2, 4)], 3, seed), sft))
        found.append(torch.cat([p.detach().flatten() for p in trainer.policy.trained()]))
    assert (found[0] - found[1]).norm() <= 1e-12 * found[0].norm()
