"""The one door to a model that is trained: its body, its output layer and the objective in one module call.

FSDP gathers weights before a module's ``forward`` and frees them after it. So whatever reads the output layer's weight
must run inside of the same call as the body. Whoever trains or scores goes through here; nobody else calls the body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from thence.errors import UserError
from thence.models.layers import check_model, output_head
from thence.models.packing import is_known, way_of
from thence.objective import (
    ReferenceStates,
    Term,
    TokenInputs,
    TokenStats,
    compares,
    distils,
    objective,
    token_statistics,
)
from thence.train.forward import compute_context, hidden_states
from thence.train.lora import adapters_off
from thence.train.micro_batches import MicroBatch

REFERENCE = (
    "a term compares whole distributions with a reference model, and the policy has none to compare with",
    "give Trainer(reference=...), or call policy.compare_with(), before the first step",
)
TEACHER = (
    "a term diverges from a teacher's whole distributions, and the policy has no teacher",
    "train the method in a recipe's RL stage, or call policy.learn_from() before the first step",
)


class Scorer(Protocol):
    """What log-probabilities are asked of: a policy, or one with its adapters off."""

    @property
    def model(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def statistics(self, micro: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]: ...

    def beside(self, micro: MicroBatch, use: Callable[[ReferenceStates], None]) -> None: ...

    def computing(self, dtype: torch.dtype) -> AbstractContextManager: ...

    def settle(self) -> None: ...


class Policy(nn.Module):
    """A causal language model as the training step sees it.

    Args:
        model: a Hugging Face causal language model. Its parameters may be shards: see
            :func:`thence.train.parallel.shard.shard`.

    Attributes:
        sum_every_pass: shards are summed over ranks after every backward pass, not once a step.
        skeleton: what :func:`thence.train.weights.whole` fills with whole weights; None: ``model`` has whole weights.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.sum_every_pass = True
        self._skeleton: list[Any] = []
        self._reference: list[Scorer] = []
        self._teacher: list[Scorer] = []

    @property
    def skeleton(self) -> Any:
        """See :meth:`keep_skeleton`."""
        return self._skeleton[0] if self._skeleton else None

    def keep_skeleton(self, model: Any) -> None:
        """Keep the model without its weights, as it was before it was cut: it is filled where whole ones are needed."""
        self._skeleton = [model]  # in a list: torch would take a module for a part of the policy

    @property
    def reference(self) -> Scorer | None:
        """See :meth:`compare_with`."""
        return self._reference[0] if self._reference else None

    def compare_with(self, reference: Scorer | None) -> None:
        """Give the model whose next-token distributions terms compare with (RefCE), laid out as this one; None: none.

        It is not a part of the policy: nothing of it is trained, cut, saved or counted with it.
        """
        self._reference = [] if reference is None else [reference]

    @property
    def teacher(self) -> Scorer | None:
        """See :meth:`learn_from`."""
        return self._teacher[0] if self._teacher else None

    def learn_from(self, teacher: Scorer | None) -> None:
        """Give the model whose next-token distributions terms diverge from (Divergence), laid out as this one; it may
        be this policy itself. None: none. What :meth:`compare_with` says of its part in the policy holds here too.
        """
        self._teacher = [] if teacher is None else [teacher]

    def forward(
        self,
        micro: MicroBatch,
        inputs: TokenInputs,
        terms: Sequence[Term],
        divisor_J: Sequence[float],
        temperature: float = 1.0,
    ) -> tuple[Tensor, TokenStats]:
        """The loss of one micro-batch, and what was measured on the way.

        Args:
            inputs, terms, divisor_J, temperature: as for :func:`thence.objective.objective`.

        Raises:
            UserError: the rows are packed, and the model cannot be; a row is longer than the model's context; a term
                compares with a reference model or a teacher, and there is none.
        """
        found: list[tuple[Tensor, TokenStats]] = []

        def own_pass(reference: ReferenceStates | None = None, teacher: ReferenceStates | None = None) -> None:
            hidden_TD, head = hidden_states(self.model, micro), output_head(self.model)
            found.append(objective(hidden_TD, head, inputs, terms, divisor_J, temperature, reference, teacher))

        def with_teacher(reference: ReferenceStates | None = None) -> None:
            if micro.shown is None or not distils(terms):
                own_pass(reference)
                return
            _asked(self, self.teacher, TEACHER)(
                micro.shown,
                lambda said: own_pass(reference, ReferenceStates(micro.beside(said.hidden_TD), said.head)),
            )

        if compares(terms):
            _asked(self, self.reference, REFERENCE)(micro, with_teacher)
        else:
            with_teacher()
        return found[0]

    def statistics(self, micro: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the trained tokens of one micro-batch. Shapes (T,), (T,).

        Raises:
            UserError: as :meth:`forward`.
        """
        hidden_TD = hidden_states(self.model, micro)
        return token_statistics(hidden_TD, output_head(self.model), micro.target_T, temperature)

    def beside(self, micro: MicroBatch, use: Callable[[ReferenceStates], None]) -> None:
        """Call ``use`` with what this model says of the micro-batch, without gradient, while its weights are whole.

        For a model that another is compared with: ``use`` runs the other one's pass, in the caller's gradient mode.
        """
        use(self.said_of(micro))

    def said_of(self, micro: MicroBatch) -> ReferenceStates:
        """What this model says of the micro-batch, without gradient; where its weights are whole already."""
        with torch.no_grad():
            return ReferenceStates(hidden_states(self.model, micro), output_head(self.model))

    def check(self, packing: bool = False) -> None:
        """Make sure of what every step relies on; shards were checked as a whole model before they were cut.

        Raises:
            UserError: the step would get this model's gradient wrong, or its rows cannot be packed as asked.
        """
        if not self.sharded:
            check_model(self.model)
        if packing and self.sharded and not is_known(self.model):
            raise UserError(
                "how this model packs rows cannot be tried once its weights are cut over ranks",
                remedy="call policy.check(packing=True) before shard(), or set packing = false",
                field="packing",
            )
        if packing:
            way_of(self.model)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of every parameter."""
        return isinstance(self, FSDPModule)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def computing(self, dtype: torch.dtype) -> AbstractContextManager:
        """Where a forward pass runs; shards are cast when they are gathered."""
        return nullcontext() if self.sharded else compute_context(self.device, dtype)

    def sum_after(self, *, last: bool) -> None:
        """Say of the next backward pass whether it is the last one of its step: shards may be summed then alone."""
        if isinstance(self, FSDPModule) and not self.sum_every_pass:
            self.set_requires_gradient_sync(last)

    def settle(self) -> None:
        """Free what the last pass has gathered. The optimizer is about to change the shards it was gathered from."""
        for module in self.modules():  # layers too: with reshard_after_forward off they stay whole after a last forward
            if isinstance(module, FSDPModule):
                module.reshard()
        for other in (self.reference, self.teacher):
            if other is not None and other.model is not self.model:
                other.settle()


def _asked(
    policy: Policy, other: Scorer | None, missing: tuple[str, str]
) -> Callable[[MicroBatch, Callable[[ReferenceStates], None]], None]:
    """How another model is asked from within a policy's own pass. Raises UserError: there is none."""
    if other is None:
        raise UserError(missing[0], remedy=missing[1])
    # asked for itself, its weights are whole already, and FSDP must not free them
    return (lambda micro, use: use(policy.said_of(micro))) if other is policy else other.beside


class Unadapted:
    """A policy scored with its adapters off: what it was before they were trained, without a second copy of it."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @property
    def model(self) -> Any:
        """The model, its adapters as they stand."""
        return self.policy.model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.policy.device

    def statistics(self, micro: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As :meth:`Policy.statistics`."""
        with adapters_off(self.policy.model):
            return self.policy.statistics(micro, temperature)

    def beside(self, micro: MicroBatch, use: Callable[[ReferenceStates], None]) -> None:
        """As :meth:`Policy.beside`; called from within the policy's own pass, where its weights are whole already."""
        with adapters_off(self.policy.model):
            states = self.policy.said_of(micro)
        use(states)

    def computing(self, dtype: torch.dtype) -> AbstractContextManager:
        """As :meth:`Policy.computing`."""
        return self.policy.computing(dtype)

    def settle(self) -> None:
        """As :meth:`Policy.settle`."""
        self.policy.settle()
