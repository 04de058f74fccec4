"""The weights that a method gives, and how the step takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from thence.errors import UserError
from thence.objective import Term

Weights = Mapping[str, float | Tensor]
"""The weights of one trajectory's n response tokens, by the name of the term: a number for all, or shape (n,)."""


def laid_out(terms: Sequence[Term], weights: Weights, tokens: int) -> Tensor:
    """One trajectory's weights as the step takes them, shape (J, tokens), float64, in the order of the terms.

    Raises:
        UserError: a term has no weight, a weight no term, two terms one name, or a tensor another shape.
    """
    names = [term.name for term in terms]
    if len(names) != len(weights) or set(names) != set(weights):
        raise UserError(
            f"a method has the terms {_listed(names)}, and gives weights to {_listed(weights)}",
            remedy="let weigh() name each of its terms once; a term without a part in a trajectory gets 0",
        )
    found = torch.empty(len(terms), tokens, dtype=torch.float64)
    for row, name in zip(found, names, strict=True):
        weight = weights[name]
        if isinstance(weight, Tensor) and weight.ndim and weight.shape != (tokens,):
            raise UserError(
                f"a method gives term {name!r} weights of shape {tuple(weight.shape)} for {tokens} response tokens",
                remedy="let weigh() give a number for all tokens, or one weight a response token",
            )
        row.copy_(weight.detach()) if isinstance(weight, Tensor) else row.fill_(weight)
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
