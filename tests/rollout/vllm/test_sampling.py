"""What the engine samples from a stand-in for vLLM, and what it refuses to sample."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.rollout.vllm.stand_in import Make, Unigram, expected_logps
from thence.errors import UserError
from thence.rollout.native import Sampling
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import CHILD


def test_responses_come_in_the_order_of_their_prompts_with_the_log_probabilities_of_the_model(
    fake: Make, folder: Path
) -> None:
    prompts = [[1], [1, 2, 3], [1], [4, 5]]
    with VllmEngine(fake(max_rows=1), folder) as engine:
        for temperature in (1.0, 0.5):
            sampling = Sampling(8, temperature, stop_ids=(0,))
            found = engine.sample(prompts, [3, 4, 5, 6], sampling)
            alone = [engine.sample([p], [s], sampling)[0] for p, s in zip(prompts, [3, 4, 5, 6], strict=True)]
            assert found == alone
            logps = expected_logps(Unigram(), temperature)
            for response in found:
                assert response.logps == pytest.approx(logps[response.token_ids].tolist(), abs=1e-5)
                assert response.finish == ("stop" if response.token_ids[-1] == 0 else "length")
                assert len(response.token_ids) == 8 or response.finish == "stop"
        assert {len(r.token_ids) for r in engine.sample(prompts, range(4), Sampling(3))} == {3}
        assert engine.sample([], [], Sampling(3)) == []


@pytest.mark.parametrize("taken", [1, 2])
def test_a_response_is_given_as_soon_as_it_ends_and_leaving_early_stops_the_rest(
    fake: Make, folder: Path, taken: int
) -> None:
    with VllmEngine(fake("slow", max_rows=4), folder) as engine:
        start = time.monotonic()
        stream = engine.stream([[1], [2], [3]], [1, 2, 3], Sampling(2000), limits=[1500, 4, 2])
        assert [next(stream)[0] for _ in range(taken)] == [2, 1][:taken]
        stream.close()
        # 1500 tokens would take 30 s; what is left of them must not reach the next request
        assert [len(r.token_ids) for r in engine.sample([[1], [2]], [1, 2], Sampling(3))] == [3, 3]
        assert time.monotonic() - start < 8


def test_every_response_has_its_own_limit_where_they_are_given(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder) as engine:
        found = engine.sample([[1], [2], [3]], [1, 2, 3], Sampling(9), [5, 1, 3])
        assert [(len(r.token_ids), r.finish) for r in found] == [(5, "length"), (1, "length"), (3, "length")]


def test_log_probabilities_can_be_left_out(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder) as engine:
        ((_, response),) = engine.stream([[1]], [1], Sampling(3), logps=False)
        assert len(response.token_ids) == 3 and response.logps == []


def test_what_cannot_be_sampled_is_refused_before_vllm_hears_of_it(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(max_model_len=16), folder) as engine:
        assert engine.max_model_len == 16
        with pytest.raises(UserError, match=r"16 tokens, and vLLM was started for 16(.|\n)*max_model_len"):
            engine.sample([[1] * 16], [0], Sampling(4))
        with pytest.raises(ValueError, match="no token"):
            engine.sample([[]], [0], Sampling(4))
        with pytest.raises(ValueError, match="2 seeds"):
            engine.sample([[1]], [0, 1], Sampling(4))
        assert len(engine.sample([[1] * 15], [0], Sampling(4))) == 1


def test_the_whole_softmax_is_reported_under_top_p_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHILD.parent))
    child = importlib.import_module("child")
    kept: list[Any] = []

    def renormalised(logits: torch.Tensor, generators: Any, k: Any, p: Any) -> tuple[torch.Tensor, torch.Tensor]:
        kept.append((k, p))
        logits[:, 1:] = -math.inf  # in place, as vLLM does
        return logits.argmax(-1), logits.log_softmax(-1)

    sampler = SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=renormalised))
    child._report_whole_softmax(sampler, torch)
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    token, logps = sampler.topk_topp_sampler.forward(logits.clone(), {}, None, torch.tensor([0.5]))
    assert token.tolist() == [0] and kept == [(None, torch.tensor([0.5]))]
    torch.testing.assert_close(logps, torch.log_softmax(logits, -1))
    # with nothing cut off vLLM's own numbers are right, and are left alone
    assert sampler.topk_topp_sampler.forward(logits.clone(), {}, None, None)[1].tolist() == [
        [0.0, -math.inf, -math.inf]
    ]
