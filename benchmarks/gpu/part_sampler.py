"""The sampler on the device: its log-probabilities, its seeds, greedy decoding, and what bfloat16 training adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from models import TINY, VOCAB, tiny
from record import Record

from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import bare_row
from thence.objective import kl_estimate
from thence.recipe import Data, Model
from thence.rollout.llama import is_plain_llama
from thence.rollout.native import Response, Sampling, sample
from thence.train.model import load_model
from thence.train.policy import Policy
from thence.train.step import StepSettings, policy_statistics

TOKENS = 48


def run(device: torch.device, small: bool, record: Record) -> None:
    for kind in list(TINY)[:2] if small else TINY:
        one_family(kind, device, record)
    trained_base(device, small, record)


def one_family(kind: str, device: torch.device, record: Record) -> None:
    """Prompts of uneven lengths, several responses each, some of which end early."""
    model = tiny(kind, device=device)
    generator = torch.Generator().manual_seed(1)
    distinct = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (3, 17, 5, 9, 9, 26)]
    prompts = [prompt for prompt in distinct for _ in range(8)]
    seeds, sampling = list(range(len(prompts))), Sampling(TOKENS, stop_ids=(5, 6, 7), rows=64)
    found = sample(model, prompts, seeds, sampling)
    name = f"{kind} ({'LlamaDecoder' if is_plain_llama(model) else 'transformers cache'})"
    compare = mismatch(model, prompts, found, torch.float32)
    record.most(f"{name} log-probabilities of sampler and trainer, largest difference", compare["largest"], 2e-4)
    again = sample(model, prompts, seeds, sampling)
    record.true(f"{name} same call, same tokens", [r.token_ids for r in again] == [r.token_ids for r in found])
    apart = sample(model, prompts, seeds, Sampling(TOKENS, stop_ids=(5, 6, 7), rows=7))
    record.least(f"{name} same tokens in waves of 7 rows, share", agreement(found, apart), 0.95)
    on_cpu = sample(tiny(kind), prompts, seeds, sampling)
    record.least(f"{name} same tokens as on the CPU, share", agreement(found, on_cpu), 0.95)
    greedy = sample(model, distinct, seeds[: len(distinct)], Sampling(24, temperature=0.0))
    expected = [generated(model, prompt, 24) for prompt in distinct]
    equal = sum(r.token_ids == ids for r, ids in zip(greedy, expected, strict=True)) / len(distinct)
    record.least(f"{name} greedy is that of generate, share", equal, 1.0)
    lower = mismatch(model, prompts, found, torch.bfloat16)
    record.figures[f"{name} mismatch"] = {"float32": compare, "bfloat16 training": lower}


def trained_base(device: torch.device, small: bool, record: Record) -> None:
    """The same on a model that has learnt something: the base of the embedded world on its own prompts."""
    from thence.pipeline.prompts import load_prompts

    loaded = load_model(Model(path="world:chain/rich"), device)
    prompts = load_prompts(Data(limit=8 if small else 64, split="test"), loaded.tokenizer)
    repeated = [list(prompt.token_ids) for prompt in prompts for _ in range(4)]
    sampling = Sampling(120, stop_ids=(loaded.tokenizer.eos_token_id,))
    found = sample(loaded.model, repeated, list(range(len(repeated))), sampling)
    for dtype in (torch.float32, torch.bfloat16):
        measured = mismatch(loaded.model, repeated, found, dtype)
        record.figure(f"world:chain/rich, trained in {str(dtype)[6:]}, sampled in float32", measured)
    few = Sampling(120, stop_ids=sampling.stop_ids, rows=7)
    apart = sample(loaded.model, repeated, list(range(len(repeated))), few)
    record.least("world:chain/rich same tokens in waves of 7 rows, share", agreement(found, apart), 0.95)


def mismatch(
    model: Any, prompts: Sequence[list[int]], found: Sequence[Response], dtype: torch.dtype
) -> dict[str, float]:
    """The trainer's log-probabilities of the sampled tokens against the sampler's: KL per token and largest gap."""
    pairs = enumerate(zip(prompts, found, strict=True))
    rows = [Trajectory(Prompt(i, tuple(p)), tuple(r.token_ids)) for i, (p, r) in pairs]
    made = [bare_row(row) for row in rows]
    scored = policy_statistics(Policy(model), made, 1.0, StepSettings(4096, compute_dtype=dtype))
    sampled = torch.cat([torch.tensor(r.logps, dtype=torch.float64) for r in found])
    trained = torch.cat([logp.double() for logp, _ in scored])
    gap = (sampled - trained).abs()
    kl = float(kl_estimate(sampled, trained).mean())
    return {"mismatch_kl": kl, "mean": float(gap.mean()), "largest": float(gap.max()), "tokens": len(gap)}


def agreement(left: Sequence[Response], right: Sequence[Response]) -> float:
    """Share of responses with the same tokens."""
    return sum(a.token_ids == b.token_ids for a, b in zip(left, right, strict=True)) / len(left)


def generated(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
