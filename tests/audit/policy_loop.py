"""A plain GRPO loop from the formulas, in torch with autograd, with the mistakes that people make in it.

It shares no code with thence: what the audit predicts in closed form is here a loss that is differentiated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One rollout: its prompt's length is where the response begins."""

    ids: tuple[int, ...]
    start: int
    reward: float
    group: int
    truncated: bool = False
    environment: tuple[int, ...] = ()
    noise: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Tokens of the response."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Loop:
    """A trainer. ``asked`` are the settings that are meant (names of ``PolicyObjective``); a mistake is one that is
    made all the same."""

    asked: dict[str, Any] = field(default_factory=dict)
    mistake: str = ""
    micro_batch: int = 4
    steps: int = 3
    per_generation: int = 3
    lr: float = 0.3

    def get(self, name: str) -> Any:
        return {**DEFAULTS, **self.asked}[name]

    def run(self, model: Any, rows: Sequence[Row]) -> tuple[list[dict[str, Tensor]], list[int], list[list[float]]]:
        """Take the steps. Returns the parameters before and after each, the version of each step's old
        log-probabilities, and what the sampling engine said."""
        model = copy.deepcopy(model)
        states, versions = [_state(model)], []
        with torch.no_grad():
            reference = [self._logp(model, row) for row in rows]
            first = reference
        reference_model = copy.deepcopy(model)
        sampler = [
            (logp + torch.tensor(row.noise or (0.0,) * row.size)).tolist()
            for logp, row in zip(first, rows, strict=True)
        ]
        old, version, stale = first, 0, first
        for step in range(self.steps):
            if step % self.per_generation == 0 and step:
                with torch.no_grad():
                    stale, old, version = old, [self._logp(model, row) for row in rows], step
            versions.append(version)
            used = old
            if self.mistake == "old-sampler":
                used = [torch.tensor(s) for s in sampler]
            if self.mistake == "old-recomputed":
                used = [self._logp(model, row).detach() for row in rows]
            if self.mistake == "old-stale":
                used = stale
            theirs = old if self.mistake == "kl-reference" else reference
            if self.mistake != "leak":
                model.zero_grad()
            self._backward(model, rows, used, theirs, reference_model, [torch.tensor(s) for s in sampler])
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None and (self.mistake != "steps-lost" or step == 0):
                        parameter -= self.lr * parameter.grad
            states.append(_state(model))
        return states, versions, sampler

    def _temperature(self) -> float:
        asked = self.get("temperature")
        return {"temperature-ignored": 1.0, "temperature-twice": asked**2, "temperature-inverse": 1 / asked}.get(
            self.mistake, asked
        )

    def _distributions(self, model: Any, row: Row, temperature: float) -> Tensor:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids).logits[0, row.start - 1 : -1]
        return torch.log_softmax(logits / temperature, -1)

    def _logp(self, model: Any, row: Row) -> Tensor:
        logp = self._distributions(model, row, self._temperature())
        return logp.gather(1, torch.tensor(row.ids[row.start :])[:, None])[:, 0]

    def _mask(self, row: Row) -> Tensor:
        mask = torch.ones(row.size, dtype=torch.bool)
        if self.mistake != "environment-trained":
            mask[list(row.environment)] = False
        if (self.get("truncated") == "mask") != (self.mistake == "truncated") and row.truncated:
            mask[:] = False
        if self.mistake == "end-missing":
            mask[-1] = False
        if self.mistake == "first-missing":
            mask[0] = False
        return mask

    def _advantages(self, rows: Sequence[Row], old: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
        reward = torch.tensor([row.reward for row in rows], dtype=torch.float64)
        if self._kl_in() == "reward":
            for i, row in enumerate(rows):
                own = [t for t in range(row.size) if t not in row.environment]
                reward[i] -= self._kl() * _kl(old[i] - reference[i], self._estimator())[own].sum()
        size = sum(row.group == rows[0].group for row in rows)
        group = [row.group for row in rows]
        if self.mistake == "groups-interleaved":
            group = [i % (len(rows) // size) for i in range(len(rows))]
        if self.mistake == "groups-shifted":
            group = [((i + 1) % len(rows)) // size for i in range(len(rows))]
        other = {"baseline-batch": "batch", "baseline-none": "none", "baseline-rloo": "leave-one-out"}
        baseline: str = other.get(self.mistake) or self.get("baseline")
        scale = {"scale-none": "none", "scale-batch": "batch", "scale-group": "group"}.get(
            self.mistake, self.get("scale")
        )
        bessel = self.get("bessel") != (self.mistake == "bessel")
        found = []
        for i in range(len(rows)):
            mine = reward[[j for j in range(len(rows)) if group[j] == group[i]]]
            others = reward[[j for j in range(len(rows)) if group[j] == group[i] and j != i]]
            if self.mistake == "padded-group":
                mine = torch.cat([mine, torch.zeros(1, dtype=mine.dtype)])
            base = {"group": mine, "batch": reward, "leave-one-out": others, "none": torch.zeros(1)}[baseline].mean()
            value = reward[i] - base
            if scale != "none":
                over = mine if scale == "group" else reward
                spread = over.std(correction=int(bessel))
                if self.mistake == "zero-variance" and spread == 0:
                    found.append(float(reward[i]))
                    continue
                value = value / (spread + (1e-2 if self.mistake == "eps" else self.get("eps")))
            value = max(float(value), 0.0) if self.mistake == "negative-dropped" else float(value)
            found.append(-value if self.mistake == "sign" else value)
        return found

    def _kl(self) -> float:
        asked = self.get("kl")
        return {"kl-missing": 0.0, "kl-double": 2 * asked, "kl-sign": -asked, "kl-added": 0.1}.get(self.mistake, asked)

    def _kl_in(self) -> str:
        if not self._kl():
            return ""
        other = {"loss": "reward", "reward": "loss"}
        return other[self.get("kl_in")] if self.mistake == "kl-place" else self.get("kl_in")

    def _estimator(self) -> str:
        return {"kl-k1": "k1", "kl-k2": "k2", "kl-k3": "k3"}.get(self.mistake) or self.get("estimator")

    def _surrogate(self, logp: Tensor, old: Tensor, mask: Tensor, advantage: float) -> Tensor:
        """To be maximised, of every token."""
        level, low, high = self.get("ratio"), self.get("clip_low"), self.get("clip_high")
        dual, surrogate = self.get("dual_clip"), self.get("surrogate")
        level = {"ratio-missing": "none", "ratio-token": "token", "ratio-sequence": "sequence"}.get(self.mistake, level)
        if self.mistake in ("clip-missing", "clip-both", "clip-low-as-high", "clip-range", "clip-one-sided"):
            low, high, surrogate, dual = {
                "clip-missing": (math.inf, math.inf, surrogate, math.inf),
                "clip-both": (low, high, "mask", dual),
                "clip-low-as-high": (high, low, surrogate, dual),
                "clip-range": (low * 2, high * 2, surrogate, dual),
                "clip-one-sided": (math.inf, high, surrogate, dual),
            }[self.mistake]
        dual: float = {"dual-missing": math.inf, "dual-added": 1.3}.get(self.mistake) or dual
        surrogate = {"surrogate-weight": "weight", "trust-as-clip": "clip", "trust-as-band": "band"}.get(
            self.mistake, surrogate
        )
        if level == "none":
            return advantage * logp
        log_ratio = logp - old
        if level == "sequence":
            log_ratio = ((log_ratio * mask).sum() / mask.sum().clamp(min=1)).expand_as(logp)
        ratio = log_ratio.exp()
        if surrogate == "weight":
            return ratio.detach().clamp(1 - low, 1 + high) * advantage * logp
        if surrogate == "mask":
            return ratio * advantage * ((ratio >= 1 - low) & (ratio <= 1 + high))
        if surrogate in ("tv", "binary-kl", "band"):
            p, q = logp.detach().exp(), old.exp()
            change, up = p - q, advantage > 0
            if surrogate == "binary-kl":
                far = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
                held = ((change > 0) & (far > high)) if up else ((change < 0) & (far > low))
            elif surrogate == "tv":
                held = change > high if up else change < -low
            else:
                held = (change > high) | (change < -low)
            return (ratio.clamp(max=dual) * ~held).detach() * advantage * logp
        value = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        return torch.maximum(value, torch.full_like(value, dual * advantage)) if advantage < 0 else value

    def _correction(self, old: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
        kind, level = self.get("correction"), self.get("correction_level")
        cap, floor = self.get("correction_cap"), self.get("correction_floor")
        kind = {"importance-missing": "none", "importance-masked": "mask", "importance-truncated": "truncate"}.get(
            self.mistake, kind
        )
        if self.mistake == "importance-level":
            level = "sequence" if level == "token" else "token"
        cap = {"importance-uncapped": math.inf, "importance-cap": 1 + 2 * (cap - 1)}.get(self.mistake, cap)
        if kind == "none":
            return torch.ones_like(old)
        log_ratio = (old - sampler) * mask
        if level == "sequence":
            log_ratio = log_ratio.sum().expand_as(old)
        ratio = torch.exp(-log_ratio if self.mistake == "importance-inverted" else log_ratio)
        if kind == "truncate":
            return ratio.clamp(floor, cap)
        return ratio * ((ratio <= cap) & (ratio >= floor))

    def _backward(
        self,
        model: Any,
        rows: Sequence[Row],
        old: Sequence[Tensor],
        reference: Sequence[Tensor],
        reference_model: Any,
        sampler: Sequence[Tensor],
    ) -> None:
        advantages = self._advantages(rows, old, reference)
        masks = [self._mask(row) for row in rows]
        informative = self.get("counted") == "informative" or self.mistake == "counted"
        counted = [
            0 if informative and abs(a) < 1e-12 else int(m.sum()) for a, m in zip(advantages, masks, strict=True)
        ]
        for start in range(0, len(rows), self.micro_batch):
            chosen = range(start, min(start + self.micro_batch, len(rows)))
            if self.mistake == "last-only":
                model.zero_grad()
            total = torch.zeros(())
            for i in chosen:
                distribution = self._distributions(model, rows[i], self._temperature())
                logp = distribution.gather(1, torch.tensor(rows[i].ids[rows[i].start :])[:, None])[:, 0]
                loss = -self._surrogate(logp, old[i], masks[i], advantages[i])
                loss = loss * self._correction(old[i], sampler[i], masks[i])
                pull = {"pull-missing": 0.0, "pull-double": 2 * self.get("pull")}.get(self.mistake, self.get("pull"))
                loss = loss + pull * (logp - old[i]).square()
                if self._kl_in() == "loss":
                    if self._estimator() == "full":
                        with torch.no_grad():
                            theirs = self._distributions(reference_model, rows[i], self._temperature())
                        loss = loss + self._kl() * (distribution.exp() * (distribution - theirs)).sum(-1)
                    else:
                        loss = loss + self._kl() * _kl(logp - reference[i], self._estimator())
                entropy = self.get("entropy") or (0.02 if self.mistake == "entropy-added" else 0.0)
                entropy = 0.0 if self.mistake == "entropy-missing" else entropy
                if entropy:
                    loss = loss + entropy * (distribution.exp() * distribution).sum(-1)
                total = total + (loss * masks[i]).sum() * self._divisor(i, rows, counted)
            total.backward()

    def _divisor(self, i: int, rows: Sequence[Row], counted: Sequence[int]) -> float:
        other = {"rows": "sequence-mean", "tokens": "token-mean", "micro": "micro-batch-mean", "groups": "group-mean"}
        rule: str = other.get(self.mistake) or self.get("normaliser")
        micro_batches = math.ceil(len(rows) / self.micro_batch)
        own = [j for j in range(len(rows)) if j // self.micro_batch == i // self.micro_batch]
        group = [j for j in range(len(rows)) if rows[j].group == rows[i].group]
        groups = len({row.group for row in rows})
        divisor = {
            "token-mean": sum(counted),
            "sequence-mean": len(rows) * max(counted[i], 1),
            "constant-divisor": len(rows) * (self.get("longest") or 1),
            "micro-batch-mean": micro_batches * max(sum(counted[j] for j in own), 1),
            "micro-batch-sequence-mean": micro_batches * len(own) * max(counted[i], 1),
            "group-mean": groups * max(sum(counted[j] for j in group), 1),
        }[rule]
        return (micro_batches if self.mistake == "scale" else 1.0) / max(divisor, 1)


DEFAULTS: dict[str, Any] = {
    "baseline": "group", "scale": "group", "bessel": True, "eps": 1e-6, "ratio": "token", "surrogate": "clip",
    "clip_low": 0.2, "clip_high": 0.2, "dual_clip": math.inf, "pull": 0.0,
    "kl": 0.0, "estimator": "k3", "kl_in": "loss",
    "entropy": 0.0, "temperature": 1.0, "correction": "none", "correction_level": "token", "correction_cap": math.inf,
    "correction_floor": 0.0, "normaliser": "token-mean", "longest": 0.0, "truncated": "train", "counted": "all",
}  # fmt: skip


def _kl(difference: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return difference
    return difference**2 / 2 if estimator == "k2" else torch.exp(-difference) - 1 + difference


def _state(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
