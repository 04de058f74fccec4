"""The gradient of every single token's negative log-probability, in float64: the columns of the linear system."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thence.audit.result import RESPONSE_ROLES
from thence.audit.solve.sequences import Piece

MAX_COORDINATES = 60_000
"""Of a model with more parameters, that many coordinates drawn at random stand for all: each is one equation."""


@dataclass(frozen=True)
class TokenGradients:
    """Per-token gradients of one row.

    Args:
        gradients: shape (targets, coordinates), float64: of -log p of every target token, the second token first.
        logp: log-probabilities of the targets, nats, shape (targets,).
        entropy: of the distributions that predict them, nats, shape (targets,).
        uniform: gradients of the mean over the vocabulary of -log p, for label smoothing, shaped like ``gradients``;
            or None.
    """

    gradients: np.ndarray
    logp: np.ndarray
    entropy: np.ndarray
    uniform: np.ndarray | None = None


class Differentiator:
    """A float64 copy of the model, and the parameters in which gradients are taken.

    Args:
        model: any module whose forward takes ``input_ids`` of shape (1, T) and gives ``.logits``, or logits.
        names: parameters to look at, in the order of the coordinates.
        temperature: logits are divided by it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], temperature: float = 1.0):
        self.temperature = temperature
        self.model = model.double().eval().requires_grad_(True)
        if hasattr(model, "set_experts_implementation"):
            # The fast way of transformers through mixtures of experts refuses float64.
            with contextlib.suppress(Exception):
                model.set_experts_implementation("eager")  # pyright: ignore
        self.names = list(names)
        self._parameters = dict(model.named_parameters())
        size = sum(self._parameters[name].numel() for name in self.names)
        self.coordinates = None
        if size > MAX_COORDINATES:
            generator = torch.Generator().manual_seed(0)
            self.coordinates = torch.randperm(size, generator=generator)[:MAX_COORDINATES].sort().values

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the parameters to those of a snapshot."""
        with torch.no_grad():
            for name, value in state.items():
                if name in self._parameters:
                    self._parameters[name].copy_(value.double())

    def flat(self, state: Mapping[str, Tensor]) -> np.ndarray:
        """A snapshot as one vector, shape (coordinates,), float64."""
        flat = torch.cat([state[name].double().reshape(-1) for name in self.names])
        return (flat if self.coordinates is None else flat[self.coordinates]).numpy()

    def blocks(self) -> list[tuple[str, slice]]:
        """Where each parameter lies in the coordinates."""
        result, start = [], 0
        for name in self.names:
            size = self._parameters[name].numel()
            result.append((name, start, start + size))
            start += size
        if self.coordinates is None:
            return [(name, slice(a, b)) for name, a, b in result]
        edges = self.coordinates.numpy()
        return [(n, slice(int(np.searchsorted(edges, a)), int(np.searchsorted(edges, b)))) for n, a, b in result]

    def tokens(
        self,
        ids: Sequence[int],
        *,
        shift: int = 0,
        uniform: bool = False,
        positions: Sequence[int] | None = None,
        mask: Sequence[int] | None = None,
    ) -> TokenGradients:
        """Gradients for one row of token ids, shape (T,).

        Args:
            shift: the target at place t is the token ``shift`` places further on (1: labels shifted twice; -1: not at
                all); targets beyond the row count as its last token.
            uniform: also the gradients of label smoothing.
            positions: position ids, where they do not count up from 0.
            mask: attention mask, where padding stands in the row.
        """
        row = torch.tensor([list(ids)])
        extra: dict[str, Any] = {} if positions is None else {"position_ids": torch.tensor([list(positions)])}
        if positions is not None:
            # One packed row in which every token sees all before it: say so, or transformers masks it by positions.
            size = len(ids)
            extra["attention_mask"] = torch.full((size, size), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        if mask is not None:
            extra["attention_mask"] = torch.tensor([list(mask)])
        logp_TV = self._logp(row, self.temperature, **extra)
        places = (torch.arange(1, len(ids)) + shift).clamp(0, len(ids) - 1)
        logp_T = logp_TV.gather(1, row[0, places][:, None])[:, 0]
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        gradients = self._rows(-logp_T)
        smooth = self._rows(-logp_TV.mean(-1)) if uniform else None
        return TokenGradients(gradients, logp_T.detach().numpy(), entropy_T.detach().numpy(), smooth)

    def objective(self, pieces: Sequence[Piece], weights: np.ndarray) -> dict[str, Tensor]:
        """Gradient of a weighted sum of the negative log-probabilities of responses, whole, by parameter.

        Args:
            weights: of the response tokens of each piece, shape (pieces,).
        """
        tokens = [
            np.where([role in RESPONSE_ROLES for role in piece.roles[1:]], float(weight), 0.0)
            for piece, weight in zip(pieces, weights, strict=True)
        ]
        return self.weighted(pieces, tokens)

    def weighted(
        self, pieces: Sequence[Piece], weights: Sequence[np.ndarray], temperature: float | None = None
    ) -> dict[str, Tensor]:
        """Gradient of a weighted sum of negative log-probabilities, whole, by parameter.

        Args:
            weights: of every target of each piece, its second token first, shape (T - 1,) each.
            temperature: None: the differentiator's own.
        """
        parameters = [self._parameters[name] for name in self.names]
        total = torch.zeros((), dtype=torch.float64)
        for piece, weight in zip(pieces, weights, strict=True):
            row = torch.tensor([list(piece.ids)])
            logp_TV = self._logp(row, self.temperature if temperature is None else temperature)
            total = total - (torch.from_numpy(weight) * logp_TV.gather(1, row[0, 1:, None])[:, 0]).sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for name, parameter, gradient in zip(self.names, parameters, found, strict=True)
        }

    def logits(self, ids: Sequence[int]) -> Tensor:
        """What the model says of every target of a row, before any temperature, shape (T - 1, vocabulary)."""
        with torch.no_grad():
            output = self.model(input_ids=torch.tensor([list(ids)]))
            logits = output.logits if hasattr(output, "logits") else output
            return logits[0, :-1].double()

    def beside(
        self, ids: Sequence[int], reference: Tensor, measure: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gradients that a loss may have beside those of the tokens: of the entropy of the distribution that predicts
        each target, and of its distance from a reference, both of shape (targets, coordinates).

        Args:
            reference: logits of the reference policy or the teacher, shape (targets, vocabulary).
            measure: the distance, from the log-probabilities of the model and of the reference.
        """
        logp_TV = self._logp(torch.tensor([list(ids)]), self.temperature)
        theirs_TV = torch.log_softmax(reference / self.temperature, dim=-1)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        return self._rows(entropy_T), self._rows(measure(logp_TV, theirs_TV))

    def _logp(self, row: Tensor, temperature: float, **extra: Any) -> Tensor:
        """Log-probabilities of all tokens at every target of a row, nats, shape (T - 1, vocabulary)."""
        output = self.model(input_ids=row, **extra)
        logits = output.logits if hasattr(output, "logits") else output
        return torch.log_softmax(logits[0, :-1].double() / temperature, dim=-1)

    def _rows(self, values_T: Tensor) -> np.ndarray:
        """Jacobian of a vector, shape (T, coordinates)."""
        parameters = [self._parameters[name] for name in self.names]
        size = len(values_T)
        try:
            parts = torch.autograd.grad(
                values_T, parameters, torch.eye(size, dtype=values_T.dtype), retain_graph=True,
                is_grads_batched=True, allow_unused=True,
            )  # fmt: skip
        except RuntimeError:
            # A model whose backward has no batching rule: one token after the other.
            parts = self._one_by_one(values_T, parameters)
        flat = torch.cat(
            [
                torch.zeros(size, p.numel(), dtype=torch.float64) if part is None else part.reshape(size, -1).double()
                for p, part in zip(parameters, parts, strict=True)
            ],
            dim=1,
        )
        return (flat if self.coordinates is None else flat[:, self.coordinates]).numpy()

    @staticmethod
    def _one_by_one(values_T: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        rows = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in values_T]
        return [
            None if rows[0][i] is None else torch.stack([row[i] for row in rows])  # pyright: ignore
            for i in range(len(parameters))
        ]


def probability_features(tokens: TokenGradients) -> dict[str, np.ndarray]:
    """What a token-dependent weight may depend on, by name, shape (targets,)."""
    p = np.exp(tokens.logp)
    return {"probability": p, "one minus probability": 1 - p, "entropy": tokens.entropy}
