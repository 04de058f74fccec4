"""Sampling responses with the trainer's own weights: batched, with a key-value cache, reproducible row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from thence.errors import UserError
from thence.rollout.choice import choice_of
from thence.rollout.decoders import Decoder
from thence.rollout.draws import draw, uniforms

DRAW_BLOCK = 64  # positions whose random numbers are made at once
RETIRE_SHARE = 0.125  # of the rows held: so many must have ended before the cache is made smaller


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_tokens: longest response.
        temperature: 0 is greedy.
        top_p: nucleus; 1: off.
        top_k: 0: off.
        stop_ids: tokens that end a response; the one that ended it is part of the response.
        rows: most responses sampled in parallel.

    Raises:
        UserError: a value that cannot be sampled with, NaN among them.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    rows: int = 512

    def __post_init__(self) -> None:
        wrong = {
            "max_tokens": ("1 or more", self.max_tokens >= 1),
            "temperature": ("0 (greedy) or more, and finite", 0 <= self.temperature < math.inf),
            "top_p": ("above 0, and 1 at most; 1 is off", 0 < self.top_p <= 1),
            "top_k": ("0 (off) or more", self.top_k >= 0),
            "rows": ("1 or more", self.rows >= 1),
        }
        for name, (wanted, holds) in wrong.items():
            if not holds:
                raise UserError(
                    f"{name} = {getattr(self, name)} cannot be sampled with", remedy=f"give {wanted}", field=name
                )


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Args:
        token_ids: with the end token, if it came.
        logps: log-probability of each token at the sampling temperature, nats.
        finish: ``stop``: an end token came; ``length``: it was cut at ``max_tokens``.
    """

    token_ids: list[int]
    logps: list[float]
    finish: Literal["stop", "length"]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    limits: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
) -> list[Response]:
    """Sample one response for every prompt.

    Args:
        model: a Hugging Face causal language model.
        prompts: token ids, at least one token each; repeated prompts are read once.
        seeds: one a prompt. The same prompt, seed and weights give the same tokens in any batch
            (up to the last bits of floating-point sums).
        limits: longest response of each prompt, from 1, instead of ``sampling.max_tokens`` for all.
        starts: how many of a prompt's last tokens are the beginning of its response, sampled before with the same seed:
            the random numbers go on after theirs, so that a response in pieces is the one that a single call gives.

    Returns:
        The responses in the order of the prompts.

    Raises:
        UserError: the model cannot be sampled from (:func:`~thence.rollout.choice.choice_of`), or its logits are NaN.
    """
    found = dict(stream(model, prompts, seeds, sampling, limits, starts))
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def stream(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    limits: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
) -> Iterator[tuple[int, Response]]:
    """As :func:`sample`, but every response with its place among the prompts as soon as it ends.

    Raises:
        ValueError: a prompt without tokens, or not one seed, limit or start a prompt.
    """
    most = [sampling.max_tokens] * len(prompts) if limits is None else limits
    begun = [0] * len(prompts) if starts is None else starts
    if not len(prompts) == len(seeds) == len(most) == len(begun):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds, {len(most)} limits and {len(begun)} starts")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no token; give it at least a beginning token")
    # Rows of one length need no padding and the same prompt is read once: sort by length, then by content.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), list(prompts[i]), i))
    choice = choice_of(model)
    for wave in _waves(order, None if choice.pads else [len(prompt) for prompt in prompts], sampling.rows):
        own_prompts, own_seeds = [list(prompts[i]) for i in wave], [seeds[i] for i in wave]
        own, at = [most[i] for i in wave], [begun[i] for i in wave]
        for row, response in _sample_wave(choice.make(model), own_prompts, own_seeds, sampling, own, at):
            yield wave[row], response


def _waves(order: list[int], lengths: list[int] | None, rows: int) -> Iterator[list[int]]:
    """Prompts that are sampled in parallel: at most ``rows``, and of one length where ``lengths`` are given."""
    wave: list[int] = []
    for i in order:
        if wave and (len(wave) == rows or (lengths is not None and lengths[i] != lengths[wave[0]])):
            yield wave
            wave = []
        wave.append(i)
    if wave:
        yield wave


@torch.no_grad()
def _sample_wave(
    decoder: Decoder,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: Sampling,
    limits: list[int],
    starts: list[int],
) -> Iterator[tuple[int, Response]]:
    unique, repeats = _runs(prompts)
    longest = max(limits)
    logits_BV = decoder.prefill(unique, torch.tensor(repeats), longest)
    device, n = logits_BV.device, len(prompts)
    token_NT = torch.zeros(n, longest, dtype=torch.int64, device=device)
    logp_NT = torch.zeros(n, longest, device=device)
    stopped_N = torch.zeros(n, dtype=torch.bool, device=device)
    stop_S = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
    row_B = torch.arange(n, device=device)  # which response each row of the decoder is
    seed_N = torch.tensor(seeds, dtype=torch.int64, device=device)
    start_N = torch.tensor(starts, dtype=torch.int64, device=device)
    uniform_BC = uniforms(seed_N, start_N, DRAW_BLOCK)
    due_at = {limit: [i for i, own in enumerate(limits) if own == limit] for limit in set(limits)}
    for t in range(longest):
        if t % DRAW_BLOCK == 0 and t:
            uniform_BC = uniforms(seed_N[row_B], start_N[row_B] + t, DRAW_BLOCK)
        token_B, logp_B = draw(
            logits_BV, uniform_BC[:, t % DRAW_BLOCK], sampling.temperature, sampling.top_p, sampling.top_k
        )
        token_NT[row_B, t], logp_NT[row_B, t] = token_B, logp_B
        if torch.isnan(logp_B[~stopped_N[row_B]]).any():
            raise UserError(
                f"the model cannot be sampled from: at token {t + 1} of a response its logits are not finite",
                remedy="its weights or activations overflowed: train with a lower learning rate, or give another model",
            )
        if len(stop_S):
            ends_B = torch.isin(token_B, stop_S) & ~stopped_N[row_B]
            ended = row_B[ends_B]
            stopped_N[ended] = True
            yield from _responses(ended, token_NT[ended, : t + 1], logp_NT[ended, : t + 1], "stop")
        if t + 1 in due_at:
            due = torch.tensor(due_at[t + 1], device=device)
            cut = due[~stopped_N[due]]
            stopped_N[cut] = True
            yield from _responses(cut, token_NT[cut, : t + 1], logp_NT[cut, : t + 1], "length")
        live_K = (~stopped_N[row_B]).nonzero()[:, 0]
        if not len(live_K):
            break
        if len(live_K) <= (1 - RETIRE_SHARE) * len(row_B):
            decoder.keep(live_K)
            row_B, token_B, uniform_BC = row_B[live_K], token_B[live_K], uniform_BC[live_K]
        logits_BV = decoder.step(token_B)


def _responses(
    rows: Tensor, token_NT: Tensor, logp_NT: Tensor, finish: Literal["stop", "length"]
) -> Iterator[tuple[int, Response]]:
    for row, tokens, logps in zip(rows.tolist(), token_NT.tolist(), logp_NT.tolist(), strict=True):
        yield row, Response(tokens, logps, finish)


def _runs(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Equal neighbours as one prompt and how often it stands there."""
    unique: list[list[int]] = []
    repeats: list[int] = []
    for prompt in prompts:
        if unique and unique[-1] == prompt:
            repeats[-1] += 1
        else:
            unique.append(prompt)
            repeats.append(1)
    return unique, repeats
