"""Weights that are pushed into the engine: they take effect and are stamped, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.rollout.vllm.stand_in import Make, Unigram, expected_logps
from thence.errors import UserError
from thence.rollout.native import Sampling
from thence.rollout.vllm import weights as weights_module
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import VllmSettings


def test_pushed_weights_are_sampled_with_and_stamped(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder) as engine:
        first = engine.facts()["weights"]
        for version, seed in ((1, 7), (5, 8)):
            model = Unigram(seed)
            engine.push_weights(model, version)
            assert engine.version == version and engine.last_push is not None
            assert engine.last_push.probe_difference < 1e-5
            (response,) = engine.sample([[1]], [0], Sampling(20))
            assert response.logps == pytest.approx(expected_logps(model, 1.0)[response.token_ids].tolist(), abs=1e-5)
            assert engine.facts()["weights_version"] == version and engine.facts()["weights"] != first
        assert not [p for root in engine._scratch for p in root.rglob("*.safetensors")]


def test_weights_that_are_copied_before_they_are_loaded_are_those_of_the_copy(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder) as engine:
        handed = [engine.prepare(Unigram(seed), version) for version, seed in ((1, 7), (2, 8))]
        assert engine.version == 0
        for (version, seed), one in zip(((1, 7), (2, 8)), handed, strict=True):
            engine.take(one)
            assert engine.version == version and not one.folder.exists()
            (response,) = engine.sample([[1]], [0], Sampling(20))
            expected = expected_logps(Unigram(seed), 1.0)[response.token_ids].tolist()
            assert response.logps == pytest.approx(expected, abs=1e-5)
        with pytest.raises(ValueError, match="negative"):
            engine.prepare(Unigram(7), -1)


def test_weights_that_did_not_take_effect_are_refused(fake: Make, folder: Path) -> None:
    engine = VllmEngine(fake("stale"), folder)
    with pytest.raises(UserError, match="version 1 did not take effect"):
        engine.push_weights(Unigram(7), 1)
    with pytest.raises(UserError, match="has been closed"):
        engine.sample([[1]], [0], Sampling(2))


def test_a_cache_of_old_keys_and_values_is_refused(fake: Make, folder: Path) -> None:
    engine = VllmEngine(fake("clinging"), folder)
    with pytest.raises(UserError, match="did not forget the keys and values"):
        engine.push_weights(Unigram(7), 1)


def test_weights_altered_on_the_way_are_refused(fake: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thence.rollout.vllm.engine.weights_digest", lambda folder: "of other bytes")
    engine = VllmEngine(fake(), folder)
    with pytest.raises(UserError, match="arrived with digest"):
        engine.push_weights(Unigram(7), 1)


def test_weights_go_over_disk_where_shared_memory_is_too_small(
    fake: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    free = {small: 10, large: 10**9}
    monkeypatch.setattr(weights_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    assert weights_module.folder_for(Unigram(), [small, large]).parent == large
    free[small] = 10**9
    assert weights_module.folder_for(Unigram(), [small, large]).parent == small


def test_a_response_of_other_weights_is_refused(script: Callable[[str], VllmSettings], folder: Path) -> None:
    settings = script("""
        ask(); tell({"ready": ready})
        ask(); tell({"done": 0, "stamp": [4, "d"], "token_ids": [1], "logps": [-1.0], "finish": "length"})
        ask()
    """)
    with pytest.raises(UserError, match=r"\[4, 'd'\], not with \[0, 'd'\](.|\n)*push weights before sampling"):
        VllmEngine(settings, folder).sample([[1]], [0], Sampling(1))
