"""Training steps as people write them at home, with the mistakes that people make: for ``thence.audit.check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tests.audit.optimizers import OPTIMIZERS

Rows = Sequence[dict[str, list[int]]]
FAR = -1e9


@dataclass(frozen=True)
class HomeMade:
    """A step over padded or packed micro-batches. The defaults are right; every field brings in one mistake.

    Args:
        optimizer: a key of ``OPTIMIZERS``: ``adamw`` as people run it, ``sgd`` with learning rate 0.5, ...
        layout: ``right`` or ``left`` padded, or ``packed`` into one row that keeps its examples apart.
        masked: attention mask (padding) or block mask (packing); False: whoever comes earlier is seen.
        extra: what is trained beside the response: ``padding``, ``boundary`` (the first token of the next packed
            example), ``prompt``, or nothing.
        missing: what of the response is not trained: ``first``, ``end``, ``late`` (behind the 8th token), or nothing.
        weight: ``tokens`` (one count of the step), ``micro-batch`` means, ``rows`` (sequence means), or
            ``probability``: by the model's own.
        order: ``right``, or ``labels``: where rows share a micro-batch, the labels of the first are moved by one.
        times: factor of micro-batches from the second on.
        scale: factor of the whole loss: a number, or ``accumulation``.
        every: whether the optimizer steps in every micro-batch.
        lost: ``first`` or ``last`` micro-batch alone arrives; or nothing.
        dropped: parameters with this in their name lose their gradient.
    """

    optimizer: str = "adamw"
    layout: Literal["right", "left", "packed"] = "right"
    masked: bool = True
    extra: Literal["", "padding", "boundary", "prompt"] = ""
    missing: Literal["", "first", "end", "late"] = ""
    weight: Literal["tokens", "micro-batch", "rows", "probability"] = "tokens"
    order: Literal["right", "labels"] = "right"
    times: float = 1.0
    scale: float | Literal["accumulation"] = 1.0
    every: bool = False
    lost: Literal["", "first", "last"] = ""
    dropped: str = ""

    @property
    def lr(self) -> float | None:
        """For ``check``: known for plain SGD alone."""
        return 0.5 if self.optimizer == "sgd" else None

    def __call__(self, model: Any, rows: Rows, micro_batch: int, accumulation: int) -> None:
        """One step."""
        optimizers = OPTIMIZERS[self.optimizer]([p for p in model.parameters() if p.requires_grad])
        micro_batches = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
        counted = [[self._labels(row) for row in micro] for micro in micro_batches]
        tokens = sum(label != -100 for micro in counted for row in micro for label in row[1:])
        for index, micro in enumerate(micro_batches):
            nll_BT, used_BT = self._nll(model, micro)
            loss = (nll_BT * self._weights(nll_BT, used_BT, tokens, len(micro_batches), len(rows))).sum()
            scale = len(micro_batches) if self.scale == "accumulation" else self.scale
            (loss * scale * (self.times if index else 1.0)).backward()
            if self.lost == "last" and index + 1 < len(micro_batches):
                model.zero_grad()
            if self.lost == "first" and index == 0:
                kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            if self.every:
                self._step(model, optimizers)
        if self.lost == "first":
            for parameter, gradient in zip(model.parameters(), kept, strict=True):  # pyright: ignore
                parameter.grad = gradient
        if not self.every:
            self._step(model, optimizers)

    def _step(self, model: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for name, parameter in model.named_parameters():
            if self.dropped and self.dropped in name:
                parameter.grad = None
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    def _labels(self, row: dict[str, list[int]]) -> list[int]:
        labels = list(row["input_ids"] if self.extra == "prompt" else row["labels"])
        labels[0] = -100
        trained = [t for t, label in enumerate(row["labels"]) if label != -100]
        gone = {"first": trained[:1], "end": trained[-1:], "late": trained[8:], "": []}[self.missing]
        for t in gone:
            labels[t] = -100
        return labels

    def _nll(self, model: Any, micro: Rows) -> tuple[Tensor, Tensor]:
        """Negative log-probabilities of the targets and which are trained, both of shape (B, T - 1)."""
        labels = [self._labels(row) for row in micro]
        if self.order == "labels" and len(micro) > 1:
            labels[0] = [-100, *labels[0][:-1]]
        if self.layout == "packed":
            return self._packed(model, micro, labels)
        longest = max(len(row["input_ids"]) for row in micro)

        def filled(values: Sequence[int], fill: int) -> list[int]:
            rest = [fill] * (longest - len(values))
            return [*rest, *values] if self.layout == "left" else [*values, *rest]

        ids = torch.tensor([filled(row["input_ids"], 0) for row in micro])
        wanted = torch.tensor([filled(own, 0 if self.extra == "padding" else -100) for own in labels])
        mask = torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in micro])
        positions = (mask.cumsum(1) - 1).clamp(min=0) if self.masked else None
        given = {"attention_mask": mask, "position_ids": positions} if self.masked else {}
        return _targets(model(input_ids=ids, **given).logits, wanted)

    def _packed(self, model: Any, micro: Rows, labels: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[token for row in micro for token in row["input_ids"]]])
        wanted = torch.tensor([[label for own in labels for label in own]])
        lengths = [len(row["input_ids"]) for row in micro]
        if self.extra == "boundary":
            starts = torch.tensor(lengths).cumsum(0)[:-1]
            wanted[0, starts] = ids[0, starts]
        if not self.masked:
            return _targets(model(input_ids=ids).logits, wanted)
        owner_T = torch.arange(len(micro)).repeat_interleave(torch.tensor(lengths))
        seen_TT = (owner_T[:, None] == owner_T[None]) & torch.ones(len(owner_T), len(owner_T)).tril().bool()
        mask = torch.zeros(1, 1, *seen_TT.shape).masked_fill(~seen_TT, FAR)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return _targets(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits, wanted)

    def _weights(self, nll_BT: Tensor, used_BT: Tensor, tokens: int, micro_batches: int, rows: int) -> Tensor:
        used = used_BT.to(nll_BT)
        if self.weight == "micro-batch":
            return used / used.sum() / micro_batches
        if self.weight == "rows":
            return used / used.sum(1, keepdim=True).clamp(min=1) / rows
        if self.weight == "probability":
            return used * torch.exp(-nll_BT).detach() / tokens
        return used / tokens


def _targets(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    targets = labels_BT[:, 1:]
    logp = torch.log_softmax(logits_BTV[:, :-1].float(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -logp, targets != -100
