"""One vLLM that several ranks of a run ask: side by side, each its own responses; strangers stay outside."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch

from tests.rollout.vllm.stand_in import TOKEN, Make, Unigram, expected_logps
from tests.rollout.vllm.test_process import served
from thence.errors import UserError
from thence.rollout.native import Response, Sampling
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.link import Door
from thence.rollout.vllm.settings import VllmSettings
from thence.rollout.vllm.weights import Probe, probe_ids, probe_logps, tensors_in, write_weights
from thence.rollout.vllm.wire import TOKEN_VARIABLE

ROWS = 40


def asked(engine: VllmEngine, seed: int, tokens: int) -> list[Response]:
    return engine.sample([[1]] * ROWS, range(seed, seed + ROWS), Sampling(tokens))


def test_ranks_that_share_an_engine_get_the_responses_they_would_get_alone(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder) as engine:
        alone = [asked(engine, 100 * rank, 20) for rank in range(3)]
    with VllmEngine(fake(max_rows=16), folder, shared=True) as first, contextlib.ExitStack() as held:
        assert first.door is not None
        others = [held.enter_context(VllmEngine(fake(), folder, door=first.door)) for _ in range(2)]
        found: dict[int, list[Response]] = {}

        def ask(rank: int, engine: VllmEngine) -> None:
            found[rank] = asked(engine, 100 * rank, 20)

        threads = [threading.Thread(target=ask, args=pair) for pair in enumerate([first, *others])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[rank] for rank in range(3)] == alone


def test_a_rank_that_leaves_in_the_middle_does_not_disturb_the_others(fake: Make, folder: Path) -> None:
    with VllmEngine(fake("slow"), folder, shared=True) as first:
        second = VllmEngine(fake(), folder, door=first.door)
        stream = second.stream([[1]] * ROWS, range(ROWS), Sampling(20))
        next(stream)
        second._link.close()  # as a killed rank leaves
        assert len(asked(first, 0, 5)) == ROWS
        with VllmEngine(fake(), folder, door=first.door) as third:
            assert len(asked(third, 0, 5)) == ROWS


def test_a_rank_that_does_not_read_keeps_nobody_waiting(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder, shared=True) as first:
        second = VllmEngine(fake(), folder, door=first.door)
        stream = second.stream([[1]] * 400, range(400), Sampling(60))  # more than a socket holds
        next(stream)
        assert len(asked(first, 0, 5)) == ROWS
        assert len(list(stream)) == 399
        second.close()


def test_weights_that_another_rank_brought_are_known(fake: Make, folder: Path, tmp_path: Path) -> None:
    model = Unigram(7)
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    write_weights(model, pushed)
    ids = probe_ids(12)
    probe = Probe(ids, probe_logps(model, ids))
    with VllmEngine(fake(), folder, shared=True) as first, VllmEngine(fake(), folder, door=first.door) as second:
        first.load_weights(pushed, tensors_in(pushed), probe, 4)
        (pushed / "model.safetensors").unlink()  # not read again
        second.load_weights(pushed, 1, probe, 4)
        for engine in (first, second):
            (response,) = engine.sample([[1]], [0], Sampling(20))
            expected = expected_logps(model, 1.0)[torch.tensor(response.token_ids)]
            assert response.logps == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_rank_that_has_not_been_given_the_weights_is_refused(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder, shared=True) as first, VllmEngine(fake(), folder, door=first.door) as second:
        first.push_weights(Unigram(7), 1)
        with pytest.raises(UserError, match="push weights before sampling"):
            second.sample([[1]], [0], Sampling(2))
        assert first.sample([[1]], [0], Sampling(2))


def test_weights_are_not_changed_under_responses_that_are_sampled(fake: Make, folder: Path) -> None:
    with VllmEngine(fake("slow"), folder, shared=True) as first:
        second = VllmEngine(fake(), folder, door=first.door)
        stream = second.stream([[1]] * ROWS, range(ROWS), Sampling(200), limits=[1] + [200] * (ROWS - 1))
        next(stream)
        with pytest.raises(UserError, match="weights came while responses were sampled with others"):
            first.push_weights(Unigram(7), 1)
        second.close()


def test_nobody_without_the_token_comes_in(fake: Make, folder: Path) -> None:
    with VllmEngine(fake(), folder, shared=True) as first:
        assert first.door is not None
        with pytest.raises(UserError, match="wrong token"):
            VllmEngine(fake(), folder, door=Door(first.door.path, "another token"))
        assert first.sample([[1]], [0], Sampling(2))
    with pytest.raises(UserError, match=r"cannot be reached(.|\n)*ranks_per_engine"):
        VllmEngine(fake(), folder, door=first.door)


def test_a_failure_is_told_to_every_rank_that_waits(fake: Make, folder: Path) -> None:
    with VllmEngine(fake("raises"), folder, shared=True) as first:
        second = VllmEngine(fake(), folder, door=first.door)
        with pytest.raises(UserError, match="can't allocate memory"):
            second.sample([[1]], [0], Sampling(2))
        with pytest.raises(UserError, match="can't allocate memory"):
            first.sample([[1]], [0], Sampling(2))


def test_a_server_takes_the_ranks_of_one_run(packages: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with served(packages, folder) as (port, _):
        settings = VllmSettings(server=f"127.0.0.1:{port}", start_seconds=20, silence_seconds=20)
        with VllmEngine(settings, folder, run="one") as first, VllmEngine(settings, folder, run="one") as second:
            assert asked(first, 0, 3) == asked(second, 0, 3)
            for run in ("two", None):
                with pytest.raises(UserError, match="busy"):
                    VllmEngine(settings, folder, run=run)
            assert len(asked(second, 0, 3)) == ROWS
