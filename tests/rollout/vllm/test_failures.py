"""An engine that fails, or is none, gives an error with a remedy."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rollout.vllm.stand_in import Make, alive
from thence.errors import UserError
from thence.rollout.native import Sampling
from thence.rollout.vllm import settings as settings_module
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import PYTHON_VARIABLE, VllmSettings


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("dies", r"ended unexpectedly while sampling \(SIGKILL\)(.|\n)*this is the log(.|\n)*needs too much memory"),
        ("raises", r"failed while sampling(.|\n)*can't allocate memory(.|\n)*remedy: there is too little memory"),
        ("hangs", r"said nothing for 0.5 s while sampling"),
        ("infinite", "without a finite log-probability"),
    ],
)
def test_an_engine_that_fails_while_sampling_gives_an_error_with_a_remedy(
    fake: Make, folder: Path, mode: str, message: str
) -> None:
    settings = fake(mode, silence_seconds=0.5 if mode == "hangs" else 20)
    with VllmEngine(settings, folder) as engine:
        pid = engine._link.pid
        with pytest.raises(UserError, match=message):
            engine.sample([[1]], [0], Sampling(4))
        assert pid is not None and not alive(pid)
    assert not any(root.exists() for root in engine._scratch)


def test_an_engine_that_does_not_start_gives_an_error_with_a_remedy(fake: Make, folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"failed while starting(.|\n)*remedy: the cache for keys and values is too small"
    ):
        VllmEngine(fake("no room"), folder)
    with pytest.raises(UserError, match=r"said nothing for 4 s while starting(.|\n)*this is the log"):
        VllmEngine(fake("never starts", start_seconds=4), folder)  # time for it to say something


def test_a_python_without_vllm_is_named_with_what_to_do(
    fake: Make, folder: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / "vllm.py").unlink()
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(UserError, match=r"No module named 'vllm'(.|\n)*install vLLM in a separate environment"):
            VllmEngine(fake(), folder)
    with pytest.raises(UserError, match="no such Python"):
        VllmEngine(fake(python="/nowhere/bin/python"), folder)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=PYTHON_VARIABLE):
        VllmEngine(fake(python=""), folder)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    assert fake(python="").interpreter() == sys.executable


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sock.sendall(b'HTTP/1.1 400 Bad Request')", "does not speak thence's protocol"),
        ("sock.sendall(b'\\0\\0\\0\\x05hello'); ask()", "does not speak thence's protocol"),
        ("sock.sendall(b'\\0\\0'); sock.close()", r"ended unexpectedly while starting \(exit code 0\)"),
        ("ask(); tell({'ready': {**ready, 'protocol': 99}})", "not of this version"),
        ("ask(); tell({'ready': {**ready, 'dtype': 'bfloat16'}})", "computes in bfloat16, asked for was float32"),
    ],
)
def test_a_program_that_speaks_something_else_is_refused(
    script: Callable[[str], VllmSettings], folder: Path, body: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        VllmEngine(script(body), folder)


def test_responses_that_are_left_out_are_noticed(script: Callable[[str], VllmSettings], folder: Path) -> None:
    settings = script("""
        ask(); tell({"ready": ready})
        ask(); tell({"end": 1, "stamp": [0, "d"]}); ask()
    """)
    with pytest.raises(UserError, match="left out 1 of 1"):
        VllmEngine(settings, folder).sample([[1]], [0], Sampling(1))


def test_a_folder_that_vllm_cannot_open_is_named(fake: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="safetensors"):
        VllmEngine(fake(), tmp_path / "nothing")
