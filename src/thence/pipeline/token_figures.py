"""What training made of each token of a few responses of a step, kept for the reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thence.data.trajectory import Trajectory
from thence.objective import Row, Term, TokenStats, is_penalty
from thence.train.step import Observer

KEPT = 2  # responses of a step whose tokens are kept
MOST_TOKENS = 400  # of a response whose tokens are kept: 25 kB of a step at most
_DIGITS = 4


class TokenFigures:
    """Collects the figures of the tokens of a few responses: of the first right one, and of the first other one.

    Args:
        terms: of the method.
        candidates: responses of which some are kept; those that are too long are passed over.
    """

    def __init__(self, terms: Sequence[Term], candidates: Sequence[Trajectory]) -> None:
        self.taught_J = [not is_penalty(term) for term in terms]
        self.chosen = _chosen(candidates)
        self.found: dict[int, dict[str, list[float]]] = {}

    def observer(self, trajectories: Sequence[Trajectory], rows: Sequence[Row]) -> Observer | None:
        """For :meth:`Trainer.step` on these rows; None where none of the chosen responses is among them."""
        places = {i: id(t) for i, t in enumerate(trajectories) if any(t is chosen for chosen in self.chosen)}
        if not places:
            return None

        def observe(group: Sequence[int], stats: TokenStats) -> None:
            ends = torch.tensor([rows[i].n_trained for i in group]).cumsum(0).tolist()
            for i, end in zip(group, ends, strict=True):
                if i in places and places[i] not in self.found:
                    part = slice(end - rows[i].n_trained, end)
                    self.found[places[i]] = {
                        "weight": _short(stats.slope_T[part]),
                        "advantage": _short(rows[i].weights[self.taught_J].sum(0)),
                        "log-probability": _short(stats.logp_T[part]),
                    }

        return observe

    def of(self, trajectory: Trajectory, tokenizer: Any) -> Mapping[str, Any] | None:
        """The figures of a response's tokens, with their texts; None where they were not kept.

        ``weight`` is what a token's gradient of log-probability was multiplied by in the step, surrogate and normaliser
        included; ``advantage`` the weight that the method gave; ``log-probability`` in nats, before the step.
        """
        figures = self.found.get(id(trajectory))
        if figures is None or len(figures["weight"]) != len(trajectory.response_ids):
            return None
        return {"text": [tokenizer.decode([token]) for token in trajectory.response_ids], **figures}


def _chosen(candidates: Sequence[Trajectory]) -> list[Trajectory]:
    """A right one and another one where there are both; else the first ones."""
    fitting = [t for t in candidates if 0 < len(t.response_ids) <= MOST_TOKENS]
    right = [t for t in fitting if t.verdict == "right"]
    other = [t for t in fitting if t.verdict != "right"]
    return [*right[:1], *other[:1]] if right and other else fitting[:KEPT]


def _short(values: torch.Tensor) -> list[float]:
    """Plain numbers with a few digits; what is not finite becomes 0, for no step is taken with it."""
    plain = torch.nan_to_num(values.detach().double().cpu(), nan=0.0, posinf=0.0, neginf=0.0).tolist()
    return [float(f"{value:.{_DIGITS}g}") for value in plain]
