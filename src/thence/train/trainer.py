"""A model with its optimizers and schedule: the step, made usable without a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from thence.accounting.meter import FlopMeter
from thence.errors import CheckpointError, UserError
from thence.objective import BareRow, Batch, compares, distils
from thence.train.average import MovingAverage
from thence.train.parallel import Ranks, SingleProcess
from thence.train.policy import Policy, Scorer
from thence.train.recompute import recompute
from thence.train.step import Observer, StepReport, StepSettings, policy_statistics, train_step

AVERAGE = "average"
"""The kind under which the moving average stands among the tensors of a checkpoint."""
TakeStep = Callable[[Policy, torch.optim.Optimizer, Batch, Ranks, StepSettings, Observer | None], StepReport]


class Trainer:
    """Takes optimizer steps on batches.

    A method with two kinds of step (ReLIFT, SASR) names them and gets an AdamW state for each.

    Args:
        model: a causal language model with float32 or float64 weights, or a policy that holds one.
        learning_rate: a number, or a function of the number of steps taken.
        settings: micro-batches, clipping, precision.
        activation_checkpointing: see :func:`thence.train.recompute.recompute`.
        ranks: who shares the step; this process alone when absent.
        take_step: the step itself; a faulty one, to see what a fault does.
        meter: counts the FLOPs of every pass.
        reference: a frozen model to compare with, or a policy that holds one; for methods that look at the whole
            next-token distributions of a reference model (ASFT, GIFT).
        average: follows the policy after every step of the kind ``main``, and is part of the state.

    Raises:
        UserError: the model is one whose gradient the step would get wrong, that cannot be packed as asked, or whose
            layers cannot be recomputed.
    """

    def __init__(
        self,
        model: Any,
        learning_rate: float | Callable[[int], float],
        settings: StepSettings | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        activation_checkpointing: bool | int = False,
        ranks: Ranks | None = None,
        take_step: TakeStep = train_step,
        meter: FlopMeter | None = None,
        reference: Any = None,
        average: MovingAverage | None = None,
    ):
        self.policy = model if isinstance(model, Policy) else Policy(model)
        self.model, self.settings, self.ranks = self.policy.model, settings or StepSettings(), ranks or SingleProcess()
        self.policy.check(self.settings.packing)
        self.reference: Scorer | None = (
            Policy(reference) if isinstance(reference, nn.Module) and not isinstance(reference, Policy) else reference
        )
        self.policy.compare_with(self.reference)
        self.learning_rate: Callable[[int], float] = (
            learning_rate if callable(learning_rate) else lambda _: float(learning_rate)  # type: ignore[arg-type]
        )
        self.steps_taken = 0
        self.take_step, self.meter, self.average = take_step, meter, average
        self._adamw = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._optimizers: dict[str, torch.optim.AdamW] = {}
        if activation_checkpointing:
            recompute(self.model, activation_checkpointing)

    def step(
        self,
        batch: Batch,
        optimizer: str = "main",
        observe: Observer | None = None,
        *,
        lr: float | None = None,
        clip_norm: float | None = None,
    ) -> StepReport:
        """Take one optimizer step; see :func:`thence.train.step.train_step`.

        Args:
            optimizer: kind of step. Only ``main`` moves the schedule on; others take the rate that it stands at.
            lr: learning rate of this step instead.
            clip_norm: largest gradient norm of this step instead.
        """
        adamw = self.optimizer(optimizer)
        for group in adamw.param_groups:
            group["lr"] = self.learning_rate(self.steps_taken) if lr is None else lr
        settings = self.settings if clip_norm is None else replace(self.settings, clip_norm=clip_norm)
        report = self.take_step(self.policy, adamw, batch, self.ranks, settings, observe)
        self.steps_taken += optimizer == "main"
        if self.average is not None and optimizer == "main":
            self.average.follow(self.policy)
        if self.meter is not None:
            live = [row.weights.any() for row in batch.rows]
            self.meter.trained(*_sizes([row for row, is_live in zip(batch.rows, live, strict=True) if is_live]))
            self.meter.scored(*_sizes([row for row, is_live in zip(batch.rows, live, strict=True) if not is_live]))
            if compares(batch.terms):  # the reference model reads every row beside the policy
                self.meter.scored(*_sizes(batch.rows))
            if distils(batch.terms):  # a teacher, the rows that it is shown
                pairs = zip(batch.rows, live, strict=True)
                self.meter.scored(*_sizes([row.shown for row, is_live in pairs if is_live and row.shown is not None]))
        return report

    def statistics(self, rows: Sequence[BareRow], temperature: float = 1.0) -> list[tuple[Tensor, Tensor]]:
        """Log-probabilities and entropies of the rows' trained tokens under the model as it stands."""
        if self.meter is not None:
            self.meter.scored(*_sizes(rows))
        return policy_statistics(self.policy, rows, temperature, self.settings, self.ranks)

    @property
    def vocabulary(self) -> int:
        """Words that the model's next-token distributions are over."""
        return self.model.get_output_embeddings().weight.shape[0]

    def reference_logps(self, rows: Sequence[BareRow], temperature: float = 1.0) -> list[Tensor]:
        """Log-probabilities of the rows' trained tokens under the reference model, shape (n,) each, on the CPU.

        Raises:
            UserError: there is no reference model.
        """
        if self.reference is None:
            raise UserError(
                "log-probabilities under a reference model are asked for, and the trainer has none",
                remedy="give Trainer(reference=...): the model as it stands before the first step",
            )
        if self.meter is not None:
            self.meter.scored(*_sizes(rows))
        found = policy_statistics(self.reference, rows, temperature, self.settings, self.ranks)
        return [logp for logp, _ in found]

    def optimizer(self, name: str) -> torch.optim.AdamW:
        """The optimizer of this kind of step, made when first asked for."""
        if name not in self._optimizers:
            self._optimizers[name] = make_adamw(self.model, **self._adamw)
        return self._optimizers[name]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything but the weights that a resumed run needs: plain values, and tensors by name."""
        tensors = {}
        for kind, optimizer in self._optimizers.items():
            for name, parameter in self.model.named_parameters():
                for field, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{kind}/{name}/{field}"] = value
        if self.average is not None:
            tensors |= {f"{AVERAGE}/{name}/weight": value for name, value in self.average.weights().items()}
        return {"steps_taken": self.steps_taken, "optimizers": sorted(self._optimizers)}, tensors

    def empty_state(self, plain: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Tensors to be filled with a state that was written: of a parameter's shape, cut as the parameter is.

        Args:
            plain: what :meth:`state` gave besides the tensors.
            shapes: of the tensors that were written, by name; others than those of :meth:`state` are left alone.
        """
        parameters, found = dict(self.model.named_parameters()), {}
        kinds = {*plain["optimizers"], AVERAGE} if self.average is not None else set(plain["optimizers"])
        for key, shape in shapes.items():
            kind, _, rest = key.partition("/")
            name, _, _ = rest.partition("/")
            if kind in kinds and (parameter := parameters.get(name)) is not None:
                like = shape == parameter.shape and parameter.ndim
                found[key] = torch.zeros_like(parameter.detach()) if like else torch.zeros(shape)
        return found

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up a state that :meth:`state` gave; the model's weights are restored by the caller.

        Raises:
            CheckpointError: it lacks the moving average.
        """
        self.steps_taken = plain["steps_taken"]
        self._optimizers.clear()
        parameters = dict(self.model.named_parameters())
        for kind in plain["optimizers"]:
            self.optimizer(kind)
        averaged: dict[str, Tensor] = {}
        for key, value in tensors.items():
            kind, name, field = key.split("/")
            if kind == AVERAGE:
                averaged[name] = value
                continue
            parameter = parameters[name]
            # the count of steps too: the fused AdamW reads it where the parameter is
            self.optimizer(kind).state[parameter][field] = value.clone().to(parameter.device)
        if self.average is not None:
            if missing := next((name for name in self.average.weights() if name not in averaged), None):
                raise CheckpointError(
                    f"the checkpoint does not hold the teacher's moving average ({missing})",
                    remedy="--restart the run, or resume it with the options that it was begun with",
                )
            self.average.restore(averaged)


def _sizes(rows: Sequence[BareRow]) -> tuple[list[int], int]:
    """Tokens of every row, and trained tokens of all."""
    return [len(row.token_ids) for row in rows], sum(row.n_trained for row in rows)


def make_adamw(model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); matrices are decayed, vectors (norms, biases) are not. The caller sets the rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
