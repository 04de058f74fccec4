"""Gradients of made batches, and the pieces from which the tests restate each fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thence.faults.step import FaultyStep
from thence.objective import Batch, Clip, Logp, Normaliser, Row, Term, trained_tokens
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings

CLOSE = 1e-10
PROMPTS, RESPONSES = (3, 2, 4, 2, 3, 1, 2), (2, 9, 4, 1, 12, 5, 3)
CELLS = [[0, 1], [2, 3], [4, 5], [6]]
PAD = 1  # the end token: the model has no padding token of its own
SETTINGS = StepSettings(40, False, 0.0, torch.float64)


def make_batch(count: int = 6, advantages: Sequence[float] | None = None, first: int = 0) -> Batch:
    """A token mean over random rows; with advantages, groups of three share a prompt."""
    generator = torch.Generator().manual_seed(7 + first)
    rows = []
    for i in range(count):
        prompt, response = PROMPTS[(i + first) % 7], RESPONSES[(i + first) % 7]
        ids = torch.randint(2, 40, (prompt + response,), generator=generator)
        if advantages is not None:
            ids[:prompt] = torch.tensor([9, 8, 7, 6])[:prompt] + (10 if i >= 3 else 0)
            ids = torch.cat([torch.tensor([9, 8, 7]) + (10 if i >= 3 else 0), ids[prompt:]])
            prompt = 3
        weight = 1.0 if advantages is None else advantages[i]
        weights = torch.full((1, response), weight, dtype=torch.float64)
        rows.append(Row(ids, trained_tokens(prompt, len(ids)), weights))
    surrogate = Logp() if advantages is None else Clip()
    return Batch((Term("loss", surrogate, Normaliser("tokens")),), tuple(rows))


def token_losses(model: Any, row: Row, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Negative log-probabilities of the trained tokens and entropies, from the model's own logits."""
    log_p = model(input_ids=row.token_ids[None], use_cache=False).logits[0].log_softmax(-1)
    places = row.trained.nonzero()[:, 0]
    before = (places - 1 - shift).clamp(min=0)
    return -log_p[before, row.token_ids[places]], -(log_p.exp() * log_p).sum(-1)[before]


def gradient(model: Any, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def faulty_gradients(
    model: Any, names: Sequence[str], batches: Sequence[Batch], plan=(2, 3, 1), settings: StepSettings = SETTINGS
):
    """The gradient that each batch's step applied, with a learning rate of zero: the model stays where it is."""
    step = FaultyStep(names, micro_batch=plan[0], accumulation=plan[1], ranks=plan[2], constant_tokens=17.0)
    return [applied(model, step, batch, settings) for batch in batches]


def applied(model: Any, step: FaultyStep, batch: Batch, settings: StepSettings = SETTINGS) -> Tensor | None:
    """None: no step was taken."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found: list[Tensor] = []
    optimizer.register_step_post_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())
    )
    step(Policy(model), optimizer, batch, SingleProcess(), settings)
    return found[0] if found else None


def sums(model: Any, batch: Batch) -> list[Tensor]:
    """Sum of the token losses of every row, times its weight."""
    return [(token_losses(model, row)[0] * row.weights[0]).sum() for row in batch.rows]


def by_shard(model: Any, whole_gradient: Tensor, clip: float, ranks: int) -> tuple[Tensor, list[float]]:
    """A gradient of which every rank has clipped its rows of each parameter by their own norm, and these norms."""
    owner = []
    for parameter in model.parameters():
        chunk = -(-parameter.shape[0] // ranks)
        row = torch.arange(parameter.shape[0]).view(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter)
        owner.append((row // chunk).flatten())
    rank_of = torch.cat(owner)
    norms = [whole_gradient[rank_of == rank].norm().item() for rank in range(ranks)]
    factors = torch.tensor([min(1.0, clip / norm) for norm in norms], dtype=torch.float64)
    return whole_gradient * factors[rank_of], norms


def lengths_of(batch: Batch) -> list[int]:
    return [row.n_trained for row in batch.rows]


def added(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum()


def mean_over(model: Any, batch: Batch, groups: Sequence[Sequence[int]]) -> Tensor:
    """Mean over groups of the group's token mean."""
    found, n = sums(model, batch), lengths_of(batch)
    means = [added(found[i] for i in group) / sum(n[i] for i in group) for group in groups]
    return added(means) / len(groups)


def only(model: Any, batch: Batch, rows: Sequence[int]) -> Tensor:
    """The token mean of the window, of which only some rows arrive."""
    found = sums(model, batch)
    return added(found[i] for i in rows) / sum(lengths_of(batch))


def whole(model: Any, batch: Batch) -> Tensor:
    return only(model, batch, range(len(batch.rows)))


def by_token(model: Any, batch: Batch, weight: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    parts = [token_losses(model, row) for row in batch.rows]
    return added((nll * weight(nll, h).detach()).sum() for nll, h in parts) / sum(lengths_of(batch))


def with_prompt(batch: Batch) -> Batch:
    rows = [
        Row(r.token_ids, trained_tokens(1, len(r.token_ids)), torch.ones(1, len(r.token_ids) - 1)) for r in batch.rows
    ]
    return replace(batch, rows=tuple(rows))


def cut_off(batch: Batch, first: int, last: int) -> Batch:
    """Without some trained tokens at the two ends of every response."""
    rows = []
    for row in batch.rows:
        places = row.trained.nonzero()[:, 0][first : row.n_trained - last]
        trained = torch.zeros_like(row.trained)
        trained[places] = True
        rows.append(Row(row.token_ids, trained, torch.ones(1, len(places))))
    return replace(batch, rows=tuple(rows))


def shortened(batch: Batch) -> Batch:
    """Every response up to half the length of the longest."""
    most = max(row.n_trained for row in batch.rows) // 2
    parts = [cut_off(replace(batch, rows=(row,)), 0, max(row.n_trained - most, 0)).rows[0] for row in batch.rows]
    return replace(batch, rows=tuple(parts))


def padded(batch: Batch, cells: Sequence[Sequence[int]]) -> Batch:
    rows = list(batch.rows)
    for cell in cells:
        longest = max(len(batch.rows[i].token_ids) for i in cell)
        for i in cell:
            row, missing = batch.rows[i], longest - len(batch.rows[i].token_ids)
            ids = torch.cat([row.token_ids, torch.full((missing,), PAD)])
            trained = torch.cat([row.trained, torch.ones(missing, dtype=torch.bool)])
            rows[i] = Row(ids, trained, torch.ones(1, int(trained.sum())))
    return replace(batch, rows=tuple(rows))


def together(batch: Batch, cells: Sequence[Sequence[int]]) -> Batch:
    def join(name: str, cell: Sequence[int], dim: int = 0) -> Tensor:
        return torch.cat([getattr(batch.rows[i], name) for i in cell], dim=dim)

    rows = tuple(Row(join("token_ids", c), join("trained", c), join("weights", c, 1)) for c in cells)
    return replace(batch, rows=rows)
