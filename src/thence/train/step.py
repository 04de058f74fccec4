"""The training step. Count first; add weighted sums; divide by one number per term, known before the first backward.

    L(theta) = - sum over tokens t, terms j of  weight[t, j] * S_j(t; theta) / Z_j

The gradient cannot depend on how the batch was cut into micro-batches, packed, ordered or spread over ranks:
nothing is ever averaged per micro-batch or per rank, and Z_j is counted over all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thence.errors import StepRefused
from thence.models.packing import attending
from thence.objective import BareRow, Batch, TokenStats, divisors, local_counts
from thence.train.micro_batches import scoring_passes, step_passes
from thence.train.parallel import Ranks, SingleProcess
from thence.train.policy import Policy, Scorer
from thence.train.step_sums import StepSums

Observer = Callable[[Sequence[int], TokenStats], None]


@dataclass(frozen=True)
class StepSettings:
    """What decides memory, speed and clipping of a step, but not its objective.

    Args:
        micro_batch_tokens: most tokens in one forward pass, padding included.
        packing: lay rows end to end instead of padding them.
        clip_norm: largest global gradient norm; 0: no clipping.
        compute_dtype: of the forward and backward pass; the weights and the loss stay float32 or better.
        skip_norm: a gradient norm above which no step is taken; 0: never.
    """

    micro_batch_tokens: int = 8192
    packing: bool = False
    clip_norm: float = 1.0
    compute_dtype: torch.dtype = torch.float32
    skip_norm: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was, over all ranks.

    Args:
        loss: the objective.
        grad_norm: global gradient norm before clipping.
        entropy: mean entropy of the next-token distribution over trained tokens, nats.
        logp: mean log-probability of trained tokens, nats; its negative is the token-mean cross-entropy.
        clip_share: share of trained tokens whose gradient a clip held back.
        tokens: tokens in the rows, prompts included, padding not.
        trained_tokens: tokens that were trained.
        rows: rows in the batch.
        micro_batches: forward passes of this rank.
        skipped: the gradient norm was above ``skip_norm``; model and optimizer are as they were.
        seconds: wall time.
    """

    loss: float
    grad_norm: float
    entropy: float
    logp: float
    clip_share: float
    tokens: int
    trained_tokens: int
    rows: int
    micro_batches: int
    skipped: bool
    seconds: float


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    ranks: Ranks,
    settings: StepSettings,
    observe: Observer | None = None,
) -> StepReport:
    """Take one optimizer step on the batch; this rank holds its own rows of it.

    Args:
        observe: called for every micro-batch with the indices of its rows and the statistics of their trained tokens.

    Raises:
        StepRefused: the loss, a log-probability or the gradient norm is not finite, or the tokens that went through the
            model are not those that were counted. The parameters are then as they were.
    """
    start = time.perf_counter()
    counts = ranks.sum_counts(local_counts(batch))
    counted, rows = counts[:2]
    mine = accumulate_gradients(policy, optimizer, batch, counts, settings, ranks, observe)
    parameters = policy.trained()
    ranks.sum_gradients(parameters)
    sums = mine.over(ranks)
    norm = ranks.global_norm(gradients_of(parameters))
    _check(sums, norm, counted, optimizer)
    skipped = 0 < settings.skip_norm < norm
    if settings.clip_norm and norm > settings.clip_norm:
        for gradient in gradients_of(parameters):
            gradient.mul_(settings.clip_norm / norm)
    if not skipped:
        optimizer.step()
    trained = max(counted, 1)
    return StepReport(
        loss=sums.loss.item(),
        grad_norm=norm,
        entropy=sums.entropy.item() / trained,
        logp=sums.logp.item() / trained,
        clip_share=sums.clipped.item() / trained,
        tokens=int(sums.tokens),
        trained_tokens=counted,
        rows=rows,
        micro_batches=mine.passes,
        skipped=skipped,
        seconds=time.perf_counter() - start,
    )


def accumulate_gradients(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    counts: Sequence[int],
    settings: StepSettings,
    ranks: Ranks | None = None,
    observe: Observer | None = None,
) -> StepSums:
    """Add up the gradient of this rank's rows in ``p.grad``.

    Args:
        counts: the sums over ranks of :func:`~thence.objective.local_counts`.
        ranks: who trains rows of its own with the same shards; this process alone when absent.
    """
    optimizer.zero_grad(set_to_none=True)
    divisor_J = divisors(batch.terms, counts)
    sums, learned = StepSums.zero(policy.device), False
    cut = (settings.micro_batch_tokens, settings.packing, policy.device, ranks or SingleProcess())
    with attending(policy.model, settings.packing):
        for step_pass in step_passes(batch, *cut):
            micro, learns = step_pass.micro, step_pass.learns
            with torch.set_grad_enabled(learns), policy.computing(settings.compute_dtype):
                loss, stats = policy(micro, step_pass.inputs, batch.terms, divisor_J, batch.temperature)
            if learns:
                policy.sum_after(last=step_pass.last)
                loss.backward()
                learned = True
            if step_pass.rows:  # without rows it only keeps other ranks company
                sums, own = sums.plus(loss, stats, micro.tokens), step_pass.own_statistics(stats)
                if observe is not None:
                    observe(step_pass.group, own)
    policy.settle()
    if not learned:  # the optimizer is to see a gradient of zero, not none: its moments decay all the same
        for parameter in policy.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return sums


def policy_statistics(
    policy: Scorer,
    rows: Sequence[BareRow],
    temperature: float,
    settings: StepSettings,
    ranks: Ranks | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and entropies of every row's trained tokens under the policy as it stands, without gradient.

    Args:
        ranks: who else scores rows of its own with the same shards; this process alone when absent.

    Returns:
        For each row two tensors of shape (n,) on the CPU.
    """
    result: dict[int, tuple[Tensor, Tensor]] = {}
    cut = (settings.micro_batch_tokens, settings.packing, policy.device, ranks or SingleProcess())
    for scoring in scoring_passes(rows, *cut):
        with torch.no_grad(), policy.computing(settings.compute_dtype):
            measured = policy.statistics(scoring.micro, temperature)
        sizes = [rows[i].n_trained for i in scoring.group]
        if scoring.rows:  # without rows it only kept other ranks company
            own = scoring.own(torch.stack(measured)).cpu().split(sizes, 1)
            result |= {i: (logp, entropy) for i, (logp, entropy) in zip(scoring.group, own, strict=True)}
    policy.settle()
    return [result[i] for i in range(len(rows))]


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _check(sums: StepSums, norm: float, counted: int, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that would harm the model; the gradient is thrown away and the parameters stay."""
    loss, seen, no_logp = sums.loss.item(), int(sums.seen), math.isnan(sums.logp.item())
    if math.isfinite(loss) and not no_logp and math.isfinite(norm) and seen == counted:
        return
    optimizer.zero_grad(set_to_none=True)
    if seen != counted:
        raise StepRefused(
            f"{counted} trained tokens were counted but {seen} went through the model",
            remedy="this is a fault of thence: please report it with the recipe",
        )
    # the loss of rows without weight is 0
    told = "the model's log-probabilities are NaN" if no_logp else f"the gradient norm is {norm}"
    raise StepRefused(
        f"the step was not taken: the loss is {loss:.6g}, {told}",
        remedy="take a lower learning rate",
        field="lr",
    )
