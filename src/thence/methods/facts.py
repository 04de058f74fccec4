"""What a method is told of the models before an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thence.errors import UserError


@dataclass(frozen=True)
class TokenFacts:
    """What the policy as it stands says of a trajectory's response tokens; no gradient.

    Args:
        logp: log-probabilities, shape (n,), nats.
        entropy: of the distributions that the tokens were drawn from, shape (n,), nats.
        old: log-probabilities under the policy before the first optimizer step on the rollout batch, from a pass of
            the trainer's own model; for a replay, under the policy that sampled it. Shape (n,), nats. Before that first
            step this is ``logp`` itself. It is the policy that sampled the batch too, unless that was sampled ahead
            (``rl.ahead``). None: the method does not say that it ``uses_old``.
        reference: log-probabilities under the reference model, the policy as the stage began, shape (n,), nats. None:
            the method does not say that it ``uses_reference``.
        vocabulary: words that the distributions are over; 0 without ``reference``.
        teacher: log-probabilities under the method's :class:`thence.methods.base.Teacher`, who reads a solution in the
            prompt. Shape (n,), nats. None: the method has no teacher, or nothing to show it for this trajectory; or its
            terms look at the teacher's whole distributions.
        shown: whether a teacher reads this trajectory.
    """

    logp: Tensor
    entropy: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    vocabulary: int = 0
    teacher: Tensor | None = None
    shown: bool = False

    @property
    def log_ratio(self) -> Tensor:
        """Log of the ratio of each token's probability to the old one, shape (n,), nats.

        Raises:
            UserError: old log-probabilities were not computed. No ratio is ever taken to be one for want of them.
        """
        if self.old is None:
            raise UserError(
                "a method reads the policy's old log-probabilities, which were not computed",
                remedy="set uses_old = True in the method's class",
            )
        return self.logp - self.old

    @property
    def of_reference(self) -> Tensor:
        """:attr:`reference`, where it was computed. Raises UserError as :attr:`log_ratio` does."""
        if self.reference is None:
            raise UserError(
                "a method reads log-probabilities of a reference model, which were not computed",
                remedy="set uses_reference = True in the method's class, and give Trainer(reference=...)",
            )
        return self.reference
