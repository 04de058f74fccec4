"""Engines whose vLLM is a stand-in, and folders of models for them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.vllm.stand_in import FAKE_SAFETENSORS, FAKE_VLLM, Make, Unigram
from thence.rollout.vllm.settings import CHILD, VllmSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The stand-in's model as it would lie on disk."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    Unigram().save_pretrained(made)
    return made


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with the stand-ins of what is installed in vLLM's environment."""
    made = tmp_path / "packages"
    made.mkdir()
    (made / "vllm.py").write_text(FAKE_VLLM)
    (made / "safetensors.py").write_text(FAKE_SAFETENSORS)
    (made / "torch.py").write_text('__version__, float32 = "0.0", None\ndef get_num_threads():\n    return 1\n')
    (made / "transformers.py").write_text('__version__ = "0.0"\n')
    return made


@pytest.fixture
def fake(packages: Path) -> Make:
    """``fake(mode, **settings)``: settings that start the stand-in, which misbehaves in the way named."""

    def make(mode: str = "", **more: Any) -> VllmSettings:
        environment = {"PYTHONPATH": str(packages), "FAKE_MODE": mode}
        values = {"python": sys.executable, "environment": environment, "start_seconds": 20, "silence_seconds": 20}
        return VllmSettings(**{**values, **more})

    return make


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], VllmSettings]:
    """``script(body)``: settings whose Python is a program that plays the other side of the protocol by itself.

    In the body: `ask()` gives the next request, `tell(message)` answers, `sock` is the bare socket.
    """

    def make(body: str) -> VllmSettings:
        file = tmp_path / "player"
        file.write_text(
            f"#!{sys.executable}\nimport sys, socket\nsys.path.insert(0, {str(CHILD.parents[3])!r})\n"
            "from thence.framed import Wire\n"
            "sock = socket.socket(fileno=int(sys.argv[sys.argv.index('--fd') + 1]))\nwire = Wire(sock)\n"
            "ask, tell = (lambda: wire.receive(20)), wire.send\n"
            "ready = {'protocol': 3, 'model': sys.argv[sys.argv.index('--model') + 1], 'stamp': [0, 'd'],\n"
            "         'dtype': 'float32', 'max_model_len': 64}\n" + textwrap.dedent(body)
        )
        file.chmod(0o755)
        return VllmSettings(python=str(file), start_seconds=20, silence_seconds=2)

    return make
