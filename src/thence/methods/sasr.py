"""SASR (arXiv 2505.13026): at every step a coin decides between SFT and GRPO, by how far SFT has come.

    the first ``warmup_steps`` steps are SFT steps; g_warm = gradient norm of the last of them, before clipping
    then p = g_last / (g_last + gamma g_warm):  with probability p an SFT step, whose norm becomes g_last, else GRPO
    SFT step:   - (1 / Z) sum_i sum_t log pi(y*_it)
    GRPO step:  - (1 / Z) sum_i sum_t [min(r A, clip(r, 1 - low, 1 + high) A) - kl * k3],   A = (R - mean) / (std + eps)

A step is one of the stage's ``steps``: one SFT step on as many demonstrations as the stage has prompts, or one rollout
batch with all its optimizer steps (one, unless the stage sets ``mini_batch``). SFT steps have an AdamW state of their
own and do not move the learning rate's schedule on. Nothing is sampled in a step that the coin gives to SFT.

The formulas come at second hand, and neither gamma nor the length of the warm-up is known, hence "reconstruction". The
pseudocode sums the likelihood over a demonstration: that is ``normaliser = "paper"``, a mean over demonstrations of
their sums (in the GRPO step: over responses of their token means). ``clean`` divides by the tokens of the step.
A constant divisor would not change p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Sampler, SideStep, TokenFacts, Weights, switched_on
from thence.methods.mixed import (
    ClippedOptions,
    advantages,
    entropy_term,
    likelihood_normaliser,
    policy_normaliser,
)
from thence.objective import Clip, Logp, NegativeKl, Normaliser, Term
from thence.settings.limits import Coefficient, Rate, Steps


class SasrOptions(ClippedOptions):
    """Settings of SASR."""

    warmup_steps: Steps = 20
    """SFT steps before the first coin. The published number is not known; this default was chosen here."""
    gamma: Coefficient = 1.0
    """Weight of the warm-up's gradient norm. Larger: fewer SFT steps. Not published; 1 makes the first coin fair."""
    kl: Coefficient = 0.0
    """Coefficient of the KL to the model at the start of the stage."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL. k3 is GRPO's; k1 has no gradient in expectation."""
    entropy: Coefficient = 0.0
    """Coefficient of the entropy bonus in GRPO steps."""
    sft_lr: Rate | None = None
    """Learning rate of SFT steps. none: the stage's."""


class Sasr(Method):
    """SFT or GRPO by a coin that follows the SFT gradient."""

    name = "sasr"
    stage = "rl"
    demonstrations = "whole"
    formula = (
        "u < p: -(1/N) sum log pi(y*_t), else -(1/N) sum min(r A, clip(r) A); p = g_last / (g_last + gamma g_warm)"
    )
    source = "arXiv 2505.13026 at second hand"
    exactness = "reconstruction"
    not_ahead = "the gradient norms of the steps before decide whether a batch is sampled"
    Options = SasrOptions

    def __init__(self, options: Mapping[str, Any] | None = None):
        super().__init__(options)
        self.warmed = 0
        self.g_warm = self.g_last = 0.0
        self.demonstrations_due = 0  # of the step that is being made; zero whenever the state is saved

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        normaliser = policy_normaliser(o, Normaliser("sequences"))
        terms = [Term("policy", Clip(o.clip_low, o.clip_high), normaliser)]
        if o.kl:
            terms.append(Term("kl", NegativeKl(o.kl_estimator), normaliser))
        return (*terms, *entropy_term(o))

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        warming = self.warmed < self.options.warmup_steps
        if warming or sampler.uniform("sasr") < chance(self.g_last, self.g_warm, self.options.gamma):
            self.demonstrations_due = prompts
            return []
        return sampler.rollouts(sampler.next_prompts(prompts), n)

    def work(self, prompts: int, n: int) -> Work:
        own = prompts * n
        return Work(Outcome(0, 0, prompts), Outcome(own, own), "which batches imitate instead of sampling")

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        weights = []
        for trajectory, advantage in zip(trajectories, advantages(trajectories, o.std), strict=True):
            share = 1 / max(len(trajectory.response_ids), 1) if o.normaliser == "paper" else 1.0
            weights.append({"policy": float(advantage) * share, **switched_on(kl=o.kl * share, entropy=o.entropy)})
        return weights

    def side_steps(self, sampler: Sampler) -> list[SideStep]:
        count, self.demonstrations_due = self.demonstrations_due, 0
        if not count:
            return []
        experts = sampler.expert_prompts(count)
        demonstrations = [Trajectory(p, p.demonstration_ids or (), origin="demonstration") for p in experts]
        terms = (Term("sft", Logp(), likelihood_normaliser(self.options, Normaliser("sequences"))),)
        return [SideStep("sft", terms, demonstrations, [{"sft": 1.0}] * len(demonstrations), lr=self.options.sft_lr)]

    def took_step(self, kind: str, grad_norm: float) -> None:
        if kind != "sft":
            return
        if self.warmed < self.options.warmup_steps:
            self.warmed += 1
            self.g_warm = grad_norm
        self.g_last = grad_norm

    def state(self) -> dict[str, Any]:
        return {"warmed": self.warmed, "g_warm": self.g_warm, "g_last": self.g_last}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.warmed, self.g_warm, self.g_last = state["warmed"], state["g_warm"], state["g_last"]


def chance(g_last: float, g_warm: float, gamma: float) -> float:
    """Probability of an SFT step; 0 when SFT has no gradient left at all."""
    return g_last / (g_last + gamma * g_warm) if g_last else 0.0
