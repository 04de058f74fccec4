"""What training relies on is tried on the model at hand: wrong models are refused, right ones are left as they were."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.train.small_models import CPU, MIXTURE, SLIDING, make, plain, rows_of, step_of
from thence.errors import UserError
from thence.models import layers
from thence.models.layers import check_model
from thence.recipe import Model
from thence.rollout.choice import choice_of
from thence.rollout.llama import is_plain_llama
from thence.rollout.native import Sampling, sample
from thence.train.checkpoint import checkpoints, write_checkpoint
from thence.train.model import load_model, load_tokenizer, save_model
from thence.train.probe import check_files, check_gradient
from thence.train.state import load_weights


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("gemma2", {**SLIDING, "final_logit_softcapping": 3.0}), ("phi", {}), ("cohere", {"logit_scale": 0.25})],
    ids=["soft-capped", "bias", "scaled"],
)
def test_every_part_of_the_output_layer_is_trained(kind, fields):
    model = make(kind, **fields)
    rows = rows_of([20, 7])
    expected, gradient = plain(model, rows)
    loss, found = step_of(model, rows, False)
    assert loss == pytest.approx(expected, rel=1e-7)
    assert torch.linalg.vector_norm(found - gradient) <= 1e-6 * torch.linalg.vector_norm(gradient)


def test_a_zero_bias_on_the_output_layer_gets_its_gradient():
    model = make("llama")
    model.lm_head = nn.Linear(32, 40, bias=True, dtype=torch.float64)
    nn.init.zeros_(model.lm_head.bias)
    step_of(model, rows_of([12, 9]), False)
    assert model.lm_head.bias.grad.abs().sum() > 0
    assert "against plain autograd" in check_gradient(model)


class Detached(nn.Module):
    """An output layer with something that no weight and bias tell of."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.weight, self.extra = inner.weight, nn.Parameter(torch.zeros(40, dtype=inner.weight.dtype))

    def forward(self, hidden):
        return hidden @ self.weight.T + self.extra


def test_a_parameter_that_would_get_no_gradient_is_named():
    model = make("llama")
    model.lm_head = Detached(model.lm_head)
    check_model(model)  # the values are the same while it is zero
    with pytest.raises(UserError, match=r"lm_head\.extra would get a wrong gradient"):
        check_gradient(model)


def test_models_that_look_ahead_are_refused():
    with pytest.raises(UserError, match="tokens after it"):
        check_model(make("llama", is_causal=False))


@pytest.mark.parametrize(
    ("far", "follows", "said"),
    [(2e-4, False, ""), (2e-4, True, "depend on the rows beside it"), (2e-2, False, "depend on the rows beside it")],
)
def test_sums_in_another_order_are_not_taken_for_rows_that_see_each_other(far, follows, said, monkeypatch):
    """A batch of another shape gives other roundings: they are the same whatever the other rows hold."""
    whole = layers._hidden

    def off(model, token_ids):
        found = whole(model, token_ids)
        rows = found.flip(0) if follows else found
        return found + far * rows if len(found) > 1 else found

    monkeypatch.setattr(layers, "_hidden", off)
    true = layers.largest_difference
    monkeypatch.setattr(layers, "largest_difference", lambda a, b: 0.0 if a.shape[-1] == 40 else true(a, b))  # logits
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_model(make("llama", torch.float32))


class Adapter(nn.Module):
    """A low-rank adapter as peft injects it: a module in the place of a linear layer, with that layer inside."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.weight, self.bias = base, base.weight, base.bias
        self.delta = nn.Parameter(torch.randn_like(base.weight) * 0.3)

    def forward(self, x):
        return self.base_layer(x) + x @ self.delta.T


def test_adapters_take_part_in_sampling_also_where_they_come_after_the_first_sampling():
    model = make("llama", torch.float32)
    sampling = Sampling(max_tokens=12, temperature=0.0)
    prompts = [[3, 4, 5], [7, 8]]
    before = sample(model, prompts, [1, 2], sampling)
    assert is_plain_llama(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj)
    assert not is_plain_llama(model)
    after = sample(model, prompts, [1, 2], sampling)
    assert [r.token_ids for r in after] != [r.token_ids for r in before]
    for prompt, response in zip(prompts, after, strict=True):
        ids = torch.tensor([[*prompt, *response.token_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response.token_ids


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "lfm2", "granitemoehybrid", "gpt_oss"])
def test_recurrent_and_hybrid_models_are_sampled_as_a_plain_pass_says(kind):
    fields = {
        "mamba": {"state_size": 4},
        "falcon_mamba": {"state_size": 4},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "granitemoehybrid": {
            **MIXTURE,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 4,
        },
        "gpt_oss": {**SLIDING, **MIXTURE},
    }[kind]
    model = make(kind, torch.float32, **fields)
    prompts = [[3, 4, 5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [11, 12, 13]]
    responses = sample(model, prompts, [1, 2, 3, 4], Sampling(max_tokens=20, stop_ids=(1, 2, 3)))
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response.token_ids]])
        logp = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(response.logps), expected.detach(), rtol=1e-3, atol=1e-3)


def test_a_model_whose_cache_says_something_else_is_not_sampled(monkeypatch):
    model = make("gpt_oss", torch.float32, **SLIDING, **MIXTURE)
    forward = model.forward

    def cached_wrong(*args, past_key_values=None, **kwargs):
        output = forward(*args, past_key_values=past_key_values, **kwargs)
        return (
            output if past_key_values is None else type(output)(logits=output.logits + torch.randn_like(output.logits))
        )

    monkeypatch.setattr(model, "forward", cached_wrong)
    with pytest.raises(UserError, match="cannot sample"):
        choice_of(model)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Model(path="world:chain/rich"))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_neox", "deepseek_v3", "olmoe", "llama"])
def test_a_checkpoint_is_read_back_bit_by_bit(kind, tokenizer, tmp_path):
    fields = {
        "mixtral": MIXTURE,
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "deepseek_v3": {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    }.get(kind, {})
    model, other = make(kind, torch.float32, **fields), make(kind, torch.float32, **fields)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    write_checkpoint(tmp_path, 3, model, tokenizer, {}, {})
    load_weights(other, checkpoints(tmp_path)[0])
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_untied_model_does_not_take_a_checkpoint_without_its_output_layer(tokenizer, tmp_path):
    tied, untied = make("llama", torch.float32, tie_word_embeddings=True), make("llama", torch.float32)
    write_checkpoint(tmp_path, 3, tied, tokenizer, {}, {})
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        load_weights(untied, checkpoints(tmp_path)[0])


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.9, "do_sample": False},
        {"num_beams": 1, "length_penalty": 2.0},
    ],
    ids=["llama 2", "greedy", "beams"],
)
def test_a_generation_config_that_transformers_will_not_save_does_not_end_a_run(said, tokenizer, tmp_path):
    model = make("llama", torch.float32, vocab_size=len(tokenizer))
    save_model(model, tokenizer, tmp_path / "given")
    (tmp_path / "given" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], **said}))
    opened = load_model(Model(path=str(tmp_path / "given")), CPU).model
    opened.generation_config.eos_token_id = [1, 2, 3]
    save_model(opened, tokenizer, tmp_path / "published")
    kept = json.loads((tmp_path / "published" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [1, 2, 3]
    assert kept.get("temperature") == said.get("temperature") or "do_sample" not in kept


def test_a_tokenizer_beyond_the_embedding_is_refused_and_a_padded_vocabulary_is_fine(tokenizer, tmp_path):
    for rows in (len(tokenizer) - 1, len(tokenizer) + 9):
        save_model(make("llama", torch.float32, vocab_size=rows), tokenizer, tmp_path / str(rows))
    with pytest.raises(UserError, match="tokens that the model's embedding"):
        load_model(Model(path=str(tmp_path / str(len(tokenizer) - 1))), CPU)
    load_model(Model(path=str(tmp_path / str(len(tokenizer) + 9))), CPU)


@pytest.mark.parametrize(("kind", "fields"), [("llama", {"tie_word_embeddings": True}), ("mixtral", MIXTURE)])
def test_what_will_be_written_is_written_and_read_before_the_first_step(kind, fields, tokenizer):
    model = make(kind, torch.float32, **fields)
    before = copy.deepcopy(model.state_dict())
    assert "bit by bit" in check_files(model, tokenizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(tokenizer):
    model = make("llama", torch.float32)
    model.generation_config.temperature = 0.5  # as a file without do_sample says it
    model.generation_config.do_sample = False
    with pytest.raises(UserError, match="cannot be opened again"):
        check_files(model, tokenizer)


def test_noise_of_training_is_switched_off(tokenizer, tmp_path):
    model = make(
        "mixtral", torch.float32, vocab_size=len(tokenizer), router_jitter_noise=0.5, attention_dropout=0.3, **MIXTURE
    )
    save_model(model, tokenizer, tmp_path)
    config = load_model(Model(path=str(tmp_path)), CPU).model.config
    assert (config.router_jitter_noise, config.attention_dropout) == (0.0, 0.0)


def test_weights_that_transformers_would_draw_at_random_are_refused(tokenizer, tmp_path):
    model = make("llama", torch.float32, vocab_size=len(tokenizer))
    save_model(model, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight; they would be random"):
        load_model(Model(path=str(tmp_path)), CPU)


def test_a_model_that_is_opened_with_other_weights_than_its_file_holds_is_refused(tokenizer, tmp_path, monkeypatch):
    save_model(make("llama", torch.float32, vocab_size=len(tokenizer)), tokenizer, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained

    def changed(*args, **kwargs):
        model, said = opened(*args, **kwargs)
        nn.init.normal_(model.model.embed_tokens.weight)
        return model, said

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", changed)
    with pytest.raises(UserError, match=r"another model\.embed_tokens\.weight than"):
        load_model(Model(path=str(tmp_path)), CPU)


def test_a_row_beyond_the_context_is_refused_and_never_an_index_error():
    for kind in ("gpt2", "llama"):
        with pytest.raises(UserError, match="longer than the 32"):
            step_of(make(kind, max_position_embeddings=32), rows_of([40, 9]), False)
