"""The rows that are due in every optimizer step of a case, and whether they were in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from thence.audit.result import Case, Finding
from thence.audit.solve.sequences import Piece


def window_sizes(case: Case) -> list[int]:
    """Rows of each optimizer step, if the last window of an epoch is trained as it is."""
    sizes = []
    for _ in range(case.epochs):
        left = case.examples
        while left > 0:
            sizes.append(min(left, case.window))
            left -= sizes[-1]
    return sizes


def planned_steps(case: Case) -> int:
    """Optimizer steps that the case should take."""
    return min(case.steps, len(window_sizes(case)))


def window_findings(
    case: Case, step: int, pieces: Sequence[Piece], seen: dict[int, int], again: bool = False
) -> list[Finding]:
    """Whether a step held the rows that were due; ``seen`` counts every example's appearances and is updated.

    Args:
        again: whether rows may come again in later steps, as in several updates from one generation.
    """
    sizes = window_sizes(case)
    examples = [p.example for p in pieces]
    times = Counter(examples)
    before, taken = {seen.get(example, 0) for example in examples}, sum(seen.values())
    for example in examples:
        seen[example] = seen.get(example, 0) + 1
    if case.packing or step > len(sizes):
        return []
    due = sizes[step - 1]
    if len(examples) == due:
        # After windows of other sizes nobody knows which epoch this one belongs to.
        return _uneven(case, step, times if again else seen, seen) if taken == sum(sizes[: step - 1]) else []
    if due < len(examples) and len(times) == due:
        often = sorted(example + 1 for example in times if times[example] > 1)
        detail = (
            f"step {step} holds {len(examples)} rows of {due} examples: {_listed(often)} "
            f"trained {max(times.values())} times"
        )
        return [Finding("rows-repeated", "note", detail)]
    if len(examples) > due and len(before) == 1 and before != {0}:
        return [Finding("window-dropped", "note", f"the last {due} examples of an epoch were not trained")]
    if len(examples) > due:
        # Every row still counts once; if the mixture is scaled wrongly, the weights say so by themselves.
        detail = f"step {step} holds {len(examples)} rows where the epoch had {due} left"
        return [Finding("window-mixed", "note", detail)]
    return [Finding("window-dropped", "note", f"step {step} holds {len(examples)} rows where {due} were due")]


def _uneven(case: Case, step: int, times: Mapping[int, int], seen: Mapping[int, int]) -> list[Finding]:
    """Whether a step of the right size trained examples again in place of others.

    Args:
        times: how often each example was trained, in this step or so far.
        seen: how often so far.
    """
    epoch = -(-sum(window_sizes(case)[:step]) // case.examples)
    lacking = [example + 1 for example in range(case.examples) if seen.get(example, 0) < epoch]
    often = sorted(example + 1 for example, count in times.items() if count > (1 if times is not seen else epoch))
    if not often or not lacking:
        return []
    where = f"step {step} holds" if times is not seen or step == 1 else f"after step {step} epoch {epoch} has trained"
    detail = f"{where} {_named(often)} more than once and {_named(lacking)} not yet"
    return [Finding("examples-uneven", "fault", detail)]


def planned_places(case: Case) -> list[list[tuple[int, int, int]]]:
    """(example, micro-batch, rank) of the rows of every step, taken in order and dealt to ranks by micro-batches."""
    steps, done = [], 0
    for size in window_sizes(case)[: case.steps]:
        micro_batches = [place // case.micro_batch for place in range(size)]
        steps.append(
            [((done + i) % case.examples, m // case.ranks, m % case.ranks) for i, m in enumerate(micro_batches)]
        )
        done += size
    return steps


def _named(numbers: Sequence[int]) -> str:
    return f"example{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"example {numbers[0]} is"
    return f"examples {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} are"
