"""ReLIFT (arXiv 2506.07527): on-policy RL, and SFT steps on demonstrations of the prompts that no rollout solved.

    RL step:   - (1 / Z) sum_i sum_t r_it A_i - entropy * mean H,   A_i = R_i - mean of the group
    SFT step:  - (1 / N_sft) sum_t [log pi(y*_t) + sft_entropy H_t],   N_sft = demonstration tokens of the step

After sampling, every prompt whose rollouts all scored zero puts its demonstration in front of a buffer. When the
buffer holds ``sft_batch`` or more, one SFT step with its own AdamW state follows the RL update on the newest
``sft_batch`` of them; the rest stays and ages. A prompt may be in the buffer more than once. All ranks hold the same
buffer, and each trains its share of what is taken from it.

Where the paper and the released code differ: the paper prints GRPO with ``std = true`` and ``clip = 0.2``, the code
has neither; alpha (``sft_entropy``) is 0.001 in the scripts and best at 1e-4 in the paper. The release averages SFT
over micro-batches of four demonstrations and divides by eight ranks once too often; here it is the token mean in
every preset, and ``sft_clip_norm`` acts on its true norm. ``normaliser`` is that of the RL step: ``code`` divides by
ranks x longest response, ``paper`` is the token mean, as ``clean``.

The gradient of the RL step was clipped at 0.7: that is the stage's ``clip_norm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import Method, Sampler, SideStep, TokenFacts, Weights, switched_on
from thence.methods.groups import sampled_groups
from thence.methods.mixed import MixedOptions, advantages, entropy_term, policy_normaliser
from thence.methods.unknown import all_failed
from thence.objective import Clip, Entropy, Logp, Normaliser, Ratio, Term
from thence.settings.limits import Coefficient, Norm, Rate, Rows, SomeCoefficient


class ReliftOptions(MixedOptions):
    """Settings of ReLIFT."""

    clip: SomeCoefficient | None = None
    """Clip range of the ratio in RL steps. none: no clip, as in the released script. The paper has 0.2."""
    sft_batch: Rows = 128
    """Demonstrations per SFT step over all ranks. A step needs this many in the buffer."""
    sft_lr: Rate | None = None
    """Learning rate of SFT steps. none: the stage's. Published: 1e-6, the same."""
    sft_clip_norm: Norm = 1.0
    """Largest gradient norm of SFT steps. 0: no clipping."""
    sft_entropy: Coefficient = 0.001
    """Coefficient alpha of the entropy bonus in SFT steps: 0.001 in the script, 1e-4 best in the paper."""


@dataclass(frozen=True)
class UnsolvedPrompt:
    """A prompt that no rollout solved, and the rollout batch in which it was."""

    step: int
    prompt: Prompt


class Relift(Method):
    """RL with SFT steps on what it fails at."""

    name = "relift"
    stage = "rl"
    demonstrations = "whole"
    formula = "RL: -(1/N) sum r A; at 128 unsolved prompts one SFT step: -(1/N_sft) sum [log pi(y*_t) + alpha H_t]"
    source = "arXiv 2506.07527 and its released code"
    exactness = "exact"
    not_ahead = "its SFT steps take the prompts that no rollout has solved from a buffer of all batches composed so far"
    Options = ReliftOptions

    def __init__(self, options: Mapping[str, Any] | None = None):
        super().__init__(options)
        self.buffer: list[UnsolvedPrompt] = []

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        surrogate = Ratio() if o.clip is None else Clip(o.clip, o.clip)
        return (Term("policy", surrogate, policy_normaliser(o)), *entropy_term(o))

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        groups = sampled_groups(sampler, prompts, n)
        failed = [group[0].prompt.without_observation for group in groups if all_failed(group)]
        mine = [prompt for prompt in failed if prompt.demonstration_ids]
        everywhere = sorted((p for part in sampler.gather(mine) for p in part), key=lambda prompt: prompt.draw)
        self.buffer[:0] = [UnsolvedPrompt(sampler.step, prompt) for prompt in everywhere]
        return [trajectory for group in groups for trajectory in group]

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        bonus = switched_on(entropy=o.entropy)
        return [{"policy": advantage, **bonus} for advantage in advantages(trajectories, o.std).tolist()]

    def work(self, prompts: int, n: int) -> Work:
        own = prompts * n
        return Work(Outcome(own, own), Outcome(own, own, prompts), "how many prompts are not solved, and imitated")

    def side_steps(self, sampler: Sampler) -> list[SideStep]:
        o = self.options
        if len(self.buffer) < o.sft_batch:
            return []
        taken, self.buffer = self.buffer[: o.sft_batch], self.buffer[o.sft_batch :]
        taken = taken[sampler.rank :: sampler.world]
        demonstrations = [Trajectory(f.prompt, f.prompt.demonstration_ids or (), origin="demonstration") for f in taken]
        terms = (Term("sft", Logp(), Normaliser("tokens")),)
        if o.sft_entropy:
            terms += (Term("entropy", Entropy(), Normaliser("tokens")),)
        weights = [{"sft": 1.0, **switched_on(entropy=o.sft_entropy)} for _ in demonstrations]
        return [SideStep("sft", terms, demonstrations, weights, lr=o.sft_lr, clip_norm=o.sft_clip_norm)]

    def state(self) -> dict[str, Any]:
        return {
            "buffer": [
                [f.step, f.prompt.index, list(f.prompt.token_ids), list(f.prompt.demonstration_ids or ())]
                for f in self.buffer
            ]
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.buffer = [
            UnsolvedPrompt(step, Prompt(index, tuple(token_ids), tuple(demonstration_ids)))
            for step, index, token_ids, demonstration_ids in state["buffer"]
        ]
