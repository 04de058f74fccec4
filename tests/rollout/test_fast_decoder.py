"""The decoder of the Llama family, and what could make it wrong: autocast, hooks, other weights, unknown tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.rollout.test_sampler import (
    STOPS,
    VOCAB,
    largest_difference,
    make_model,
    mixed_prompts,
    tokens_of,
    trainer_logps,
)
from thence.kernels.decode import WholeStep, decode_kernels
from thence.rollout import choice
from thence.rollout import llama as llama_module
from thence.rollout.llama import LlamaDecoder
from thence.rollout.native import Sampling, sample, stream


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_step_in_one_function_gives_the_responses_of_torchs_products(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decode_kernels(8) is None:
        pytest.skip("no C compiler")
    model, used = make_model(family), []
    choice.choice_of(model)  # which tries both ways of reading prompts
    prompts, seeds = mixed_prompts(90)
    sampling = Sampling(max_tokens=20, temperature=1.0, stop_ids=STOPS)
    call = WholeStep.__call__
    monkeypatch.setattr(WholeStep, "__call__", lambda *arguments: used.append(1) or call(*arguments))
    whole = sample(model, prompts, seeds, sampling)
    steps = len(used)
    assert steps == max(len(r.token_ids) for r in whole) - 1
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    monkeypatch.setattr(llama_module, "WHOLE_STEP", weights)  # less than with the embedding and the output layer
    by_torch = sample(model, prompts, seeds, sampling)
    assert len(used) == steps
    assert tokens_of(whole) == tokens_of(by_torch)
    assert largest_difference(whole, [torch.tensor(r.logps) for r in by_torch]) < 1e-4


@pytest.mark.parametrize("compiled", [True, False])
def test_autocast_changes_nothing_of_a_fast_decoder(
    llama: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once gave a kernel numbers of half the size, and C wrote beyond them."""
    if not compiled:
        monkeypatch.setattr(llama_module, "decode_kernels", lambda _: None)
    prompts, seeds = mixed_prompts(20)
    sampling = Sampling(max_tokens=20, temperature=1.0, stop_ids=STOPS)
    for weights in (llama_module.WHOLE_STEP, 0):
        monkeypatch.setattr(llama_module, "WHOLE_STEP", weights)
        plain = sample(llama, prompts, seeds, sampling)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sample(llama, prompts, seeds, sampling) == plain
            assert torch.is_autocast_enabled("cpu")
            assert sample(make_model("llama"), prompts, seeds, sampling) == plain  # chosen within autocast


def test_weights_that_get_other_storage_while_rows_are_sampled_are_those_of_its_beginning() -> None:
    model, prompts = make_model("llama"), [[1, 2, 3]] * 8
    sampling = Sampling(max_tokens=40, stop_ids=STOPS)
    expected = sample(model, prompts, range(8), sampling)
    streamed = stream(model, prompts, range(8), sampling)
    found = dict([next(streamed)])
    model.double()
    _rest = [torch.full((VOCAB, 32), 9.0) for _ in range(200)]  # whatever takes the place of freed weights
    found |= dict(streamed)
    assert [found[i] for i in range(8)] == expected


@pytest.mark.parametrize("compiled", [True, False])
def test_what_has_no_place_is_refused_and_never_read(
    llama: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(llama_module, "decode_kernels", lambda _: None)
    with torch.no_grad():
        decoder = LlamaDecoder(llama)
        decoder.prefill([[1, 2, 3]], torch.tensor([4]), 2)
        spread = torch.arange(8)[::2]
        first = decoder.step(spread)
        with pytest.raises(IndexError):
            decoder.step(torch.full((4,), VOCAB))
        other = LlamaDecoder(llama)
        other.prefill([[1, 2, 3]], torch.tensor([4]), 2)
        assert torch.equal(other.step(spread.contiguous()), first)
        other.step(spread)
        with pytest.raises(IndexError, match="room for 5 tokens"):
            other.step(spread)


@pytest.mark.parametrize("part", ["", "model", "model.embed_tokens", "model.norm", "lm_head"])
def test_a_hook_outside_of_the_layers_is_heard_after_the_check(part: str) -> None:
    model = make_model("llama")
    prompts, seeds = mixed_prompts(6)
    before = sample(model, prompts, seeds, Sampling(max_tokens=8))

    def changed(module: Any, given: Any, out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            return 3 * out
        name = "logits" if "logits" in out else "last_hidden_state"
        out[name] = 3 * out[name]
        return out

    model.get_submodule(part).register_forward_hook(changed)
    responses = sample(model, prompts, seeds, Sampling(max_tokens=8))
    if part != "model.embed_tokens":  # the first norm takes its size away, but for its eps
        assert tokens_of(responses) != tokens_of(before)
    rows = [torch.tensor([[*p, *r.token_ids]]) for p, r in zip(prompts, responses, strict=True)]
    with torch.no_grad():  # plainly: the trainer refuses a model whose hook changes its logits
        logps = [model(input_ids=row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0] for row in rows]
    expected = [own[-len(r.token_ids) :] for own, r in zip(logps, responses, strict=True)]
    assert largest_difference(responses, expected) < 1e-4


@pytest.mark.parametrize("what", ["hook", "forward"])
def test_a_layer_that_is_changed_after_the_check_is_heard(what: str) -> None:
    model = make_model("llama")
    prompts, seeds = mixed_prompts(6)
    before = sample(model, prompts, seeds, Sampling(max_tokens=8))
    mlp = model.model.layers[0].mlp
    if what == "hook":
        mlp.register_forward_hook(lambda module, given, out: 3 * out)
    else:
        own = mlp.forward
        mlp.forward = lambda x: 3 * own(x)
    responses = sample(model, prompts, seeds, Sampling(max_tokens=8))
    assert tokens_of(responses) != tokens_of(before)
    assert largest_difference(responses, trainer_logps(model, prompts, responses, 1.0)) < 1e-4
