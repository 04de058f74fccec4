"""thence's own step with faults switched on: same arguments as :func:`thence.train.step.train_step`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from thence.errors import UserError
from thence.faults.around import Call, Link, Proceed
from thence.faults.catalogue import combine
from thence.faults.cut import CutPlan, PolicyFacts, Window
from thence.faults.fault import Fault
from thence.objective import Batch, Logp, TokenStats, divisors, local_counts
from thence.train.parallel import Ranks
from thence.train.policy import Policy
from thence.train.step import Observer, StepReport, StepSettings, policy_statistics, train_step

CONSTANT_TOKENS = 64.0


class FaultyStep:
    """A step with faults, made once for a training run: some of them remember earlier steps.

    Args:
        names: keys of :data:`~thence.faults.catalogue.FAULTS`; none: the clean step.
        micro_batch: rows of a micro-batch of the trainer that has the fault.
        accumulation: its micro-batches of one rank in one step; 0: as many as the rows need.
        ranks: its data-parallel ranks; this process plays them all.
        constant_tokens: tokens a response that ``constant-divisor`` divides by.

    Attributes:
        window: the rows and weights of the latest step, as they went into the model.

    Raises:
        UserError: an unknown fault.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        micro_batch: int,
        accumulation: int = 0,
        ranks: int = 1,
        constant_tokens: float = CONSTANT_TOKENS,
    ):
        self.plan = CutPlan(micro_batch, accumulation, ranks)
        self.constant_tokens = constant_tokens
        self.window: Window | None = None
        self._faults = faults = combine(names)
        self._changes = [(fault.change, fault.unseen) for fault in faults if fault.change is not None]
        self._links = [*_links(faults, self.plan, True), self._change, *_links(faults, self.plan, False)]

    def __call__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        ranks: Ranks,
        settings: StepSettings,
        observe: Observer | None = None,
    ) -> StepReport:
        """Take one step with the faults.

        Args:
            observe: called only while the rows and their trained tokens are those of ``batch``.

        Raises:
            UserError: several real processes share the step, or the batch lacks what a fault is about.
            StepRefused: as the clean step does.
        """
        if ranks.world > 1:
            raise UserError(
                "faults play all ranks in one process, but several processes share this step",
                remedy="start a single process and give the number of ranks to the fault",
            )
        for fault in self._faults:
            lacking = fault.needs.lacking(batch)
            if lacking:
                raise UserError(
                    f"{fault.name} is a fault of what this batch lacks: {lacking[0]}",
                    remedy="take another fault, or a method that has it; docs/faults.md says what each needs",
                    field="fault",
                )
        call = Call(policy, optimizer, Window(batch, self.plan.cut(len(batch.rows))), ranks, settings, observe)
        return _proceed(self._links, self._clean, call)

    def _clean(self, call: Call) -> StepReport:
        self.window = call.window
        return train_step(call.policy, call.optimizer, call.window.batch, call.ranks, call.settings, call.observe)

    def _change(self, call: Call, proceed: Proceed) -> StepReport:
        before = window = logged = call.window
        policy = self._policy(call)
        for change, unseen in self._changes:
            window = change(window, policy)
            logged = logged if unseen else change(logged, policy)
        same = [row.n_trained for row in before.batch.rows] == [row.n_trained for row in window.batch.rows]
        changed = replace(call, window=window, observe=call.observe if same else None)
        hidden = any(unseen for _, unseen in self._changes)
        if not hidden or not all(isinstance(term.surrogate, Logp) for term in window.batch.terms):
            return proceed(changed)
        loss = LoggedLoss(logged.batch, changed.observe)
        report = proceed(replace(changed, observe=loss))
        return replace(report, loss=loss.value)

    def _policy(self, call: Call) -> PolicyFacts:
        def statistics(rows):
            return policy_statistics(call.policy, rows, call.window.batch.temperature, call.settings)

        config = call.policy.model.config
        pad = getattr(config, "pad_token_id", None)
        end = getattr(config, "eos_token_id", None)
        pad = pad if pad is not None else end[0] if isinstance(end, list) else end
        longest = int(getattr(config, "max_position_embeddings", None) or 2**31)
        return PolicyFacts(statistics, int(pad or 0), longest, self.constant_tokens)


class LoggedLoss:
    """The likelihood loss that a trainer logs: of every micro-batch, whether its gradient arrives or not.

    Args:
        batch: the rows with the weights that they have in the log.
        then: another observer.
    """

    def __init__(self, batch: Batch, then: Observer | None):
        self.divisor_J = torch.tensor(divisors(batch.terms, local_counts(batch)), dtype=torch.float64)
        self.batch, self.then, self.value = batch, then, 0.0

    def __call__(self, group: Sequence[int], stats: TokenStats) -> None:
        parts = stats.logp_T.detach().double().cpu().split([self.batch.rows[i].n_trained for i in group])
        for i, logp_n in zip(group, parts, strict=True):
            weight_n = (self.batch.rows[i].weights.double() / self.divisor_J[:, None]).sum(0)
            self.value -= float((weight_n * logp_n).sum())
        if self.then is not None:
            self.then(group, stats)


def _links(faults: Sequence[Fault], plan: CutPlan, outermost: bool) -> list[Link]:
    return [fault.wrap(plan) for fault in faults if fault.wrap is not None and fault.outermost == outermost]


def _proceed(links: Sequence[Link], last: Proceed, call: Call) -> StepReport:
    if not links:
        return last(call)
    return links[0](call, partial(_proceed, links[1:], last))
