"""Optimizers by name for steps under audit: torch's own, and small ones as other packages have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Lion (arXiv 2302.06675): the sign of an interpolated momentum."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * momentum + 0.1 * p.grad).sign())
                momentum.mul_(0.99).add_(0.01 * p.grad)


class Shampoo(Optimizer):
    """Shampoo (arXiv 1802.09568) of matrices, with inverse fourth roots; other tensors by plain descent."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.double()
                if p.ndim == 2:
                    left = _root(gradient @ gradient.T, -0.25)
                    gradient = left @ gradient @ _root(gradient.T @ gradient, -0.25)
                p.sub_((group["lr"] * gradient).to(p))


class ScheduleFree(Optimizer):
    """Schedule-free AdamW (arXiv 2405.15682), first step: gradient at y, a step of z, and y between x and z."""

    def __init__(self, params: Any, lr: float = 1e-2, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                z = state.setdefault("z", p.clone())
                square = state.setdefault("square", torch.zeros_like(p))
                square.mul_(0.999).addcmul_(p.grad, p.grad, value=1e-3)
                moved = z - group["lr"] * p.grad / ((square / 1e-3).sqrt() + 1e-8)
                state["z"] = moved
                p.copy_(group["beta"] * p + (1 - group["beta"]) * moved)


class Lars(Optimizer):
    """LARS (arXiv 1708.03888): every tensor's gradient scaled to the size of the tensor."""

    def __init__(self, params: Any, lr: float = 1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.norm() > 0:
                    p.sub_(group["lr"] * p.norm().clamp(min=1e-3) / p.grad.norm() * p.grad)


def _root(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=1e-12 * float(values[-1])) ** power) @ vectors.T


def _muon(parameters: Sequence[Tensor]) -> list[Optimizer]:
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    muon: list[Optimizer] = [torch.optim.Muon(matrices, lr=1e-2)]
    return [*muon, torch.optim.AdamW(others, lr=1e-3)] if others else muon


OPTIMIZERS: Mapping[str, Callable[[Sequence[Tensor]], list[Optimizer]]] = {
    "sgd": lambda p: [torch.optim.SGD(p, lr=0.5)],
    "momentum": lambda p: [torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True)],
    "sgd-decayed": lambda p: [torch.optim.SGD(p, lr=0.1, weight_decay=0.01)],
    "adamw": lambda p: [torch.optim.AdamW(p, lr=1e-3)],
    "adam-decayed": lambda p: [torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)],
    "adamw-linear": lambda p: [torch.optim.AdamW(p, lr=1e3, betas=(0.0, 0.999), eps=1e4, weight_decay=0.0)],
    "adam-l2": lambda p: [torch.optim.Adam(p, lr=1e-3, weight_decay=0.01)],
    "nadam": lambda p: [torch.optim.NAdam(p, lr=1e-3)],
    "radam": lambda p: [torch.optim.RAdam(p, lr=1e-3)],
    "adamax": lambda p: [torch.optim.Adamax(p, lr=1e-3)],
    "rmsprop": lambda p: [torch.optim.RMSprop(p, lr=1e-3)],
    "adagrad": lambda p: [torch.optim.Adagrad(p, lr=1e-3)],
    "adadelta": lambda p: [torch.optim.Adadelta(p, lr=1.0)],
    "adafactor": lambda p: [torch.optim.Adafactor(p, lr=1e-2)],
    "muon": _muon,
    "lion": lambda p: [Lion(p)],
    "shampoo": lambda p: [Shampoo(p)],
    "schedule-free": lambda p: [ScheduleFree(p)],
    "lars": lambda p: [Lars(p)],
}
"""By name: parameters -> the optimizers over them."""
