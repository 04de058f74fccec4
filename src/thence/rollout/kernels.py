"""Compiling and calling ``kernels.c``. Without a C compiler the sampler does the same in plain torch, slower."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-std=c11")


class Kernels:
    """The compiled functions for one head size, on contiguous float32 tensors."""

    def __init__(self, library: ctypes.CDLL):
        self._attend, self._rms_norm, self._swiglu = library.attend, library.rms_norm, library.swiglu
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._attend.argtypes = [pointer] * 7 + [number] * 5 + [ctypes.c_float]
        self._rms_norm.argtypes = [pointer] * 2 + [number] * 2 + [ctypes.c_float]
        self._swiglu.argtypes = [pointer] * 2 + [number] * 2
        for function in (self._attend, self._rms_norm, self._swiglu):
            function.restype = None

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, first: Tensor, column: int
    ) -> Tensor:
        """Append one token a row to the cache in place and attend to all of its row; see ``kernels.c``.

        Args:
            qkv: (rows, (heads + 2 kv) * head size).
            keys: (rows, kv, head size, capacity).
            values: (rows, kv, capacity, head size).
            cos, sin: (positions, head size / 2).
            first: first column of each row that is no padding, (rows,), int64.
            column: where the token goes.

        Returns:
            (rows, heads * head size).
        """
        rows, kv, head_size, capacity = keys.shape
        heads = qkv.shape[1] // head_size - 2 * kv
        out = torch.empty(rows, heads * head_size)
        places = (t.data_ptr() for t in (qkv, keys, values, cos, sin, first, out))
        self._attend(*places, rows, heads, kv, capacity, column, head_size**-0.5)
        return out

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of every row, without weights."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), out.data_ptr(), *x.shape, eps)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of rows that hold gate and up side by side."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width)
        self._swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out


@functools.cache
def load_kernels(head_size: int) -> Kernels | None:
    """The kernels for a head size, compiled on first use and kept in the user's cache folder; None if that fails."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or head_size % 2:
        log.info("no C compiler found: sampling in plain torch")
        return None
    runtime = _openmp_runtime()
    compile_command = [compiler, *FLAGS, f"-DHEAD={head_size}", *(["-fopenmp"] if runtime else [])]
    facts = [*compile_command, str(runtime), _processor(), SOURCE.read_text()]
    library = cache_folder() / f"kernels-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            _build(compile_command, runtime, library)
        return Kernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("the C kernels could not be built (%s): sampling in plain torch", error)
        return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/thence``, or ``~/.cache/thence``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thence"


def _build(compile_command: list[str], runtime: str | None, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, built = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        # two commands: linking with -fopenmp would bring the compiler's own OpenMP runtime in
        commands = (
            [*compile_command, "-c", str(SOURCE), "-o", str(compiled)],
            [compile_command[0], "-shared", str(compiled), *([runtime] if runtime else []), "-lm", "-o", str(built)],
        )
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        built.replace(library)  # processes that compile at the same moment each put a whole file in place


def _openmp_runtime() -> str | None:
    """The OpenMP runtime that torch has loaded: a second one's threads would fight with torch's. None: no threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line.rsplit("/", 1)[-1]}
    return min(loaded, default=None)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return "".join(line for line in info.read_text().splitlines() if line.startswith(("model name", "flags")))[:4000]
