"""Compiling the C files of this folder on first use, for this processor, and keeping the result."""

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

log = logging.getLogger(__name__)
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-std=c11")


@functools.cache
def load_library(source: str, head_size: int) -> ctypes.CDLL | None:
    """A C file of this folder as a library, compiled for a head size; None where that cannot be done.

    Compiled libraries are kept in ``$XDG_CACHE_HOME/thence`` or ``~/.cache/thence``, by everything they depend on.
    Set the environment variable ``THENCE_KERNELS=off`` to do without.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or head_size % 2 or os.environ.get("THENCE_KERNELS") == "off":
        log.info("no C kernels: a C compiler is missing, or they are switched off; running in plain torch")
        return None
    runtime = _openmp_runtime()
    code = Path(__file__).with_name(source)
    compile_command = [compiler, *FLAGS, f"-DHEAD={head_size}", *(["-fopenmp"] if runtime else [])]
    facts = "\n".join([*compile_command, str(runtime), _processor(), code.read_text()])
    library = _cache_folder() / f"{code.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            _build(compile_command, code, runtime, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s could not be built (%s): running in plain torch", source, error)
        return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thence"


def _build(compile_command: list[str], code: Path, runtime: str | None, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, built = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        # two commands: linking with -fopenmp would bring the compiler's own OpenMP runtime in
        commands = (
            [*compile_command, "-c", str(code), "-o", str(compiled)],
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
