"""Every fault by name, in the order in which several are applied: which rows, then weights, then layout, then step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thence.errors import UserError
from thence.faults import around, rows, weights
from thence.faults.cut import Cut
from thence.faults.fault import Fault, Needs
from thence.faults.policy_catalogue import POLICY_FAULTS

PAPER = "arXiv 2604.23747"
COUNTING = "the count of tokens is local: transformers before 4.46, OpenRLHF before 0.11"


def _rows_of(cut: Cut) -> list[tuple[int, ...]]:
    return [(i,) for cell in cut.micro_batches for i in cell]


def _passes(cut: Cut) -> list[tuple[int, ...]]:
    """The rows that all ranks hold in the same slot."""
    return (
        [sum((slots[k] for slots in cut.cells if k < len(slots)), ()) for k in range(cut.slots)] if cut.shares else []
    )


def _is_first(rank: int, slot: int, cut: Cut) -> bool:
    return slot == 0


def _is_not_first(rank: int, slot: int, cut: Cut) -> bool:
    return slot != 0


def _is_first_or_last(rank: int, slot: int, cut: Cut) -> bool:
    return slot == 0 or weights.is_last(rank, slot, cut)


def _of_another_rank(rank: int, slot: int, cut: Cut) -> bool:
    return rank != cut.ranks - 1


_TWO = Needs(micro_batches=2)

_OF_ROWS = (
    Fault(
        "window-mixed", "incomplete windows go into the next epoch's first step", ("window-mixed",),
        Needs(incomplete=True, steps=2), "a counter of micro-batches that runs on over the end of an epoch",
        wrap=around.mixed, outermost=True, remembers=True,
    ),
    Fault(
        "rows-repeated", "rows repeated to fill the last micro-batches", ("rows-repeated", "double-counted"),
        Needs(short=True), "samplers that hand out equal shares (torch DistributedSampler)", rows.rows_repeated,
    ),
    Fault(
        "prompt-trained", "prompt trained", ("prompt-trained",), Needs(),
        "labels that are a copy of the input", rows.prompt_trained,
    ),
    Fault(
        "padding-trained", "padding trained", ("padding-trained",), Needs(micro_batch=2),
        "labels of padding that are not masked", rows.padding_trained,
    ),
    Fault(
        "end-missing", "end token not trained", ("end-missing",), Needs(),
        "pad token = end token, masked in the labels", rows.end_missing,
    ),
    Fault(
        "first-missing", "first response token not trained", ("first-missing",), Needs(),
        "a mask shifted by one against the labels", rows.first_missing,
    ),
)  # fmt: skip

_OF_WEIGHTS_AND_STEPS = (
    Fault(
        "responses-truncated", "responses trained up to half the longest one", ("tokens-dropped", "end-missing"),
        Needs(), "a maximal length for training that is shorter than that for sampling", rows.responses_truncated,
    ),
    Fault(
        "advantage-std", "advantages divided by the group's standard deviation", ("advantage",),
        Needs(advantages=True), "GRPO's default, where Dr. GRPO was asked for (arXiv 2503.20783)",
        weights.advantage_by_std,
    ),
    Fault(
        "advantage-whitened", "advantages normalised over the whole batch", ("advantage",), Needs(advantages=True),
        "whitening switched on by default", weights.advantage_whitened,
    ),
    Fault(
        "sequence-means", "mean of sequence means", ("sequence-mean",), Needs(),
        "GRPO's aggregation where a token mean was asked for (arXiv 2402.03300, 2503.14476)",
        weights.by_means(_rows_of),
    ),
    Fault(
        "mean-of-means", "mean of micro-batch means", ("micro-batch-mean",), _TWO,
        f"{PAPER}, the second of its two bugs; {COUNTING}",
        weights.by_means(lambda cut: cut.micro_batches),
    ),
    Fault(
        "sum-of-means", "sum of micro-batch means", ("micro-batch-mean",), _TWO,
        "a loss not divided by the accumulation steps", weights.sum_of_means, also=("scale-accumulation", "scale"),
    ),
    Fault(
        "rank-means", "mean of rank means", ("rank-mean",), Needs(ranks=2),
        f"data-parallel averaging of local means; {COUNTING}", weights.by_means(lambda cut: cut.shares),
    ),
    Fault(
        "pass-means", "mean over accumulation steps of the mean over ranks", ("pass-mean",),
        Needs(micro_batches=2, ranks=2), "tokens counted over ranks but not over accumulation",
        weights.by_means(_passes),
    ),
    Fault(
        "micro-batch-sequence-means", "mean over micro-batches of the mean of sequence means",
        ("micro-batch-sequence-mean",), Needs(short=True), "sequence means averaged per micro-batch",
        weights.means_of_sequence_means,
    ),
    Fault(
        "constant-divisor", "constant divisor", ("constant-divisor", "scale"), Needs(steps=2),
        "Dr. GRPO's aggregation where a token mean was asked for (arXiv 2503.20783)", weights.constant_divisor,
    ),
    Fault(
        "first-micro-batch-only", "first micro-batch only", ("first-only",), _TWO,
        "a gradient buffer that is copied once and not added to", weights.keeping(_is_first),
        unseen=True,
    ),
    Fault(
        "last-micro-batch-only", "last micro-batch only", ("last-only",), _TWO,
        "a gradient buffer that is overwritten: DeepSpeed before 0.19, boundary set by hand",
        weights.keeping(weights.is_last), unseen=True,
    ),
    Fault(
        "first-and-last-only", "first and last micro-batch only", ("first-and-last-only",), Needs(micro_batches=3),
        f"{PAPER}, the first of its two bugs: DeepSpeed before 0.19, ZeRO stage 2 with the optimizer on the CPU",
        weights.keeping(_is_first_or_last), unseen=True,
    ),
    Fault(
        "first-micro-batch-lost", "first micro-batch lost", ("all-but-first",), Needs(micro_batches=3),
        "gradients set to zero after the first backward of a step instead of before it",
        weights.keeping(_is_not_first), unseen=True,
    ),
    Fault(
        "rank-missing", "the last rank's gradient is missing", ("rank-missing",), Needs(ranks=2),
        "an all-reduce that one rank does not take part in", weights.keeping(_of_another_rank),
        unseen=True,
    ),
    Fault(
        "double-counted", "examples of the first micro-batch counted twice", ("double-counted",), _TWO,
        "a hook that adds a gradient which backward has added already", weights.double_counted,
    ),
    Fault(
        "incomplete-window-scaled", "incomplete window divided by the planned accumulation",
        ("incomplete-window-scaled",), Needs(incomplete=True), "a loss divided by the configured accumulation steps",
        weights.times(lambda cut: cut.slots / cut.accumulation),
    ),
    Fault(
        "times-accumulation", "too large by the number of micro-batches", ("scale-accumulation",), _TWO,
        "a sum over all tokens whose engine multiplies by the accumulation steps", weights.times(lambda cut: cut.slots),
    ),
    Fault(
        "over-accumulation", "too small by the number of micro-batches", ("scale-accumulation",), _TWO,
        "divided by the tokens of the step and by the accumulation steps as well",
        weights.times(lambda cut: 1 / cut.slots),
    ),
    Fault(
        "times-ranks", "too large by the number of ranks", ("scale-ranks",), Needs(ranks=2),
        "multiplied for an average over ranks that is a sum", weights.times(lambda cut: cut.ranks),
    ),
    Fault(
        "over-ranks", "too small by the number of ranks", ("scale-ranks",), Needs(ranks=2),
        "a loss divided by the tokens of all ranks and by the ranks as well", weights.times(lambda cut: 1 / cut.ranks),
    ),
    Fault(
        "probability-weighted", "token weights proportional to their probability", ("token-dependent",), Needs(),
        "DFT (arXiv 2508.05629) where SFT was asked for", weights.by_token(lambda logp, entropy: logp.exp()),
    ),
    Fault(
        "entropy-weighted", "token weights proportional to the entropy", ("token-dependent",), Needs(),
        "entropy-based token selection left on", weights.by_token(lambda logp, entropy: entropy),
    ),
    Fault(
        "contaminated", "packed rows see each other", ("contaminated",), Needs(micro_batch=2),
        "packing without an attention that keeps examples apart", rows.run_together,
    ),
    Fault(
        "labels-shifted", "labels shifted twice", ("labels-shifted",), Needs(),
        "labels shifted by the data and by the model", wrap=around.labels_shifted,
    ),
    Fault(
        "left-out-of-all-reduce", "the input embedding is left out of the all-reduce", ("differs-by-parameter",),
        Needs(ranks=2), "tied or frozen groups that the reducer does not know", wrap=around.left_out,
    ),
    Fault(
        "gradient-averaged", "the summed gradient is divided by the number of ranks", ("scale-ranks",),
        Needs(ranks=2), "FSDP2's default, an average, of a loss divided by the tokens of all ranks: no "
        "set_gradient_divide_factor(1.0)", wrap=around.averaged,
    ),
    Fault(
        "shard-clipped", "each rank clips its shard by the shard's own norm", ("clipped-by-shard",),
        Needs(ranks=2, clip=True), "a norm of local shards that is not summed over ranks (pytorch 170862)",
        wrap=around.clipped_by_shard,
    ),
    Fault(
        "gradient-leak", "gradient of the step before not cleared", ("leak",), Needs(steps=2),
        "zero_grad that is skipped at a boundary", wrap=around.leak, remembers=True,
    ),
    Fault(
        "no-step", "no step for an incomplete window", ("no-step", "window-dropped"), Needs(incomplete=True),
        "OpenRLHF 0.9.10 with fewer micro-batches than the engine counts", wrap=around.no_step,
    ),
)  # fmt: skip

_ALL = (*_OF_ROWS, *POLICY_FAULTS, *_OF_WEIGHTS_AND_STEPS)

FAULTS: Mapping[str, Fault] = {fault.name: fault for fault in _ALL}
"""In the order of application, which does not depend on the order of the names."""


def combine(names: Sequence[str]) -> tuple[Fault, ...]:
    """Several faults in the order of application.

    Raises:
        UserError: there is no fault of that name.
    """
    for name in names:
        if name not in FAULTS:
            raise UserError(f"there is no fault {name!r}", remedy=f"use one of {', '.join(FAULTS)}", field="fault")
    return tuple(fault for fault in _ALL if fault.name in names)
