"""vLLM itself, where there is one: log-probabilities, pushed weights, limits and a sudden end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from thence.errors import UserError
from thence.objective.kl import kl_estimate
from thence.rollout.native import Sampling, sample
from thence.rollout.vllm import chunks
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import PYTHON_VARIABLE, VllmSettings


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmEngine, Any]]:
    """vLLM with a random Llama whose output layer is tied to its embedding, and the same model here."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(f"set {PYTHON_VARIABLE} to the Python of an environment with vLLM")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
    config = LlamaConfig(
        vocab_size=512, intermediate_size=128, initializer_range=0.2, tie_word_embeddings=True, **sizes
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("real")
    model.save_pretrained(folder)
    with VllmEngine(VllmSettings(kv_cache_gb=0.25, max_rows=32, threads=1), folder) as engine:
        yield engine, model


PROMPTS = [[5, 9, 400, 17], [5, 9, 400, 17], [33, 2, 250, 8, 90, 77, 61], [7]]


def trainer_logps(model: Any, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def check_log_probabilities(engine: VllmEngine, model: Any, sampling: Sampling) -> None:
    for prompt, response in zip(PROMPTS, engine.sample(PROMPTS, [1, 2, 3, 4], sampling), strict=True):
        theirs = torch.tensor(response.logps).double()
        ours = trainer_logps(model, prompt, response.token_ids, sampling.temperature)
        assert float((theirs - ours).abs().max()) < 1e-3
        assert float(kl_estimate(theirs, ours).mean()) < 1e-6


@pytest.mark.vllm
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24),
        Sampling(24, temperature=0.6),
        Sampling(24, temperature=0.6, top_p=0.8),
        Sampling(24, temperature=1.3, top_k=5),
        Sampling(24, temperature=0.0),
    ],
    ids=str,
)
def test_vllm_reports_the_log_probabilities_that_the_trainer_computes(
    real: tuple[VllmEngine, Any], sampling: Sampling
) -> None:
    engine, model = real
    engine.push_weights(model, 0)
    check_log_probabilities(engine, model, sampling)


@pytest.mark.vllm
def test_vllm_s_greedy_responses_are_the_native_sampler_s(real: tuple[VllmEngine, Any]) -> None:
    engine, model = real
    engine.push_weights(model, 0)
    greedy = Sampling(24, temperature=0.0)
    ours = sample(model, PROMPTS, [0] * 4, greedy)
    stop = (ours[0].token_ids[3], ours[2].token_ids[5])
    for stops in ((), stop):
        sampling = Sampling(24, temperature=0.0, stop_ids=stops)
        native = sample(model, PROMPTS, [0] * 4, sampling)
        theirs = engine.sample(PROMPTS, [0] * 4, sampling)
        assert [(r.token_ids, r.finish) for r in theirs] == [(r.token_ids, r.finish) for r in native]


@pytest.mark.vllm
def test_vllm_repeats_a_seed_and_ends_at_its_context(real: tuple[VllmEngine, Any]) -> None:
    engine, _ = real
    first, again = (engine.sample(PROMPTS, [1, 2, 3, 4], Sampling(16)) for _ in range(2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert first[0].token_ids != first[1].token_ids
    assert engine.max_model_len == 256
    (cut,) = engine.sample([[5] * 250], [1], Sampling(32))
    assert len(cut.token_ids) == 6 and cut.finish == "length"


@pytest.mark.vllm
def test_vllm_takes_more_prompt_tokens_than_it_reads_at_once(real: tuple[VllmEngine, Any]) -> None:
    engine, model = real
    engine.push_weights(model, 0)
    prompts = [[(7 * i + 11 * j) % 500 + 2 for j in range(200)] for i in range(40)]
    found = engine.sample(prompts, range(40), Sampling(8))
    again = engine.sample(prompts, range(40), Sampling(8))
    assert [r.token_ids for r in found] == [r.token_ids for r in again]
    for prompt, response in zip(prompts, found, strict=True):
        ours = trainer_logps(model, prompt, response.token_ids, 1.0)
        assert float((torch.tensor(response.logps).double() - ours).abs().max()) < 1e-3


@pytest.mark.vllm
@pytest.mark.parametrize("part", ["embed_tokens", "self_attn", "mlp", "norm"])
def test_vllm_samples_with_the_weights_that_were_pushed(real: tuple[VllmEngine, Any], part: str) -> None:
    engine, model = real
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if part in name:
                    weight.mul_(1.3)
        engine.push_weights(model, 2)
        assert engine.last_push is not None and engine.last_push.probe_difference < 1e-3
        check_log_probabilities(engine, model, Sampling(16))
    finally:
        model.load_state_dict(before)


@pytest.mark.vllm
def test_vllm_without_room_for_its_cache_is_an_error_with_a_remedy(
    real: tuple[VllmEngine, Any], tmp_path: Path
) -> None:
    _, model = real
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"remedy: the cache for keys and values is too small"):
        VllmEngine(VllmSettings(kv_cache_gb=0.00001, threads=1), tmp_path)


@pytest.fixture(scope="module")
def chunked(real: tuple[VllmEngine, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """The same model in a vLLM that takes weights in chunks. The last test of this file kills it."""
    folder = tmp_path_factory.mktemp("chunked")
    real[1].save_pretrained(folder)
    with VllmEngine(VllmSettings(kv_cache_gb=0.25, threads=1, transfer="ipc"), folder) as engine:
        yield engine


@pytest.mark.vllm
def test_vllm_samples_with_weights_that_came_in_chunks(
    real: tuple[VllmEngine, Any], chunked: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks end within layers, even between matrices that vLLM joins; the output layer is tied to the embedding."""
    _, model = real
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20_000)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        for version in (1, 2):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.1)
            chunked.push_weights(model, version)
            assert chunked.last_push is not None and chunked.last_push.probe_difference < 1e-3
            check_log_probabilities(chunked, model, Sampling(16))
    finally:
        model.load_state_dict(before)


@pytest.mark.vllm
def test_vllm_killed_in_the_middle_is_an_error_with_a_remedy(chunked: VllmEngine) -> None:
    stream = chunked.stream([[5]] * 4, range(4), Sampling(200), limits=[2, 200, 200, 200])
    next(stream)
    assert chunked._link.pid is not None
    os.kill(chunked._link.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"SIGKILL(.|\n)*run the same command again"):
        list(stream)
