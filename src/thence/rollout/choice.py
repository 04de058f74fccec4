"""Which decoder samples from a model: the first that gives the log-probabilities of a plain forward pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thence.errors import UserError, first_line
from thence.models.probing import largest_difference, probe_tokens, short_windows, tolerance
from thence.rollout.decoders import Decoder, TransformersDecoder, without_autocast
from thence.rollout.llama import LlamaDecoder, is_plain_llama

PROMPTS = (5, 12, 12, 3)  # tokens of the prompts of the check
REPEATS = (2, 1, 2, 1)
STEPS = 6  # tokens of every response; after two of them half of the rows are dropped


@dataclass(frozen=True)
class Choice:
    """How a model is sampled from.

    Args:
        decoder: llama: :class:`~thence.rollout.llama.LlamaDecoder`; transformers: any model's own cache.
        pads: prompts of different lengths can be read together.
    """

    decoder: type[LlamaDecoder] | type[TransformersDecoder]
    pads: bool

    def make(self, model: Any) -> Decoder:
        """A decoder with an empty cache."""
        return self.decoder(model)

    def ways(self, model: Any) -> Iterator[Decoder]:
        """The decoder in every way in which it reads prompts: padded, then without padding."""
        decoder = self.make(model)
        if isinstance(decoder, LlamaDecoder):
            decoder.pack_from = math.inf
            yield decoder
            decoder.pack_from = 0.0
        yield decoder


_choices: weakref.WeakKeyDictionary[nn.Module, dict[bool, Choice | UserError]] = weakref.WeakKeyDictionary()


def choice_of(model: Any) -> Choice:
    """How this model is sampled from; found by trying, once for every model (again where it was given adapters).

    Raises:
        UserError: no decoder gives what a plain forward pass gives.
    """
    known, plain = _choices.setdefault(model, {}), is_plain_llama(model)
    if plain not in known:
        try:
            known[plain] = _found(model, plain)
        except UserError as error:
            known[plain] = error
    found = known[plain]
    if isinstance(found, UserError):
        raise found
    return found


@torch.no_grad()
def _found(model: Any, plain: bool) -> Choice:
    candidates = [Choice(LlamaDecoder, True)] if plain else []
    reasons = []
    with short_windows(model), without_autocast(next(model.parameters()).device):
        for choice in (*candidates, Choice(TransformersDecoder, True), Choice(TransformersDecoder, False)):
            try:
                differences = [_difference(model, decoder, choice.pads) for decoder in choice.ways(model)]
            except Exception as error:  # any error of a model's own code means: not this decoder
                reasons.append(first_line(error))
                continue
            most = 10 * tolerance(torch.float32, next(model.parameters()).device)
            wrong = [difference for difference in differences if not difference <= most]  # NaN is wrong too
            if not wrong:
                return choice
            reasons.append(f"log-probabilities are off by {wrong[0]:.1g}")
    raise UserError(
        f"thence cannot sample from {type(model).__name__}: {reasons[-1]}",
        remedy="use it for SFT only, or sample with vLLM (rl.engine, --backend vllm)",
    )


def _difference(model: Any, decoder: Decoder, pads: bool) -> float:
    """The largest relative difference of the logits that a decoder gives from those of every row read alone.

    Args:
        pads: whether prompts of different lengths are read together.
    """
    prompts = [row.tolist() for row in probe_tokens(model, sum(PROMPTS)).split(PROMPTS)]
    if not pads:
        kept = [(p, r) for p, r in zip(prompts, REPEATS, strict=True) if len(p) == max(PROMPTS)]
        prompts, repeats = [p for p, _ in kept], [r for _, r in kept]
    else:
        prompts, repeats = prompts, list(REPEATS)
    rows = [list(p) for p, times in zip(prompts, repeats, strict=True) for _ in range(times)]
    live, found = list(range(len(rows))), []
    logits_BV = decoder.prefill(prompts, torch.tensor(repeats), STEPS)
    for t in range(STEPS):
        found += [(i, len(rows[i]) - 1, logits_BV[b]) for b, i in enumerate(live)]
        token_B = (torch.arange(len(live), device=logits_BV.device) * 31 + 17 * t + 1) % logits_BV.shape[1]
        if t == 1:
            keep_K = torch.arange(0, len(live), 2, device=logits_BV.device)
            decoder.keep(keep_K)
            live, token_B = [live[b] for b in keep_K.tolist()], token_B[keep_K]
        for i, token in zip(live, token_B.tolist(), strict=True):
            rows[i].append(token)
        logits_BV = decoder.step(token_B)
    alone = [model(input_ids=torch.tensor([row], device=logits_BV.device), use_cache=False).logits[0] for row in rows]
    expected = torch.stack([alone[i][position] for i, position, _ in found])
    return largest_difference(torch.stack([logits_V for *_, logits_V in found]), expected)
