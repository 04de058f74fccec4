"""What training relies on is tried on the model at hand: wrong models are refused, right ones are left as they were."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.methods.base import make_rows
from thence.models.layers import check_model
from thence.models.packing import way_of
from thence.objective import Batch, Logp, Normaliser, Term, local_counts
from thence.recipe import Model
from thence.rollout.choice import choice_of
from thence.rollout.llama import is_plain_llama
from thence.rollout.native import Sampling, sample
from thence.train.checkpoint import checkpoints, load_weights, write_checkpoint
from thence.train.model import load_model, load_tokenizer, save_model
from thence.train.probe import check_files, check_gradient
from thence.train.step import StepSettings, accumulate_gradients

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
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
CPU = torch.device("cpu")


def make(kind: str, dtype: torch.dtype = torch.float64, **fields) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **fields}), dtype=dtype).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "bias")):
            nn.init.normal_(parameter, std=0.5)
    return model


SFT = Term("sft", Logp(), Normaliser("tokens"))


def rows_of(lengths, vocabulary: int = 40):
    generator = torch.Generator().manual_seed(1)
    trajectories = [
        Trajectory(Prompt(i, tuple(ids[:3])), tuple(ids[3:]))
        for i, n in enumerate(lengths)
        for ids in [torch.randint(1, vocabulary, (n,), generator=generator).tolist()]
    ]
    return make_rows([SFT], trajectories, [{"sft": 1.0 + i} for i in range(len(trajectories))])


def step_of(model, rows, packing):
    batch = Batch((SFT,), tuple(rows))
    settings = StepSettings(100, packing, 0.0, next(model.parameters()).dtype)
    loss = accumulate_gradients(model, torch.optim.SGD(model.parameters()), batch, local_counts(batch), settings).loss
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), found


def plain(model, rows):
    """Loss and gradient by the model's own logits, one row at a time."""
    model.zero_grad()
    total = 0.0
    trained = sum(row.n_trained for row in rows)
    for row in rows:
        logp = model(input_ids=row.token_ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        taken = logp.gather(1, row.token_ids[1:, None])[:, 0][row.trained[1:]]
        loss = -(taken * row.weights[0]).sum() / trained
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


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


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rows_whose_angles_would_follow_from_their_neighbours_are_refused(rope):
    table = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if rope == "longrope":
        table |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = make("llama", rope_parameters=table)
    step_of(model, rows_of([30, 9]), False)
    with pytest.raises(UserError, match="longer than the 32"):
        step_of(model, rows_of([40, 9]), False)
