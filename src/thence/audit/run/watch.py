"""Watch the optimizers of a step: which there are, how often they are called, and the gradients that they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from thence.audit.judge.evidence import OptimizerStep


class OptimizerWatch:
    """A context in which every ``torch.optim.Optimizer.step`` is seen, of classes of one's own too.

    An optimizer that calls others counts as one. An optimizer over other tensors than the model's parameters
    (float32 copies, shards) shows nothing, and one that is called with a closure shows no gradients.

    Args:
        model: the model that is trained; parameters that are put into it later are seen as well.
        before: its parameters before the step, by name.
    """

    def __init__(self, model: nn.Module, before: Mapping[str, Tensor]):
        self._model, self._before = model, before
        self._names: list[str] = []
        self._gradients: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._left: dict[str, Tensor] = {}
        self._alone, self._hidden, self._depth = True, False, 0
        self._handles: list[Any] = []

    def __enter__(self) -> OptimizerWatch:
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def seen(self, after: Mapping[str, Tensor]) -> OptimizerStep | None:
        """What was seen; None: no optimizer of the model's parameters, or gradients that nobody could see.

        Args:
            after: parameters after the step, by name.
        """
        if not self._calls or self._hidden:
            return None
        alone = self._alone
        for name, value in after.items():
            was = self._left.get(name, self._before.get(name))
            moved = was is None or not torch.equal(was, value)
            changed = name in self._before and not torch.equal(self._before[name], value)
            alone = alone and not moved and not (changed and name not in self._gradients)
        return OptimizerStep(tuple(self._names), self._gradients, max(self._calls.values()), alone)

    def _own(self, optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [(names[id(p)], p) for p in parameters if id(p) in names]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1
        own = self._own(optimizer) if self._depth == 1 else []
        if not own:
            return
        name = type(optimizer).__name__
        if name not in self._names:
            self._names.append(name)
        # A closure runs inside the step, so the gradients there now are not the ones that it takes.
        self._hidden = self._hidden or any(callable(value) for value in (*args, *kwargs.values()))
        for name, parameter in own:
            was = self._left.get(name, self._before.get(name))
            self._alone = self._alone and was is not None and torch.equal(was, parameter.detach().cpu())
            self._calls[name] = self._calls.get(name, 0) + 1
            if parameter.grad is not None and name not in self._gradients:
                gradient = parameter.grad.detach()
                self._gradients[name] = (gradient.to_dense() if gradient.is_sparse else gradient).cpu().clone()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self._left |= {name: parameter.detach().cpu().clone() for name, parameter in self._own(optimizer)}
