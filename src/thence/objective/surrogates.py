"""The differentiable surrogates S(t; theta) of the one objective, each with its slope.

Every surrogate is an elementwise function of the log-probability of the token that was taken, so its gradient is
``slope * d logp``: the slope times the weight, divided by the normaliser, is the weight that the token gets.
Tensors are flat over trained tokens (suffix T). All formulas side by side: ``docs/objective.md``; PPO clip from
arXiv 1707.06347 eq. 7, dual clip from arXiv 1912.09729, shaping from LUFFY (arXiv 2504.14945) eq. 8, TrSFT from TRAPO
(arXiv 2512.17636).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from thence.objective.kl import EXPONENT_LIMIT, kl_estimate

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32; a larger log-ratio says the data are not near-policy at all


@dataclass(frozen=True)
class Context:
    """What a surrogate may look at besides the log-probability; every tensor is detached and of shape (T,).

    Args:
        weight_T: the term's weights; their sign chooses the branch of the clip.
        behaviour_T: log-probabilities under the policy that the tokens were sampled from, recomputed by the trainer.
            None: the policy has not moved since, the ratio is one.
        reference_T: log-probabilities under the reference policy of a KL term.
    """

    weight_T: Tensor
    behaviour_T: Tensor | None = None
    reference_T: Tensor | None = None


class Surrogate(Protocol):
    """An elementwise function of the log-probability; frozen and hashable."""

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        """S at every token, differentiable in ``logp_T``. Shape (T,)."""
        ...

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        """dS/dlogp at every token, in closed form. Shape (T,)."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A surrogate with a bound that can hold back or limit the gradient of a token."""

    def held_back(self, logp_T: Tensor, context: Context) -> Tensor:
        """Where the bound acts. Shape (T,), bool."""
        ...


def log_ratio(logp_T: Tensor, behaviour_T: Tensor | None) -> Tensor:
    """log(pi / pi_behaviour), clamped to +-20 before any exp. Shape (T,)."""
    behaviour_T = logp_T.detach() if behaviour_T is None else behaviour_T
    return (logp_T - behaviour_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _not_clamped(logp_T: Tensor, behaviour_T: Tensor | None) -> Tensor:
    if behaviour_T is None:
        return torch.ones_like(logp_T)
    return ((logp_T - behaviour_T).abs() <= LOG_RATIO_LIMIT).to(logp_T.dtype)


@dataclass(frozen=True)
class Logp:
    """LOGP: the log-probability itself; weight 1 is maximum likelihood (SFT)."""

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return torch.ones_like(logp_T)


@dataclass(frozen=True)
class Ratio:
    """RATIO: pi / pi_behaviour, unclipped."""

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return log_ratio(logp_T, context.behaviour_T).exp()

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return self.value(logp_T, context) * _not_clamped(logp_T, context.behaviour_T)


@dataclass(frozen=True)
class Clip:
    """CLIP: the clipped ratio of PPO, asymmetric, with dual clip.

    For a positive weight ``min(r, 1 + high)``; for a negative one ``min(max(r, 1 - low), dual)``.
    ``weight * S`` is then exactly ``min(r A, clip(r, 1 - low, 1 + high) A)``, bounded below by ``dual * A``.

    Args:
        low: clip range below one.
        high: clip range above one (DAPO's clip-higher when larger than ``low``).
        dual: largest ratio that a negative advantage can act through; infinity switches it off.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float = math.inf

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        ratio_T = log_ratio(logp_T, context.behaviour_T).exp()
        above_T = ratio_T.clamp(max=1 + self.high)
        below_T = ratio_T.clamp(min=1 - self.low).clamp(max=self.dual)
        return torch.where(context.weight_T >= 0, above_T, below_T)

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        ratio_T = log_ratio(logp_T, context.behaviour_T).exp()
        return ratio_T * (~self.clipped(ratio_T, context)).to(ratio_T.dtype) * _not_clamped(logp_T, context.behaviour_T)

    def held_back(self, logp_T: Tensor, context: Context) -> Tensor:
        """Where the clip holds the gradient back. Shape (T,), bool."""
        return self.clipped(log_ratio(logp_T, context.behaviour_T).exp(), context)

    def clipped(self, ratio_T: Tensor, context: Context) -> Tensor:
        """The same from the ratios. Shape (T,), bool."""
        up_T = ratio_T > 1 + self.high
        down_T = (ratio_T < 1 - self.low) | (ratio_T > self.dual)
        return torch.where(context.weight_T >= 0, up_T, down_T)


@dataclass(frozen=True)
class Prob:
    """PROB: the probability itself (mixed policy without shaping)."""

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T.exp()

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T.exp()


@dataclass(frozen=True)
class ProbLogp:
    """PROB_LOGP: ``sg(pi) log pi``, the likelihood weighed by the probability itself (DFT).

    Its slope is that of PROB.
    """

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T.detach().exp() * logp_T

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T.exp()


@dataclass(frozen=True)
class Shape:
    """SHAPE: ``pi / (pi + gamma)``, LUFFY's policy shaping; equal to ``sigmoid(logp - log gamma)``."""

    gamma: float = 0.1

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return torch.sigmoid(logp_T - math.log(self.gamma))

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        shaped_T = self.value(logp_T, context)
        return shaped_T * (1 - shaped_T)


@dataclass(frozen=True)
class TrSft:
    """TR_SFT: ``logp`` where ``pi >= alpha``, else ``pi / alpha - 1 + log alpha`` (TRAPO, arXiv 2512.17636).

    The likelihood, with the slope ``min(1, pi / alpha)``: scaled down where the policy finds the token unlikely. Value
    and slope are continuous at alpha.
    """

    alpha: float = 0.1

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        edge = math.log(self.alpha)
        below_T = (logp_T - edge).clamp(max=0).exp() - 1 + edge
        return torch.where(logp_T >= edge, logp_T, below_T)

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return (logp_T - math.log(self.alpha)).clamp(max=0).exp()


@dataclass(frozen=True)
class ShapeRatio:
    """SHAPE_RATIO: ``r / (r + gamma)`` with ``r = pi / pi_behaviour`` (ExGRPO's replay)."""

    gamma: float = 0.1

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return torch.sigmoid(log_ratio(logp_T, context.behaviour_T) - math.log(self.gamma))

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        shaped_T = self.value(logp_T, context)
        return shaped_T * (1 - shaped_T) * _not_clamped(logp_T, context.behaviour_T)


@dataclass(frozen=True)
class NegativeKl:
    """Minus an estimator of KL(pi || reference) per token; weight = the KL coefficient. See :mod:`.kl`.

    ``k1`` has zero expected gradient as a loss term and is offered for measurement; ``k2`` has the gradient of the KL
    in expectation; ``k3`` is GRPO's low-variance estimator.
    """

    estimator: str = "k3"

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        assert context.reference_T is not None, "a KL term needs reference log-probabilities"
        return -kl_estimate(logp_T, context.reference_T, self.estimator)

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        assert context.reference_T is not None, "a KL term needs reference log-probabilities"
        difference_T = logp_T - context.reference_T
        if self.estimator == "k1":
            return -torch.ones_like(logp_T)
        if self.estimator == "k2":
            return -difference_T
        return (-difference_T).clamp(max=EXPONENT_LIMIT).exp() - 1


@dataclass(frozen=True)
class Entropy:
    """The entropy of the whole next-token distribution; weight = the entropy bonus.

    The only surrogate that is not a function of the taken token's log-probability: :func:`.fused.objective` adds its
    gradient to the logits itself, and ``value`` is given the entropies in place of log-probabilities.
    """

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return torch.ones_like(logp_T)


@dataclass(frozen=True)
class RefCE:
    """REFCE: the whole next-token distribution p held against that of a reference model, p_ref, at the same place.

    Like :class:`Entropy` it is no function of the taken token's log-probability: :func:`.fused.objective` computes it
    from the reference model's hidden states and output layer, and adds its gradient to the logits. ``value`` is given
    what :func:`~thence.objective.distributions.held_against` finds in place of log-probabilities.

    Args:
        of: ``cross-entropy``: S = sum p_ref log p; ``forward``: S = -KL(p_ref || p), the same up to a constant; the
            loss of both has the logit gradient p - p_ref. ``reverse``: S = -KL(p || p_ref), with the logit gradient
            p (log(p / p_ref) - KL).
        smoothing: p_ref is replaced by (1 - smoothing) p_ref + smoothing / V, with V words.
        floor: is then added to every probability, and the sum made one again.
    """

    of: Literal["cross-entropy", "forward", "reverse"] = "cross-entropy"
    smoothing: float = 0.0
    floor: float = 0.0

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return torch.ones_like(logp_T)


@dataclass(frozen=True)
class Divergence:
    """DIVERGENCE: minus a divergence of the next-token distribution p from a teacher's, t, at the same token.

    As with :class:`RefCE` no function of the taken token's log-probability; the teacher reads rows of its own, and
    what it says at the trained tokens stands beside the policy's. See :mod:`.divergence`.

    Args:
        of: ``reverse``: KL(p || t), with the logit gradient p (log(p / t) - KL); ``forward``: KL(t || p), p - t;
            ``jsd``: (1 - alpha) KL(p || m) + alpha KL(t || m), m = (1 - alpha) p + alpha t, with the logit gradient
            (1 - alpha) p (log(p / m) - KL(p || m)).
        alpha: the teacher's share of the mixture, more than 0 and less than 1.
        top_k: only the words that the policy finds likeliest, so many; 0: all.
        tail: the other words are one more word; without it they are left out, and the rest is made to add up to one.
    """

    of: Literal["reverse", "forward", "jsd"]
    alpha: float = 0.5
    top_k: int = 0
    tail: bool = False

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return logp_T

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return torch.ones_like(logp_T)
