"""Copies of the weights that the ranks of a run make for their engines before these load them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.rollout.vllm.stand_in import VOCAB, Make, Unigram, expected_logps
from thence.errors import UserError
from thence.pipeline.rollout_engine import RankEngine
from thence.rollout.native import Sampling
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.failures import EngineFailed
from thence.rollout.vllm.weights import Probe, probe_ids, probe_logps, scratch_folders, write_weights
from thence.train.parallel.ranks import SingleProcess


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that holds the stand-in's model, and copies and probes it."""

    def probe_of(held: RankEngine) -> Probe:
        ids = probe_ids(VOCAB)
        return Probe(ids, probe_logps(held.trainer.policy.model, ids))

    def written(trainer: Any, into: Path) -> int:
        write_weights(trainer.policy.model, into)
        return 1

    monkeypatch.setattr(RankEngine, "_probe", probe_of)
    monkeypatch.setattr("thence.pipeline.rollout_engine.write_policy", written)
    return SimpleNamespace(policy=SimpleNamespace(skeleton=None, model=Unigram(7)))


def test_weights_that_are_copied_before_they_are_loaded_are_those_of_the_copy(
    fake: Make, folder: Path, trainer: Any
) -> None:
    held = RankEngine(VllmEngine(fake(), folder), trainer, SingleProcess(), scratch_folders(), keep=1)
    handed = []
    for version, seed in ((1, 7), (2, 8)):
        trainer.policy.model = Unigram(seed)
        handed.append(held.prepare(version))
    assert held.engine.version == 0
    for one, seed in zip(handed, (7, 8), strict=True):
        held.take(one)
        assert held.engine.version == one.version
        (response,) = held.sample([[1]], [0], Sampling(20))
        expected = expected_logps(Unigram(seed), 1.0)[torch.tensor(response.token_ids)]
        assert response.logps == pytest.approx(expected.tolist(), abs=1e-5)
    held.prepare(3)
    assert [one.folder.exists() for one in handed] == [False, True]  # responses may still be sampled from the newer
    held.close()
    assert not any(folder.exists() for folder in held.scratch)


def test_an_engine_that_fails_is_started_again_once_with_the_same_weights(
    fake: Make, folder: Path, trainer: Any
) -> None:
    held = RankEngine(
        VllmEngine(fake("dies"), folder),
        trainer,
        SingleProcess(),
        scratch_folders(),
        lambda: VllmEngine(fake(), folder),
    )
    held.update(1)
    (response,) = held.sample([[1]], [0], Sampling(20))
    expected = expected_logps(Unigram(7), 1.0)[torch.tensor(response.token_ids)]
    assert response.logps == pytest.approx(expected.tolist(), abs=1e-5)
    held.engine.close()  # a second failure with these weights
    with pytest.raises(UserError, match="has been closed"):
        held.sample([[1]], [0], Sampling(20))
    held.close()
    alone = RankEngine(VllmEngine(fake("dies"), folder), trainer, SingleProcess(), scratch_folders())
    alone.update(1)
    with pytest.raises(EngineFailed, match="ended unexpectedly"):  # other ranks use it: it is not started again
        alone.sample([[1]], [0], Sampling(20))
    alone.close()
