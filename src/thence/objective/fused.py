"""The objective from hidden states, in chunks of tokens, so that the logits of all tokens are never held at once.

The loss is a weighted sum of elementwise functions of each token's log-probability (and entropy). Weights and divisors
are known before the forward pass, so the gradient with respect to a chunk's logits is known as soon as the logits are.
The forward pass computes it. Nothing is recomputed, and no logits are kept for the backward pass. Extra memory: one
chunk of logits for any number of tokens; a second one of another model where a term compares whole distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thence.objective.distributions import compares, distils, held_against
from thence.objective.surrogates import Bounded, Context, Divergence, Entropy, RefCE
from thence.objective.terms import Term

CHUNK_BYTES = 32 * 2**20  # of logits; larger chunks gain no speed and cost memory


@dataclass(frozen=True)
class Head:
    """A model's output layer: ``logits = cap(scale * (hidden @ weight.T + bias))``, ``cap(x) = c tanh(x / c)``.

    Args:
        weight_VD: the output embedding, shape (V, D).
        bias_V: shape (V,), or None.
        scale: a constant (Cohere, Granite).
        softcap: c, or None: no soft-capping (Gemma 2).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TokenInputs:
    """What the objective needs of the trained tokens of one micro-batch, besides their hidden states.

    Args:
        target_T: the token that was taken, shape (T,), int64.
        weight_JT: weights, one row a term, shape (J, T).
        behaviour_T: see :class:`~thence.objective.surrogates.Context`.
        reference_T: the same under the reference policy.
    """

    target_T: Tensor
    weight_JT: Tensor
    behaviour_T: Tensor | None = None
    reference_T: Tensor | None = None

    def context(self, term: int, part: slice = slice(None)) -> Context:
        """The context of one term for a part of the tokens."""
        behaviour = None if self.behaviour_T is None else self.behaviour_T[part]
        reference = None if self.reference_T is None else self.reference_T[part]
        return Context(self.weight_JT[term, part], behaviour, reference)


@dataclass(frozen=True)
class ReferenceStates:
    """What a reference model or a teacher says at the places of the trained tokens, before its output layer.

    Args:
        hidden_TD: its last hidden states at the positions that predict the trained tokens, shape (T, D of its own).
        head: its own output layer, over the same vocabulary.
    """

    hidden_TD: Tensor
    head: Head


@dataclass(frozen=True)
class TokenStats:
    """Detached measurements of every trained token.

    Args:
        logp_T: log-probability of the taken token, nats.
        entropy_T: entropy of the next-token distribution, nats.
        slope_T: -dL/dlogp: the weight that the token got, surrogate slope and normaliser included.
        clipped_T: whether a clip held its gradient back.
    """

    logp_T: Tensor
    entropy_T: Tensor
    slope_T: Tensor
    clipped_T: Tensor


def logits_of(hidden_TD: Tensor, head: Head) -> Tensor:
    """The model's own logits, shape (..., V), float32 or better; for checks, since all are held at once."""
    return _logits(hidden_TD, head, 1.0)


def token_statistics(
    hidden_TD: Tensor, head: Head, target_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the taken tokens, without gradient. Shapes (T,), (T,); float32 or better."""
    logps, entropies = [], []
    with torch.no_grad():
        for part in _chunks(hidden_TD, head.weight_VD):
            log_p_CV = _log_softmax(_logits(hidden_TD[part], head, temperature))
            logps.append(log_p_CV.gather(1, target_T[part, None])[:, 0])
            entropies.append(-(log_p_CV.exp() * log_p_CV).sum(1))
    empty = hidden_TD.new_zeros(0, dtype=_wide(hidden_TD.dtype))
    return torch.cat([empty, *logps]), torch.cat([empty, *entropies])


def objective(
    hidden_TD: Tensor,
    head: Head,
    inputs: TokenInputs,
    terms: Sequence[Term],
    divisor_J: Sequence[float],
    temperature: float = 1.0,
    reference: ReferenceStates | None = None,
    teacher: ReferenceStates | None = None,
) -> tuple[Tensor, TokenStats]:
    """The loss of one micro-batch: ``- sum_j sum_t weight[j, t] S_j(t) / Z_j``, and what was measured on the way.

    Args:
        hidden_TD: last hidden states at the positions that predict the trained tokens, shape (T, D).
        head: the output layer.
        inputs: targets, weights and old log-probabilities of the same tokens.
        terms: the batch's terms.
        divisor_J: Z of each term, for the whole optimizer step.
        temperature: the logits are divided by it.
        reference: of the same tokens, for terms that compare whole distributions (RefCE); it gets no gradient.
        teacher: the same of a teacher, for terms that diverge from it (Divergence). None is allowed where none of
            these tokens has a weight on such a term.

    Returns:
        The loss (a scalar that may be called ``backward`` on) and the statistics.

    Raises:
        ValueError: a term compares with another model, and there is none, or one of another vocabulary.
    """
    others = (_checked_reference(reference, head, terms), _checked_teacher(teacher, head, terms, inputs))
    loss, logp_T, entropy_T, slope_T = _Objective.apply(
        hidden_TD, head.weight_VD, head.bias_V, head, inputs, tuple(terms), tuple(divisor_J), temperature, others
    )
    clipped_T = torch.zeros_like(logp_T, dtype=torch.bool)
    for j, term in enumerate(terms):
        if isinstance(term.surrogate, Bounded) and inputs.behaviour_T is not None:
            clipped_T |= term.surrogate.held_back(logp_T, inputs.context(j)) & (inputs.weight_JT[j] != 0)
    return loss, TokenStats(logp_T, entropy_T, slope_T, clipped_T)


def _checked_reference(reference: ReferenceStates | None, head: Head, terms: Sequence[Term]) -> ReferenceStates | None:
    if not compares(terms):
        return None
    if reference is None:
        raise ValueError("a RefCE term compares with a reference model, and its hidden states are not given")
    return _of_one_vocabulary(reference, head, "reference model")


def _checked_teacher(
    teacher: ReferenceStates | None, head: Head, terms: Sequence[Term], inputs: TokenInputs
) -> ReferenceStates | None:
    if not distils(terms):
        return None
    if teacher is not None:
        return _of_one_vocabulary(teacher, head, "teacher")
    diverging = [j for j, term in enumerate(terms) if isinstance(term.surrogate, Divergence)]
    if inputs.weight_JT[diverging].any():
        raise ValueError("a Divergence term has weights, and the teacher's hidden states are not given")
    return None


def _of_one_vocabulary(states: ReferenceStates, head: Head, who: str) -> ReferenceStates:
    if len(states.head.weight_VD) != len(head.weight_VD):
        words = f"{len(states.head.weight_VD)} and {len(head.weight_VD)} words"
        raise ValueError(f"{who} and policy have other vocabularies: {words}")
    return states


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, head, inputs, terms, divisor_J, temperature, others):
        wide = _wide(hidden_TD.dtype)
        n = hidden_TD.shape[0]
        loss = torch.zeros((), dtype=wide, device=hidden_TD.device)
        logp_T, entropy_T, slope_T = (torch.zeros(n, dtype=wide, device=hidden_TD.device) for _ in range(3))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if wants_bias else None
        for part in _chunks(hidden_TD, weight_VD):
            logits_CV = _logits(hidden_TD[part], head, temperature)
            slope_CV = None if head.softcap is None else _softcap_slope(logits_CV, head.softcap / temperature)
            log_p_CV = _log_softmax(logits_CV)
            target_C = inputs.target_T[part, None]
            logp_C = log_p_CV.gather(1, target_C)[:, 0]
            p_CV = log_p_CV.exp()
            entropy_C = -(p_CV * log_p_CV).sum(1)
            value, slope_C, bonus_C = _weigh(logp_C, entropy_C, inputs, terms, divisor_J, part)
            compared_CV = None
            for states, kind in zip(others, (RefCE, Divergence), strict=True):
                if states is None:
                    continue
                log_ref_CV = _log_softmax(_logits(states.hidden_TD[part], states.head, temperature))
                weighed = _compared(inputs, terms, divisor_J, part, wide, kind)
                more, grad_CV = held_against(weighed, p_CV, log_p_CV, log_ref_CV)
                value, log_ref_CV = value + more, None  # a chunk's logits are freed at once
                compared_CV = grad_CV if compared_CV is None else compared_CV.add_(grad_CV)
            loss -= value
            logp_T[part], entropy_T[part], slope_T[part] = logp_C, entropy_C, slope_C
            if wants_hidden or wants_weight or wants_bias:
                grad_CV = _logit_gradient(p_CV, log_p_CV, target_C, slope_C, entropy_C, bonus_C)
                if compared_CV is not None:
                    grad_CV = grad_CV.add_(compared_CV)
                grad_CV = grad_CV.div_(temperature / head.scale)
                if slope_CV is not None:
                    grad_CV.mul_(slope_CV)
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(hidden_TD.dtype)
                if grad_hidden_TD is not None:
                    torch.mm(grad_CV, weight_VD.to(grad_CV.dtype), out=grad_hidden_TD[part])
                if grad_weight_VD is not None:
                    grad_weight_VD += (grad_CV.T @ hidden_TD[part]).to(wide)
                del grad_CV  # the next chunk does not find it beside its own
        ctx.gradients = (
            grad_hidden_TD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(logp_T, entropy_T, slope_T)
        return loss, logp_T, entropy_T, slope_T

    @staticmethod
    def backward(ctx, *grad_outputs):
        upstream = grad_outputs[0]
        gradients = tuple(None if g is None else g * upstream.to(g.dtype) for g in ctx.gradients)
        ctx.gradients = None
        return (*gradients, None, None, None, None, None, None)


def _weigh(logp_C, entropy_C, inputs: TokenInputs, terms, divisor_J, part: slice):
    """The chunk's weighted sum, its slope per token for the log-probability, and the weight of its entropy."""
    value = torch.zeros((), dtype=logp_C.dtype, device=logp_C.device)
    slope_C, bonus_C = torch.zeros_like(logp_C), None
    for j, term in enumerate(terms):
        context = inputs.context(j, part)
        weight_C = context.weight_T.to(logp_C.dtype) / divisor_J[j]
        if isinstance(term.surrogate, Entropy):
            value = value + (weight_C * entropy_C).sum()
            bonus_C = weight_C if bonus_C is None else bonus_C + weight_C
        elif not isinstance(term.surrogate, RefCE | Divergence):
            value = value + (weight_C * term.surrogate.value(logp_C, context)).sum().to(logp_C.dtype)
            # old log-probabilities may be wider than the model's
            slope_C = slope_C + (weight_C * term.surrogate.slope(logp_C, context)).to(logp_C.dtype)
    return value, slope_C, bonus_C


def _compared(inputs: TokenInputs, terms, divisor_J, part: slice, dtype: torch.dtype, kind: type):
    """The chunk's terms of a kind that compares with another model, with their weights over the normaliser, (C,)."""
    return [
        (term.surrogate, inputs.weight_JT[j, part].to(dtype) / divisor_J[j])
        for j, term in enumerate(terms)
        if isinstance(term.surrogate, kind)
    ]


def _logit_gradient(p_CV, log_p_CV, target_C, slope_C, entropy_C, bonus_C):
    """dL/dlogits: ``slope * (p - onehot)``, plus ``b * p * (log p + H)`` for the bonus. Overwrites ``p_CV``."""
    if bonus_C is None:
        grad_CV = p_CV.mul_(slope_C[:, None])
    else:
        grad_CV = p_CV.mul_(log_p_CV.add_(entropy_C[:, None]).mul_(bonus_C[:, None]).add_(slope_C[:, None]))
    return grad_CV.scatter_add_(1, target_C, -slope_C[:, None])


def _logits(hidden_CD: Tensor, head: Head, temperature: float) -> Tensor:
    """Logits over the temperature, float32 or better, in new memory."""
    logits_CV = (hidden_CD @ head.weight_VD.to(hidden_CD.dtype).T).to(_wide(hidden_CD.dtype))
    if head.bias_V is not None:
        logits_CV.add_(head.bias_V)
    if head.softcap is not None:
        return logits_CV.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / temperature)
    if temperature != head.scale:
        logits_CV.div_(temperature / head.scale)
    return logits_CV


def _softcap_slope(logits_CV: Tensor, highest: float) -> Tensor:
    """d cap(x) / dx, from the capped logits."""
    return (logits_CV / highest).square_().neg_().add_(1)


def _log_softmax(logits_CV: Tensor) -> Tensor:
    """Overwrites the logits."""
    return logits_CV.sub_(logits_CV.logsumexp(1, keepdim=True))


def _chunks(hidden_TD: Tensor, weight_VD: Tensor) -> list[slice]:
    bytes_per_token = weight_VD.shape[0] * (8 if hidden_TD.dtype == torch.float64 else 4)
    size = max(1, CHUNK_BYTES // bytes_per_token)
    return [slice(start, min(start + size, len(hidden_TD))) for start in range(0, len(hidden_TD), size)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
