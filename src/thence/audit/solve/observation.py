"""What a case left behind: the parameters around every optimizer step, and the rows that went forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thence.audit.result import Case, Finding

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What one case left behind.

    Args:
        folder: with ``rank-R/step-K.safetensors``.
        records: one a rank (see ``child.Session``); empty if the processes died before they wrote any.
        status: ``done``, ``skipped`` or ``failed``.
    """

    case: Case
    folder: Path
    records: tuple[Mapping[str, Any], ...]
    status: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class ForwardRow:
    """A row as it went forward: tokens and mask (1: a token, 0: padding)."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    positions: tuple[int, ...] | None
    micro_batch: int
    rank: int


def forward_rows(records: Sequence[Mapping[str, Any]], step: int, pad: int, run: str = "step") -> list[ForwardRow]:
    """The rows of all ranks that went forward after ``step`` optimizer steps and before the next.

    Args:
        run: ``step``; ``resumed``: of the run that started again; ``evaluation``.
    """
    rows = []
    for rank, record in enumerate(records):
        forwards = [
            f for f in record["forwards"] if f["step"] == step and f["input_ids"] and f.get("run", "step") == run
        ]
        for micro_batch, forward in enumerate(forwards):
            for index, ids in enumerate(forward["input_ids"]):
                mask = forward["attention_mask"]
                if mask is None or len(mask) <= index or len(mask[index]) != len(ids):
                    own_mask = _mask_of(ids, pad)
                else:
                    # Packed rows may be filled up with padding that their mask does not hide.
                    real = _mask_of(ids, pad)
                    own_mask = tuple(int(bool(m)) & r for m, r in zip(mask[index], real, strict=True))
                positions = forward["position_ids"]
                own = None
                if positions is not None and len(positions[min(index, len(positions) - 1)]) == len(ids):
                    own = tuple(positions[min(index, len(positions) - 1)])
                rows.append(ForwardRow(tuple(ids), own_mask, own, micro_batch, rank))
    return rows


def load_states(
    folder: Path, ranks: int, run: str = "step", first: int = 0
) -> tuple[list[dict[str, Tensor]], list[Finding]]:
    """Parameters before and after each step from rank 0, and what there is to say if ranks differ.

    Args:
        run: as in :func:`forward_rows`.
        first: the step before which the run starts.
    """
    from safetensors.torch import load_file

    states, findings = [], []
    while (path := folder / "rank-0" / f"{run}-{first + len(states)}.safetensors").exists():
        state = load_file(str(path))
        for rank in range(1, ranks):
            other = folder / f"rank-{rank}" / path.name
            if not other.exists():
                continue
            theirs = load_file(str(other))
            apart = [n for n in state if n in theirs and not (state[n] == theirs[n]).all()]
            if apart and not findings:
                detail = f"after step {first + len(states)}, rank {rank} differs from rank 0 in {len(apart)} parameters"
                findings.append(Finding("ranks-differ", "fault", detail))
        states.append(state)
    return states, findings


def _mask_of(ids: Sequence[int], pad: int) -> tuple[int, ...]:
    """Without an attention mask: padding is what stands at the two ends of the row and is the padding token."""
    real = [t for t, token in enumerate(ids) if token != pad]
    if not real:
        return (0,) * len(ids)
    return tuple(int(real[0] <= t <= real[-1]) for t in range(len(ids)))
