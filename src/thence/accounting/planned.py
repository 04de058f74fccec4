"""What a plan says of a recipe: the figures of each stage and of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from thence.accounting.flops import Counts
from thence.accounting.layout import Layout
from thence.accounting.memory import PER_ROW, Memory
from thence.accounting.traffic import Sent


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage costs. None: cannot be known from what was given."""

    name: str
    kind: str
    optimizer_steps: int | None = None
    trained_tokens: float | None = None
    """Trained tokens: responses, or whole rows if prompts are trained too."""
    generated_tokens: float | None = None
    rule_flops: float | None = None
    """:func:`thence.accounting.flops.rule_flops`, prompts left out, as the paper does."""
    exact_flops: float | None = None
    """Prompts, attention, the output head, scoring and recomputation included, at mean lengths."""
    memory: Memory | None = None
    rollout_rows: int | None = None
    """Responses that a rank samples in parallel."""
    sent: tuple[Sent, ...] = ()
    """What a rank sends to others in an optimizer step, and before it samples."""
    at_least: StagePlan | None = None
    """Tokens and FLOPs of the cheapest outcome, where outcomes decide; those above are of the dearest."""

    def most_rows(self, device_bytes: float) -> int | None:
        """How many responses a rank of so much memory can sample in parallel; None: the stage samples none itself."""
        if self.memory is None or not self.rollout_rows:
            return None
        of_rows = sum(line.bytes for line in self.memory.lines if line.name in PER_ROW)
        fixed = self.memory.held("always") + self.memory.held("rollout") - of_rows
        return max(0, int((device_bytes - fixed) // (of_rows / self.rollout_rows)))


@dataclass(frozen=True, slots=True)
class Plan:
    """The budget of a whole recipe."""

    model: str
    counts: Counts | None
    stages: tuple[StagePlan, ...]
    ranks: int
    assumptions: tuple[str, ...]
    layout: Layout = "none"
    """How the ranks share training."""
    device_bytes: float | None = None
    """Memory of one rank; None: not known."""

    def total(self, quantity: str, at_least: bool = False) -> float | None:
        """Sum of a quantity over the stages; None when a stage that has it does not know it.

        Args:
            at_least: of the cheapest outcome instead of the dearest.
        """
        stages = [stage for stage in self.stages if stage.kind != "eval"]
        values = [getattr(stage.at_least or stage if at_least else stage, quantity) for stage in stages]
        return None if any(value is None for value in values) else sum(values)
