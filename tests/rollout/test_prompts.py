"""Prompts of different lengths that are read at once, padded or end to end: neither is seen in the responses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.rollout.test_sampler import FAST, STOPS, largest_difference, make_model, mixed_prompts, trainer_logps
from thence.kernels import attention
from thence.rollout import choice, llama
from thence.rollout.decoders import TransformersDecoder
from thence.rollout.llama import LlamaDecoder
from thence.rollout.native import Sampling, sample
from thence.rollout.prompts import Packed, Padded, packed, padded

UNEVEN = [[7, 3, 2, 9, 4], [6], [5, 8, 1, 1, 2, 3, 9], [4, 4]]


def test_both_ways_have_each_token_at_its_place() -> None:
    device = torch.device("cpu")
    one, other = padded(UNEVEN, device), packed(UNEVEN, device)
    assert isinstance(one, Padded) and isinstance(other, Packed)
    assert one.token_ids.shape == (4, 7) and other.token_ids.shape == (1, 15)
    assert one.padding_U.tolist() == other.padding_U.tolist() == [2, 6, 0, 5]
    for layout in (one, other):
        last = layout.token_ids.flatten()[layout.last_U], layout.position.flatten()[layout.last_U]
        assert last[0].tolist() == [row[-1] for row in UNEVEN]
        assert last[1].tolist() == [len(row) - 1 for row in UNEVEN]
        held = layout.columns(layout.token_ids[:, None, :, None].float())[:, 0, :, 0]
        assert held.shape == (4, 7)
        assert [held[u, 7 - len(row) :].tolist() for u, row in enumerate(UNEVEN)] == UNEVEN


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", FAST)
def test_without_padding_the_logits_are_those_with_it(
    family: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(llama, "decode_kernels", lambda _: None)
        monkeypatch.setattr(attention, "_library", lambda _: None)
    model, repeat_U, found = make_model(family), torch.tensor([2, 1, 3, 1]), {}
    with torch.no_grad():
        for pack_from in (math.inf, 0.0):
            decoder = LlamaDecoder(model, pack_from)
            logits = [decoder.prefill(UNEVEN, repeat_U, 4)]
            logits += [decoder.step(torch.arange(7) + t) for t in range(2)]
            decoder.keep(torch.tensor([1, 2, 5]))
            found[pack_from] = torch.cat([*logits, decoder.step(torch.tensor([3, 4, 5]))])
        alone = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in UNEVEN])
    torch.testing.assert_close(found[0.0], found[math.inf], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0.0][:7], alone.repeat_interleave(repeat_U, 0), rtol=1e-4, atol=1e-5)


def test_prompts_are_read_without_padding_where_it_would_cost_time() -> None:
    decoder, even = LlamaDecoder(make_model("llama")), [[1, 2], [3, 4]]
    per_token = 2 * decoder.parameters
    assert isinstance(decoder._layout(UNEVEN), Padded)
    decoder.pack_from = 13 * per_token  # as many tokens of padding as there are
    assert isinstance(decoder._layout(UNEVEN), Packed)
    decoder.pack_from += 1
    assert isinstance(decoder._layout(UNEVEN), Padded)
    decoder.pack_from = 0.0
    assert isinstance(decoder._layout(even), Padded)


def test_responses_to_prompts_without_padding_are_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = make_model("llama"), []
    monkeypatch.setattr(LlamaDecoder.__init__, "__defaults__", (0.0,))
    own = Packed.attend
    monkeypatch.setattr(Packed, "attend", lambda self, *qkv: (read.append(len(self.lengths)), own(self, *qkv))[1])
    prompts, seeds = mixed_prompts(20)
    responses = sample(model, prompts, seeds, Sampling(max_tokens=20, stop_ids=STOPS))
    assert max(read) > 10
    assert largest_difference(responses, trainer_logps(model, prompts, responses, 1.0)) < 1e-4


@pytest.mark.parametrize("spoiled", [lambda v: v.roll(1, 2), lambda v: v * float("nan")])
@pytest.mark.parametrize("way", [Padded, Packed])
def test_a_way_of_reading_that_is_wrong_is_found_before_it_is_used(
    way: Any, spoiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = way.attend
    monkeypatch.setattr(way, "attend", lambda self, q, k, v: own(self, q, k, spoiled(v)))
    assert choice.choice_of(make_model("llama")).decoder is TransformersDecoder
