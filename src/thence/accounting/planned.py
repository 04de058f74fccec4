"""What a plan says of a recipe: the figures of each stage and of all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thence.accounting.flops import Counts
from thence.accounting.layout import Layout
from thence.accounting.memory import PER_ROW, Held, Memory
from thence.accounting.traffic import Sent


@dataclass(frozen=True, slots=True)
class Executed:
    """FLOPs that a stage executes, by what they are for: exact ones, at mean lengths.

    Args:
        training: forward and backward passes, recomputation included.
        scoring: passes without gradient: of the policy before and between its steps, of a reference, of a teacher.
        sampling: responses.
    """

    training: float = 0.0
    scoring: float = 0.0
    sampling: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.training + self.scoring + self.sampling


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What the responses of a stage are sampled with, and how many there are.

    Args:
        responses: of the whole stage, over all ranks.
        batches: in which they are sampled, one after the other.
        rows: that a rank samples in parallel at most.
        prompt, response: mean lengths, tokens.
        longest: tokens of the longest response that is allowed.
        weights: bytes that are read for every token of the rows in parallel.
        cache: bytes of the cache for a token of a row.
        size: bytes of a number.
    """

    responses: float
    batches: int
    rows: int
    prompt: float
    response: float
    longest: int
    weights: int
    cache: int
    size: int


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
    executed: Executed | None = None
    """Prompts, attention, the output head, scoring and recomputation included, at mean lengths."""
    memory: Memory | None = None
    rollout_rows: int | None = None
    """Responses that a rank samples in parallel."""
    sent: tuple[Sent, ...] = ()
    """What a rank sends to others in an optimizer step, and before it samples."""
    at_least: StagePlan | None = None
    """Tokens and FLOPs of the cheapest outcome, where outcomes decide; those above are of the dearest."""
    rollouts: Rollouts | None = None
    """How its responses are sampled; None: it samples none, or another program does that is not known."""
    micro_batch_tokens: int = 0
    """Tokens of one pass of a rank; 0: it has no passes."""
    step_rows: int = 0
    """Rows of an optimizer step, over all ranks; 0: it has no steps."""

    @property
    def exact_flops(self) -> float | None:
        """FLOPs that it executes."""
        return None if self.executed is None else self.executed.total

    def scaled(self, share: float) -> StagePlan:
        """This stage where it ends after so much of itself, at a whole step."""

        def part(value: float | None) -> float | None:
            return None if value is None else value * share

        done, drawn = self.executed, self.rollouts
        return replace(
            self,
            optimizer_steps=None if self.optimizer_steps is None else max(1, round(self.optimizer_steps * share)),
            trained_tokens=part(self.trained_tokens),
            generated_tokens=part(self.generated_tokens),
            rule_flops=part(self.rule_flops),
            executed=done and Executed(done.training * share, done.scoring * share, done.sampling * share),
            rollouts=drawn
            and replace(drawn, responses=drawn.responses * share, batches=max(1, round(drawn.batches * share))),
            at_least=None,
        )

    def most_rows(self, device_bytes: float) -> int | None:
        """How many responses a rank of so much memory can sample in parallel; None: the stage samples none itself."""
        if self.memory is None or not self.rollout_rows:
            return None
        of_rows = sum(line.bytes for line in self.memory.lines if line.name in PER_ROW)
        fixed = self.memory.held("always") + self.memory.held("rollout") - of_rows
        return max(0, int((device_bytes - fixed) // (of_rows / self.rollout_rows)))


ALONE = Held()
"""One rank that holds everything."""


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
    held: Held = ALONE
    """How a rank holds the model while it trains."""

    def total(self, quantity: str, at_least: bool = False) -> float | None:
        """Sum of a quantity over the stages; None when a stage that has it does not know it.

        Args:
            at_least: of the cheapest outcome instead of the dearest.
        """
        stages = [stage for stage in self.stages if stage.kind != "eval"]
        values = [getattr(stage.at_least or stage if at_least else stage, quantity) for stage in stages]
        return None if any(value is None for value in values) else sum(values)
