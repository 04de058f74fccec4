"""The engine's process: it ends with its parent, and a server that outlives it serves one client at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rollout.vllm.stand_in import TOKEN, Unigram, again, alive, wait_until
from thence.errors import UserError
from thence.rollout.native import Sampling
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import CHILD, VllmSettings
from thence.rollout.vllm.wire import TOKEN_VARIABLE


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_engine_ends_with_a_parent_that_is_killed_while_it_samples(packages: Path, folder: Path) -> None:
    program = f"""
        from pathlib import Path
        from thence.rollout.native import Sampling
        from thence.rollout.vllm.engine import VllmEngine
        from thence.rollout.vllm.settings import VllmSettings
        environment = {{"PYTHONPATH": {str(packages)!r}, "FAKE_MODE": "hangs"}}
        engine = VllmEngine(VllmSettings(python={sys.executable!r}, environment=environment), Path({str(folder)!r}))
        print(engine._link.pid, *engine._scratch, flush=True)
        engine.sample([[1]], [0], Sampling(4))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, *scratch = parent.stdout.readline().split()
    time.sleep(0.2)
    assert alive(int(pid))
    parent.kill()
    parent.communicate()
    assert wait_until(lambda: not alive(int(pid)), 10)
    assert not any(Path(root).exists() for root in scratch)


@contextlib.contextmanager
def served(packages: Path, folder: Path, port: int = 0, token: str = TOKEN) -> Iterator[tuple[int, str]]:
    """A server on some port: the port it listens on (0: it does not), and what it said."""
    environment = {**os.environ, "PYTHONPATH": str(packages), TOKEN_VARIABLE: token, "FAKE_MODE": "slow"}
    command = [sys.executable, str(CHILD), "--port", str(port), "--model", str(folder)]
    popen = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    said = ""
    try:
        while not said.startswith("serving"):
            line = popen.stdout.readline()
            if not line:
                break
            said = line.strip()
        yield (int(said.rsplit(":", 1)[1]) if said.startswith("serving") else 0), said
    finally:
        popen.terminate()
        popen.communicate()


def test_a_server_keeps_its_weights_and_serves_one_client_at_a_time(
    packages: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with served(packages, folder) as (port, _):
        settings = VllmSettings(server=f"127.0.0.1:{port}", start_seconds=20, silence_seconds=20)
        with VllmEngine(settings, folder) as engine:
            assert len(engine.sample([[1]], [0], Sampling(4))[0].token_ids) == 4
            with pytest.raises(UserError, match=r"busy(.|\n)*wait until"):
                VllmEngine(settings, folder)
            engine.push_weights(Unigram(7), 3)
            assert engine.facts()["server"] == settings.server
        # the server lives on with weights that this client has not pushed
        with pytest.raises(UserError, match=r"weights \[3, (.|\n)*push weights before sampling"):
            again(settings, folder).sample([[1]], [0], Sampling(4))
        with again(settings, None) as engine:
            engine.push_weights(Unigram(8), 1)
            assert engine.sample([[1]], [0], Sampling(4))
        with pytest.raises(UserError, match="has the model"):
            again(settings, folder.parent)
        monkeypatch.setenv(TOKEN_VARIABLE, "another token")
        with pytest.raises(UserError, match=r"wrong token(.|\n)*same token"):
            VllmEngine(settings, folder)


def test_a_port_in_use_and_a_missing_server_are_named(
    packages: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        settings = VllmSettings(server=f"127.0.0.1:{port}", start_seconds=0.5)
        with pytest.raises(
            UserError, match=rf"no vLLM server answers at 127.0.0.1:{port}(.|\n)*child.py --port {port}"
        ):
            VllmEngine(settings, folder)
        other.listen()
        with served(packages, folder, port) as (_, said):
            assert said == f"port {port} on 127.0.0.1 cannot be used: Address already in use; give another --port"
        with pytest.raises(UserError, match="said nothing"):
            VllmEngine(settings, folder)
    with served(packages, folder, token="") as (_, said):
        assert TOKEN_VARIABLE in said
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        VllmEngine(settings, folder)


@pytest.mark.parametrize("server", ["10.0.0.1:8000", "example.org:80", "127.0.0.1", "http://127.0.0.1:8000"])
def test_a_server_elsewhere_is_refused(server: str) -> None:
    with pytest.raises(ValueError, match="not a port of this machine"):
        VllmSettings(server=server)
