"""A Ray cluster of two nodes for tests and benchmarks, a command on it, and what two comparisons differ in."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests import ROOT

VARIABLE = "THENCE_RAY_PYTHON"
"""Names the Python of an environment with Ray and what thence needs."""
STARTS = 3
"""How often a cluster may try to start: Ray gives a node 30 s, which a busy machine may exceed."""
APART = ("seconds", "environment", "folder")
"""What of a comparison's results depends on where and when it ran."""


class TwoNodes:
    """The cluster, for as long as the block lasts.

    Attributes:
        address: of its head.
        nodes: ids, the head first.
    """

    def __init__(self, python: str, cores: float = 1.0):
        self.python, self.cores = python, cores

    def __enter__(self) -> Self:
        program = Path(__file__).with_name("two_nodes.py")
        for _ in range(STARTS):
            self.process = subprocess.Popen(
                [self.python, str(program), str(self.cores)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
            )
            assert self.process.stdout is not None and self.process.stderr is not None
            if line := self.process.stdout.readline():
                said = json.loads(line)
                self.address, self.nodes = said["address"], list(said["nodes"])
                # nobody reads on, and a full pipe would stop it
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return self
        raise AssertionError(f"the cluster did not start: {self.process.stderr.read()[-2000:]}")

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def kill(self, node: str) -> None:
        """End a node suddenly."""
        self.nodes.remove(node)
        self._tell(f"kill {node}")

    def add(self) -> str:
        """Start another node."""
        self._tell("add")
        self.nodes.append(self._answer()["node"])
        return self.nodes[-1]

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


class Command:
    """A command of thence that runs; its output is kept in ``lines``."""

    def __init__(self, python: str, arguments: list[str], folder: Path):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [python, "-m", "thence", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment(),
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def until(self, met: Callable[[], Any], seconds: float = 300) -> Any:
        """Wait for something to be so, and return it. Raises AssertionError where the command ends before."""
        end = time.monotonic() + seconds
        while not (found := met()):
            assert self.process.poll() is None and time.monotonic() < end, self.text
            time.sleep(0.05)
        return found

    def line_with(self, *words: str) -> str:
        """The first line that has these words; empty while there is none."""
        return next((line for line in list(self.lines) if all(word in line for word in words)), "")

    def wait(self, seconds: float = 600) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.reader.join(10)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def environment() -> dict[str, str]:
    """That of a command: this checkout's thence, one thread, nothing from the net."""
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def differences(one: Path, other: Path) -> list[str]:
    """In what the results and models of two comparisons differ, bit for bit; wall times and places left out."""
    found = []
    results = [_lasting(json.loads((folder / "results.json").read_text())) for folder in (one, other)]
    found += [f"results.json: {name}" for name in results[0] if results[0][name] != results[1].get(name)]
    models = [{str(f.relative_to(folder)) for f in folder.rglob("model.safetensors")} for folder in (one, other)]
    found += [f"only one has {name}" for name in sorted(models[0] ^ models[1])]
    both = sorted(models[0] & models[1])
    assert both
    return [*found, *(name for name in both if (one / name).read_bytes() != (other / name).read_bytes())]


def _lasting(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {name: _lasting(value) for name, value in plain.items() if name not in APART}
    return [_lasting(value) for value in plain] if isinstance(plain, list) else plain
