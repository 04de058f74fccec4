"""The native sampler: right tokens, right log-probabilities, and a row that does not notice its neighbours."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.rollout.chi_square import chi_square
from thence.objective import Row, trained_tokens
from thence.rollout import choice, native
from thence.rollout import llama as llama_module
from thence.rollout.decoders import TransformersDecoder
from thence.rollout.llama import LlamaDecoder, is_plain_llama
from thence.rollout.native import Response, Sampling, sample
from thence.train.trainer import Trainer

VOCAB = 40
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama-bias": ("llama", {"num_key_value_heads": 2, "attention_bias": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "head_dim": 16}),
    "mistral": ("mistral", {"num_key_value_heads": 4, "sliding_window": None}),
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}
FAST = ("llama", "qwen2", "qwen3", "mistral")
STOPS = (1, 5, 9)


def make_model(family: str) -> Any:
    """A random float32 model whose norms and biases are random too: left out, they would go unnoticed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, extra = FAMILIES[family]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    sizes |= {} if kind == "gpt2" else {"intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | extra)), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


def mixed_prompts(count: int = 12, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts of 1 to 11 tokens, some of them repeated, and a seed each."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(1 + i % 11)] for i in range(count - count // 3)]
    prompts += [prompts[rng.randrange(len(prompts))] for _ in range(count // 3)]
    return prompts, [rng.getrandbits(62) for _ in prompts]


def tokens_of(responses: list[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


def trainer_logps(model: Any, prompts: list[list[int]], responses: list[Response], temperature: float) -> list[Any]:
    rows = [
        Row(
            torch.tensor(prompt + response.token_ids),
            trained_tokens(len(prompt), len(prompt) + len(response.token_ids)),
            torch.ones(1, len(response.token_ids)),
        )
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return [logp for logp, _ in Trainer(model, 1e-3).statistics(rows, temperature)]


def largest_difference(responses: list[Response], logps: list[Any]) -> float:
    pairs = zip(responses, logps, strict=True)
    return max(float((torch.tensor(response.logps) - logp).abs().max()) for response, logp in pairs)


def test_a_row_alone_is_the_row_in_a_batch(model: Any) -> None:
    prompts, seeds = mixed_prompts()
    sampling = Sampling(max_tokens=14, temperature=1.0, stop_ids=STOPS)
    together = sample(model, prompts, seeds, sampling)
    alone = [sample(model, [p], [s], sampling)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert tokens_of(together) == tokens_of(alone)
    assert [r.finish for r in together] == [r.finish for r in alone]
    assert largest_difference(together, [torch.tensor(r.logps) for r in alone]) < 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_are_the_trainers(model: Any, temperature: float) -> None:
    prompts, seeds = mixed_prompts()
    responses = sample(model, prompts, seeds, Sampling(max_tokens=14, temperature=temperature, stop_ids=STOPS))
    assert len({len(r.token_ids) for r in responses}) > 1
    assert largest_difference(responses, trainer_logps(model, prompts, responses, temperature)) < 1e-4


def test_log_probabilities_are_the_trainers_with_top_p_and_top_k(llama: Any) -> None:
    prompts, seeds = mixed_prompts()
    sampling = Sampling(max_tokens=14, temperature=0.9, top_p=0.7, top_k=8)
    responses = sample(llama, prompts, seeds, sampling)
    assert largest_difference(responses, trainer_logps(llama, prompts, responses, 0.9)) < 1e-4


def test_greedy_is_generate(model: Any) -> None:
    prompts, seeds = mixed_prompts()
    responses = sample(model, prompts, seeds, Sampling(max_tokens=12, temperature=0.0, stop_ids=STOPS))
    for prompt, response in zip(prompts, responses, strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        assert response.token_ids == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAST)
def test_the_fast_decoder_is_used_and_agrees_with_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    assert is_plain_llama(model)
    agrees_with_transformers(model, monkeypatch)


def test_attention_with_biases_agrees_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees_with_transformers(make_model("llama-bias"), monkeypatch)


def agrees_with_transformers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seeds = mixed_prompts(20)
    sampling = Sampling(max_tokens=20, temperature=1.0, stop_ids=STOPS)
    chosen = sample(model, prompts, seeds, sampling)
    monkeypatch.setattr(choice, "is_plain_llama", lambda _: False)
    slow = sample(model, prompts, seeds, sampling)
    assert tokens_of(chosen) == tokens_of(slow)
    assert largest_difference(chosen, [torch.tensor(r.logps) for r in slow]) < 1e-4


@pytest.mark.parametrize("family", FAST)
def test_without_a_c_compiler_the_responses_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    prompts, seeds = mixed_prompts(20)
    sampling = Sampling(max_tokens=20, temperature=1.0, stop_ids=STOPS)
    compiled = sample(model, prompts, seeds, sampling)
    monkeypatch.setattr(llama_module, "decode_kernels", lambda _: None)
    plain = sample(model, prompts, seeds, sampling)
    assert tokens_of(compiled) == tokens_of(plain)
    assert largest_difference(plain, trainer_logps(model, prompts, plain, 1.0)) < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "mistral-window"])
def test_what_the_fast_decoder_leaves_out_goes_through_transformers(family: str) -> None:
    assert not is_plain_llama(make_model(family))


def test_other_weights_than_float32_go_through_transformers(tiny_model: Any) -> None:
    model = tiny_model(torch.float64, "llama", 0)
    assert not is_plain_llama(model)
    prompts, seeds = mixed_prompts(6)
    responses = sample(model, prompts, seeds, Sampling(max_tokens=8))
    assert largest_difference(responses, trainer_logps(model, prompts, responses, 1.0)) < 1e-4


def test_sampling_sees_the_weights_as_they_are_now() -> None:
    model = make_model("llama")
    prompts, seeds = mixed_prompts()
    before = sample(model, prompts, seeds, Sampling(max_tokens=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = sample(model, prompts, seeds, Sampling(max_tokens=8))
    assert tokens_of(before) != tokens_of(after)
    assert largest_difference(after, trainer_logps(model, prompts, after, 1.0)) < 1e-4


@pytest.mark.parametrize("decoder", [LlamaDecoder, TransformersDecoder])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_waves_change_nothing(llama: Any, decoder: type, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_plain_llama", lambda _: decoder is LlamaDecoder)
    prompts, seeds = mixed_prompts()
    whole = sample(llama, prompts, seeds, Sampling(max_tokens=10, stop_ids=STOPS))
    assert tokens_of(sample(llama, prompts, seeds, Sampling(max_tokens=10, stop_ids=STOPS, rows=rows))) == tokens_of(
        whole
    )


@pytest.mark.parametrize("decoder", [LlamaDecoder, TransformersDecoder])
def test_retiring_rows_changes_nothing(llama: Any, decoder: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_plain_llama", lambda _: decoder is LlamaDecoder)
    held: list[int] = []
    keep = decoder.keep
    monkeypatch.setattr(decoder, "keep", lambda self, row_K: (held.append(len(row_K)), keep(self, row_K))[1])
    # longer than a block of random numbers, so that rows retire on both sides of its edge
    prompts, seeds = mixed_prompts(60)
    sampling = Sampling(max_tokens=native.DRAW_BLOCK + 10, temperature=1.0, stop_ids=(1,))
    found = {}
    for share in (0.0, native.RETIRE_SHARE, 2.0):
        monkeypatch.setattr(native, "RETIRE_SHARE", share)
        held.clear()
        found[share] = sample(llama, prompts, seeds, sampling)
        retired = min(held, default=len(prompts)) < len(prompts)
        assert retired == (share <= 1)
    assert tokens_of(found[0.0]) == tokens_of(found[0.125]) == tokens_of(found[2.0])
    lengths = [len(r.token_ids) for r in found[2.0]]
    assert min(lengths) < 10
    assert max(lengths) > native.DRAW_BLOCK


def test_the_block_of_random_numbers_changes_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seeds = mixed_prompts()
    sampling = Sampling(max_tokens=15, stop_ids=STOPS)
    whole = sample(llama, prompts, seeds, sampling)
    monkeypatch.setattr(native, "DRAW_BLOCK", 4)
    assert tokens_of(sample(llama, prompts, seeds, sampling)) == tokens_of(whole)


def test_the_stop_token_is_the_last_and_the_only_one(model: Any) -> None:
    prompts, seeds = mixed_prompts(30)
    sampling = Sampling(max_tokens=16, stop_ids=STOPS)
    responses = sample(model, prompts, seeds, sampling)
    assert {r.finish for r in responses} == {"stop", "length"}
    for response in responses:
        assert len(response.logps) == len(response.token_ids)
        assert not set(response.token_ids[:-1]) & set(STOPS)
        if response.finish == "stop":
            assert response.token_ids[-1] in STOPS
        else:
            assert response.token_ids[-1] not in STOPS
            assert len(response.token_ids) == 16


def test_a_stop_token_at_the_limit_counts_as_a_stop(llama: Any) -> None:
    prompts, seeds = mixed_prompts(30)
    free = sample(llama, prompts, seeds, Sampling(max_tokens=1))
    stop = free[0].token_ids[0]
    cut = sample(llama, prompts, seeds, Sampling(max_tokens=1, stop_ids=(stop,)))
    assert tokens_of(cut) == tokens_of(free)
    assert [r.finish for r in cut] == ["stop" if r.token_ids == [stop] else "length" for r in free]


@pytest.mark.parametrize("max_tokens", [1, 2, native.DRAW_BLOCK, native.DRAW_BLOCK + 1])
def test_without_stop_tokens_every_response_is_max_tokens_long(llama: Any, max_tokens: int) -> None:
    prompts, seeds = mixed_prompts(4)
    responses = sample(llama, prompts, seeds, Sampling(max_tokens=max_tokens))
    assert {(len(r.token_ids), len(r.logps), r.finish) for r in responses} == {(max_tokens, max_tokens, "length")}


def test_a_longer_limit_only_appends(llama: Any) -> None:
    prompts, seeds = mixed_prompts()
    short = sample(llama, prompts, seeds, Sampling(max_tokens=5))
    long = sample(llama, prompts, seeds, Sampling(max_tokens=12))
    assert tokens_of(short) == [r.token_ids[:5] for r in long]


def test_the_same_prompt_with_other_seeds_gives_other_responses(llama: Any) -> None:
    responses = sample(llama, [[3, 4]] * 50, list(range(50)), Sampling(max_tokens=8))
    assert len(set(map(tuple, tokens_of(responses)))) > 40


def test_sampled_tokens_follow_the_models_distribution(llama: Any) -> None:
    n, prompt, temperature = 6000, [3, 14, 15], 0.8
    responses = sample(llama, [prompt] * n, list(range(n)), Sampling(max_tokens=1, temperature=temperature, rows=n))
    with torch.no_grad():
        p_V = torch.softmax(llama(torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    counts_V = torch.bincount(torch.tensor(tokens_of(responses))[:, 0], minlength=VOCAB)
    assert chi_square(counts_V, p_V) < 90  # 39 degrees of freedom: exceeded once in 150,000


def test_a_wrong_call_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        sample(llama, [[1], [2]], [1], Sampling(max_tokens=1))
    with pytest.raises(ValueError, match="no token"):
        sample(llama, [[1], []], [1, 2], Sampling(max_tokens=1))
    assert sample(llama, [], [], Sampling(max_tokens=1)) == []


def test_a_response_with_a_limit_of_its_own_is_the_beginning_of_the_one_without() -> None:
    model, prompts, seeds = make_model("llama"), [[2, 3], [4], [2, 3], [7, 8, 2]], [11, 12, 13, 14]
    whole = sample(model, prompts, seeds, Sampling(9, stop_ids=(1,)))
    found = sample(model, prompts, seeds, Sampling(9, stop_ids=(1,)), [5, 1, 3, 9])
    for limit, short, long in zip((5, 1, 3, 9), found, whole, strict=True):
        assert short.token_ids == long.token_ids[:limit] and short.logps == pytest.approx(long.logps[:limit], abs=1e-5)
        assert short.finish == ("stop" if short.token_ids[-1] == 1 else "length")
