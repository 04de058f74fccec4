"""Plain re-statements of the methods' formulas, row by row, to hold the engine against; and rows to try them on.

Nothing of thence's objective or step is used here: the model's own logits, autograd, and Python's statistics.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import Method, TokenFacts, make_rows
from thence.methods.registry import methods
from thence.objective import Batch

# How far the behaviour policy lies from the current one, in nats: on both sides of every clip, never near its edge.
BEHAVIOUR_SHIFTS = torch.tensor([-1.5, -0.5, -0.1, 0.0, 0.1, 0.5], dtype=torch.float64)


@dataclass(frozen=True)
class Variant:
    """A method with its settings, and whether the behaviour policy has moved."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    moved: bool = False
    temperature: float = 1.0

    def __str__(self) -> str:
        return self.name


PAPER = {"aggregation": "sequence-mean", "std": True, "clip_high": 0.2, "kl": 0.04}
VARIANTS = [
    Variant("sft", "sft"),
    Variant("grpo", "grpo"),
    Variant("grpo-moved", "grpo", moved=True),
    Variant("grpo-paper", "grpo", PAPER, moved=True),
    Variant("grpo-constant", "grpo", {"aggregation": "constant", "constant_tokens": 17}, moved=True),
    Variant("grpo-entropy", "grpo", {"entropy": 0.3, "kl": 0.5, "kl_estimator": "k2"}, temperature=0.7),
    Variant("dr_grpo", "dr_grpo", {"constant_tokens": 30}, moved=True),
    Variant("dapo", "dapo", moved=True),
]
DEFAULTS: dict[str, Any] = {
    "low": 0.2, "high": 0.28, "std": False, "aggregation": "token-mean", "kl": 0.0, "entropy": 0.0, "dual": None,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "dr_grpo": {"high": 0.2, "aggregation": "constant"},
    "dapo": {"std": True, "dual": 3.0},
}


@dataclass(frozen=True)
class Case:
    """Trajectories and what the rows of a batch carry besides them; float64."""

    trajectories: tuple[Trajectory, ...]
    behaviour: tuple[Tensor, ...] | None
    reference: tuple[Tensor, ...] | None


def make_method(variant: Variant) -> Method:
    """The engine's method of a variant."""
    return methods()[variant.method](variant.options)


def make_case(model: Any, variant: Variant, lengths: Sequence[tuple[int, int]], group_size: int, seed: int) -> Case:
    """Random rows of these (prompt, response) lengths, in groups, with random scores 0 or 1 that differ in a group."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    trajectories = []
    for i, (prompt, response) in enumerate(lengths):
        ids = torch.randint(vocabulary, (prompt + response,), generator=generator).tolist()
        right = float(i % group_size == 0 or torch.rand((), generator=generator) < 0.4)
        right = 0.0 if i % group_size == 1 else right
        owner = Prompt(i // group_size, tuple(ids[:prompt]))
        trajectories.append(Trajectory(owner, tuple(ids[prompt:]), score=right))
    logps = [row_statistics(model, t, variant.temperature)[0].detach() for t in trajectories]

    def shifted() -> tuple[Tensor, ...]:
        picks = [torch.randint(len(BEHAVIOUR_SHIFTS), (len(logp),), generator=generator) for logp in logps]
        return tuple(logp + BEHAVIOUR_SHIFTS[pick] for logp, pick in zip(logps, picks, strict=True))

    behaviour = shifted() if variant.moved else None
    return Case(tuple(trajectories), behaviour, shifted() if "kl" in variant.options else None)


def make_batch(case: Case, variant: Variant, dtype: torch.dtype = torch.float64) -> Batch:
    """What the engine is given for this case."""
    method = make_method(variant)
    rows = make_rows(method.terms, case.trajectories, method.weigh(case.trajectories))
    if case.behaviour is not None:
        rows = [replace(r, behaviour=b.to(dtype)) for r, b in zip(rows, case.behaviour, strict=True)]
    if case.reference is not None:
        rows = [replace(r, reference=b.to(dtype)) for r, b in zip(rows, case.reference, strict=True)]
    return Batch(method.terms, tuple(rows), variant.temperature)


def weights_of(method: Method, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Tensor]:
    """The weights that a method gives, as they are laid out for the step, shape (J, n) for each trajectory."""
    rows = make_rows(method.terms, trajectories, method.weigh(trajectories, facts))
    return [row.weights for row in rows]


def row_statistics(model: Any, trajectory: Trajectory, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token, and entropy of every distribution that one was taken from."""
    ids = torch.tensor([*trajectory.prompt.token_ids, *trajectory.response_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[0] / temperature
    log_p = logits.log_softmax(-1)[len(trajectory.prompt.token_ids) - 1 : -1]
    taken = log_p.gather(1, ids[len(trajectory.prompt.token_ids) :, None])[:, 0]
    return taken, -(log_p.exp() * log_p).sum(-1)


def advantages(trajectories: Sequence[Trajectory], std: bool) -> list[float]:
    """(R - mean) of each response's group, divided by (std + 1e-6) if asked; alone: zero."""
    result = []
    for trajectory in trajectories:
        scores = [t.score or 0.0 for t in trajectories if t.prompt.index == trajectory.prompt.index]
        centred = (trajectory.score or 0.0) - statistics.fmean(scores) if len(scores) > 1 else 0.0
        result.append(centred / (statistics.stdev(scores) + 1e-6) if std and len(scores) > 1 else centred)
    return result


def contributions(model: Any, case: Case, variant: Variant) -> tuple[Tensor, Tensor]:
    """What every response token adds to the loss, shape (T,), and which of them a clip holds back.

    The loss is the sum of the first.
    """
    o = DEFAULTS | OWN.get(variant.method, {})
    o |= {{"clip_high": "high"}.get(name, name): value for name, value in variant.options.items()}
    rows = case.trajectories
    tokens, parts, clipped = sum(len(t.response_ids) for t in rows), [], []
    for i, (trajectory, advantage) in enumerate(zip(rows, advantages(rows, o["std"]), strict=True)):
        logp, entropy = row_statistics(model, trajectory, variant.temperature)
        if variant.method == "sft":
            parts.append(-logp / tokens)
            clipped.append(torch.zeros_like(logp, dtype=torch.bool))
            continue
        old = case.behaviour[i] if case.behaviour is not None else logp.detach()
        ratio = (logp - old).exp()
        bounded = ratio.clamp(1 - o["low"], 1 + o["high"])
        gain = torch.minimum(ratio * advantage, bounded * advantage)
        held = (ratio * advantage > gain) if advantage else torch.zeros_like(ratio, dtype=torch.bool)
        if o["dual"] is not None and advantage < 0:
            held = held | (gain < o["dual"] * advantage)
            gain = gain.clamp(min=o["dual"] * advantage)
        if case.reference is not None:
            gap = case.reference[i] - logp
            estimate = gap.square() / 2 if o.get("kl_estimator") == "k2" else gap.exp() - gap - 1
            gain = gain - o["kl"] * estimate
        divisor = {
            "token-mean": tokens,
            "sequence-mean": len(rows) * len(logp),
            "constant": len(rows) * o.get("constant_tokens", 0),
        }[o["aggregation"]]
        parts.append(-gain / divisor - o["entropy"] * entropy / tokens)
        clipped.append(held)
    return torch.cat(parts), torch.cat(clipped)


def gradient(model: Any, loss: Tensor) -> Tensor:
    """The whole gradient as one float64 vector."""
    parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([part.double().flatten() for part in parts])


def relative(got: Tensor, expected: Tensor) -> float:
    """Euclidean distance, relative to the second; zero if both are zero."""
    distance, size = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
    return distance / size if size else distance
