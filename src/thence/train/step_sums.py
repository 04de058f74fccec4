"""What the micro-batches of an optimizer step add up to besides the gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from thence.objective import TokenStats
from thence.train.parallel import Ranks


@dataclass(frozen=True)
class StepSums:
    """What the micro-batches of a step add up to besides the gradient. All but ``passes`` are float64 scalars on the
    model's device, so that a step waits for it once.

    Args:
        loss: the objective of these rows, already divided by the normalisers of the whole step.
        entropy: of the next-token distributions over trained tokens, nats.
        logp: log-probabilities of trained tokens, nats.
        clipped: trained tokens whose gradient a clip held back.
        tokens: tokens in the rows, prompts included, padding not.
        seen: trained tokens that went through the model.
        passes: forward passes of this rank.
    """

    loss: Tensor
    entropy: Tensor
    logp: Tensor
    clipped: Tensor
    tokens: Tensor
    seen: Tensor
    passes: int = field(default=0, kw_only=True)

    @classmethod
    def zero(cls, device: torch.device) -> StepSums:
        """The sums before the first micro-batch."""
        return cls(*torch.zeros(6, dtype=torch.float64, device=device))

    def plus(self, loss: Tensor, stats: TokenStats, tokens: int) -> StepSums:
        """The sums with one more micro-batch."""
        return StepSums(
            loss=self.loss + loss.detach(),
            entropy=self.entropy + stats.entropy_T.sum(),
            logp=self.logp + stats.logp_T.sum(),
            clipped=self.clipped + stats.clipped_T.sum(),
            tokens=self.tokens + tokens,
            seen=self.seen + len(stats.logp_T),
            passes=self.passes + 1,
        )

    def over(self, ranks: Ranks) -> StepSums:
        """The sums over all ranks, on the CPU; the number of passes stays that of this rank."""
        own = torch.stack([self.loss, self.entropy, self.logp, self.clipped, self.tokens, self.seen])
        return StepSums(*ranks.sum_floats(own.cpu()), passes=self.passes)
