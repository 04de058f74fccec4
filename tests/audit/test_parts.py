"""Updates that are right but for a factor from part to part: shards clipped by themselves, a divisor set for some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.audit.test_audit import faults, micro_batch_mean, step, token_mean
from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence
from thence.audit.result import Case, CaseResult
from thence.audit.solve.probe import Probe

State = dict[str, torch.Tensor]
CLIP = 0.5


def case_of(ranks: int = 2, **settings: Any) -> Case:
    return Case("case", 2, 8 // (2 * ranks), ranks, **settings)


def judged(probe: Probe, judge: Judge, case: Case, change: Callable[[State], State], loss: Any = token_mean) -> Any:
    """A step of ``loss`` whose gradient was changed before it was taken, under the eyes of the judge."""
    before, after = step(probe, case, loss)
    gradient = change({name: (before[name] - after[name]) / case.lr for name in before})
    states = [before, {name: before[name] - case.lr * gradient[name] for name in before}]
    return judge.case(case, Evidence(states, pieces=judge.plan(case)))


def clipped(gradient: State, ranks: int, clip: float = CLIP) -> State:
    """Every rank's rows of every parameter, clipped by the norm of these rows."""
    parts = {name: list(g.chunk(ranks)) for name, g in gradient.items()}
    for rank in range(ranks):
        norm = torch.stack([chunks[rank].norm() for chunks in parts.values() if rank < len(chunks)]).norm()
        for chunks in parts.values():
            if rank < len(chunks):
                chunks[rank] = chunks[rank] * min(1.0, clip / float(norm))
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


def detail(result: CaseResult, name: str) -> str:
    return next(finding.detail for finding in result.all_findings if finding.id == name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_clipped_by_themselves_are_named(probe: Probe, judge: Judge, ranks: int) -> None:
    result = judged(probe, judge, case_of(ranks, clip=CLIP), lambda g: clipped(g, ranks))
    assert faults(result) == {"clipped-by-shard"}, result.reason
    assert f"{ranks} ranks" in detail(result, "clipped-by-shard")
    assert "norm 0.5 by itself" in detail(result, "clipped-by-shard")


def test_a_shard_below_the_clip_stays_as_it_is(probe: Probe, judge: Judge) -> None:
    norms: list[float] = []

    def between(gradient: State) -> State:
        for rank in range(2):
            norms.append(float(torch.stack([g.chunk(2)[rank].norm() for g in gradient.values()]).norm()))
        return gradient

    assert not faults(judged(probe, judge, case_of(), between))
    clip = sum(norms) / 2
    assert 0.9 < clip / max(norms) < 0.995  # the factors differ by less than the eye sees in a log
    result = judged(probe, judge, case_of(clip=clip), lambda g: clipped(g, 2, clip))
    assert faults(result) == {"clipped-by-shard"}


def test_the_rule_of_the_weights_is_named_beside(probe: Probe, judge: Judge) -> None:
    result = judged(probe, judge, case_of(clip=CLIP), lambda g: clipped(g, 2), micro_batch_mean)
    assert faults(result) == {"clipped-by-shard", "micro-batch-mean"}


def test_a_gradient_clipped_by_the_whole_norm_is_in_order(probe: Probe, judge: Judge) -> None:
    result = judged(probe, judge, case_of(clip=CLIP), lambda g: clipped(g, 1))
    assert result.status == "judged" and not faults(result)


def test_shards_scaled_by_something_else_are_not_called_clipped(probe: Probe, judge: Judge) -> None:
    def one_half(gradient: Mapping[str, torch.Tensor]) -> State:
        return {n: torch.cat([c * (0.5 if i else 1.0) for i, c in enumerate(g.chunk(2))]) for n, g in gradient.items()}

    result = judged(probe, judge, case_of(), one_half)
    assert faults(result) == {"scale-by-shard"}
    assert "0.5" in detail(result, "scale-by-shard")


def test_a_divisor_that_is_set_for_some_modules_only_is_named(probe: Probe, judge: Judge) -> None:
    """As set_gradient_divide_factor on the root alone: the layers are averaged over ranks, the rest is added up."""

    def root_only(gradient: State) -> State:
        return {name: g / (2 if ".layers." in name else 1) for name, g in gradient.items()}

    result = judged(probe, judge, Case("case", 4, 1, 2), root_only)
    assert faults(result) == {"scale-by-parameter", "scale-ranks"}
    assert "3 of 21 parameters" in detail(result, "scale-by-parameter")
    assert "is 2 times that of the others" in detail(result, "scale-by-parameter")


def test_noise_is_not_explained_by_factors(probe: Probe, judge: Judge) -> None:
    def noisy(gradient: State) -> State:
        torch.manual_seed(0)
        return {name: g + 0.1 * g.norm() * torch.randn_like(g) / g.numel() ** 0.5 for name, g in gradient.items()}

    result = judged(probe, judge, case_of(clip=CLIP), noisy)
    assert result.status == "not judged"
