"""Weights that go to vLLM in chunks: they take effect, are counted, and whatever fails is told once all have come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.vllm.stand_in import Make, Unigram, expected_logps
from thence.errors import UserError
from thence.files import to_json
from thence.rollout.native import Sampling
from thence.rollout.vllm import chunks
from thence.rollout.vllm import engine as engine_module
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import VllmSettings, vllm_settings
from thence.rollout.vllm.transfer import handle_values
from thence.rollout.vllm.weights import Probe, probe_ids, probe_logps


def parts(model: Unigram) -> list[tuple[str, Tensor]]:
    """The model's only tensor, after two that fill a chunk and a half."""
    return [("first", torch.zeros(24)), ("second", torch.zeros(12)), ("head", model.head)]


def load(engine: VllmEngine, model: Unigram, tensors: int, version: int) -> None:
    ids = probe_ids(12)
    engine.load_weights(None, tensors, Probe(ids, probe_logps(model, ids)), version)


def test_weights_in_chunks_are_sampled_with(fake: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 96)
    with VllmEngine(fake(transfer="ipc"), folder) as engine:
        for version, seed in ((1, 7), (2, 8)):
            model = Unigram(seed)
            assert engine.send_weights(parts(model)) == 3
            load(engine, model, 3, version)
            assert engine.last_push is not None and engine.last_push.probe_difference < 1e-5
            (response,) = engine.sample([[1]], [0], Sampling(20))
            assert response.logps == pytest.approx(expected_logps(model, 1.0)[response.token_ids].tolist(), abs=1e-5)
        assert not [p for root in engine._scratch for p in root.rglob("*.safetensors")]


def test_a_push_in_chunks_has_every_buffer_that_files_hold(
    fake: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sent = Unigram(7), list[str]()
    model.register_buffer("kept", torch.zeros(2))
    model.register_buffer("made", torch.zeros(2), persistent=False)
    monkeypatch.setattr(engine_module, "check_names", lambda model: None)
    with VllmEngine(fake(transfer="ipc"), folder) as engine:
        send = engine.send_weights
        monkeypatch.setattr(engine, "send_weights", lambda tensors: send(sent.append(n) or (n, v) for n, v in tensors))
        engine.push_weights(model, 1)
        assert sent == ["head", "kept"] and engine.version == 1


def test_weights_in_chunks_that_did_not_take_effect_are_refused(fake: Make, folder: Path) -> None:
    engine, model = VllmEngine(fake("stale", transfer="ipc"), folder), Unigram(7)
    engine.send_weights(parts(model))
    with pytest.raises(UserError, match="version 1 did not take effect"):
        load(engine, model, 3, 1)


def test_a_tensor_that_did_not_come_is_noticed(fake: Make, folder: Path) -> None:
    engine, model = VllmEngine(fake(transfer="ipc"), folder), Unigram(7)
    engine.send_weights(parts(model)[1:])
    with pytest.raises(UserError, match="2 tensors arrived, sent were 3"):
        load(engine, model, 3, 1)


def test_responses_are_never_sampled_from_weights_that_are_half_loaded(fake: Make, folder: Path) -> None:
    engine = VllmEngine(fake(transfer="ipc"), folder)
    engine.send_weights(parts(Unigram(7)))
    with pytest.raises(UserError, match="half loaded"):
        engine.sample([[1]], [0], Sampling(2))


def test_a_count_that_is_not_what_was_sent_is_refused(script: Callable[[str], VllmSettings], folder: Path) -> None:
    body = "ask(); tell({'ready': ready}); ask(); tell({'taken': 2}); ask()"
    engine = VllmEngine(script(body), folder)
    with pytest.raises(UserError, match="has taken 2 of 3 tensors"):
        engine.send_weights(parts(Unigram(7)))


def test_a_vllm_that_cannot_take_chunks_is_named_with_what_to_do(fake: Make, folder: Path) -> None:
    with pytest.raises(UserError, match="cannot take weights in chunks, set transfer = files"):
        VllmEngine(fake("no chunks", transfer="ipc"), folder)


@pytest.mark.parametrize("error", [UserError("vLLM ended", remedy="again"), RuntimeError("anything")], ids=str)
def test_all_tensors_are_gathered_though_sending_fails(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4)
    gathered, given = [], []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in "abcd":
            gathered.append(name)
            yield name, torch.zeros(1)

    def give(chunk: dict[str, Any], count: int) -> None:
        given.append(chunk["path"])
        raise error

    with pytest.raises(type(error), match=str(error.args[0])):
        chunks.send_tensors(tensors(), give, lambda size: Path(mkdtemp(dir=tmp_path)), "cpu")
    assert gathered == list("abcd") and len(given) == 1 and not list(tmp_path.iterdir())


def test_no_room_for_a_chunk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set TMPDIR to a folder with room") as caught:
        chunks.send_tensors([("a", torch.zeros(1))], lambda *_: None, lambda size: tmp_path / "gone", "cpu")
    assert "gone" in str(caught.value)


def test_a_policy_that_vllm_s_gpu_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vLLM runs on a GPU and the policy on cpu"):
        chunks.send_tensors([("a", torch.zeros(1))], lambda *_: None, lambda size: tmp_path, "cuda")


@pytest.mark.parametrize(
    "more", [{"server": "127.0.0.1:8123"}, {"servers": ["127.0.0.1:8123"]}, {"ranks_per_engine": 2}], ids=str
)
def test_chunks_need_an_engine_for_each_rank(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="transfer = ipc needs an engine for each rank"):
        vllm_settings({"transfer": "ipc", **more}, "rl.vllm")


def test_a_handle_of_a_gpu_tensor_is_rebuilt_as_torch_gave_it() -> None:
    """Both ends of it, without the GPU between them: values as `torch.multiprocessing` has them in torch 2.13."""
    own = (False, b"\x01\xff", 3, b"", True)
    values = (torch.Tensor, torch.Size([2, 3]), (3, 1), 5, torch.storage.TypedStorage, torch.bfloat16)
    sent = (*values, 1, b"\x00handle", 64, 128, *own)
    plain = chunks.plain_handle(sent)
    assert to_json(plain)
    assert handle_values(plain, 0) == (*values, 0, b"\x00handle", 64, 128, *own)
