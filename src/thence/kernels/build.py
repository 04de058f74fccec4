"""Compiling the C files of this folder on first use, for this processor, and keeping the result.

A kept library carries the checksum of its content in its name, so a file that was damaged or cut is seen before it is
loaded, and built again: loading it would end the process. A library that does not load, or whose results are not
torch's, is built again once; then everything runs in torch, and the log says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from thence.errors import first_line
from thence.files import flush

log = logging.getLogger(__name__)
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-std=c11")
SOURCES = ("attention.c", "decode.c", "layer.c")
SECONDS = 120.0
"""Longest time that a compiler, or the trial of what it made, may take."""

Test = Callable[[int, ctypes.CDLL], bool]
_failed: dict[str, str] = {}


class NotBuilt(Exception):
    """A library that could not be made, or must not be used; says why."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler: how it is called, and what it says of its version."""

    command: tuple[str, ...]
    version: str


@functools.cache
def load_library(source: str, head_size: int, test: Test) -> ctypes.CDLL | None:
    """A C file of this folder as a library, compiled for a head size; None where that cannot be done.

    Compiled libraries are kept in ``$XDG_CACHE_HOME/thence`` or ``~/.cache/thence``, by everything they depend on.
    Set the environment variable ``THENCE_KERNELS=off`` to do without.

    Args:
        test: whether the library's results are torch's for a head size; asked once, before the library is used. Give
            the same function each time: an answer is kept for each.
    """
    if (why := _without(head_size)) is not None:
        log.info("no C kernels: %s; running in plain torch", why)
        return None
    try:
        with _cache_folder() as folder:
            return _tested(source, head_size, test, folder)
    except (OSError, subprocess.SubprocessError, NotBuilt) as error:
        _failed[source] = first_line(error)
        log.warning("%s cannot be used: %s; running in plain torch, which is slower", source, _failed[source])
        return None


def refuse_second_derivatives() -> None:
    """Called in a backward pass. Raises RuntimeError where it is to be differentiated again (``create_graph``).

    What C computes leaves no graph: a second derivative would silently lack its part.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the C kernels have no second derivatives; set the environment variable THENCE_KERNELS=off, or packing = "
            "false, to differentiate a gradient"
        )


def kernel_facts() -> str:
    """What the kernels' last bits follow from, in a line: compiler, sources and flags; or why there are none."""
    if (why := _without(2)) is not None:
        return f"torch ({why})"
    if _failed:
        return "torch (" + "; ".join(f"{source}: {why}" for source, why in sorted(_failed.items())) + ")"
    found = compiler()
    assert found is not None
    facts = "".join(_facts(source, 0, found) for source in SOURCES)
    return f"C {hashlib.sha256(facts.encode()).hexdigest()[:12]} ({found.version})"


def compiler() -> Compiler | None:
    """The C compiler that ``CC`` names, or the system's; None without one that answers."""
    named = os.environ.get("CC")
    command = tuple(shlex.split(named)) if named else ()
    found = command or next(((path,) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), ())
    return _asked(found) if found else None


@functools.cache
def _asked(command: tuple[str, ...]) -> Compiler | None:
    try:
        told = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = told.stdout.splitlines()
    return Compiler(command, lines[0].strip()) if told.returncode == 0 and lines else None


def _without(head_size: int) -> str | None:
    """Why there are no kernels to try; None if there may be."""
    if os.environ.get("THENCE_KERNELS") == "off":
        return "THENCE_KERNELS=off"
    if compiler() is None:
        return "no C compiler"
    return "an odd head size" if head_size % 2 else None


def _tested(source: str, head_size: int, test: Test, folder: Path) -> ctypes.CDLL:
    """The kept library, or else a new one; the first that loads and gives torch's results. Raises NotBuilt."""
    found = compiler()
    assert found is not None
    facts = _facts(source, head_size, found)
    stem = f"{Path(source).stem}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    why = ""
    for build in (False, True):
        kept = None if build else _whole(folder, stem)
        if kept is None and not build:
            continue
        library = kept or _build(source, head_size, found, folder, stem)
        try:
            loaded = ctypes.CDLL(str(library))
            # the first use may be in a mode that changes what torch gives, or forbids gradients
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
                agrees = test(head_size, loaded)
            if agrees:
                return loaded
            why = "its results are not torch's"
        except (OSError, AttributeError) as error:  # AttributeError: a function is missing
            why = first_line(error)
        log.warning("%s: %s", library, why)
        library.unlink(missing_ok=True)
    raise NotBuilt(why)


def _whole(folder: Path, stem: str) -> Path | None:
    """The kept library whose content has the checksum in its name; damaged ones are removed."""
    for library in sorted(folder.glob(f"{stem}-*.so")):
        if _checksum(library) == library.stem.removeprefix(f"{stem}-"):
            return library
        log.warning("%s is damaged; it is built again", library)
        library.unlink(missing_ok=True)
    return None


def _build(source: str, head_size: int, found: Compiler, folder: Path, stem: str) -> Path:
    """Compile, try in a separate process, flush and move into place. Raises NotBuilt."""
    code, runtime = Path(__file__).with_name(source), _openmp_runtime()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        compiled, built = Path(place) / "kernels.o", Path(place) / "kernels.so"
        # two commands: linking with -fopenmp would bring the compiler's own OpenMP runtime in
        for command in (
            [*_compile_command(head_size, found), "-c", str(code), "-o", str(compiled)],
            [*found.command, "-shared", str(compiled), *([runtime] if runtime else []), "-lm", "-o", str(built)],
        ):
            _run(command, "the compiler failed")
        # instructions that this processor lacks end the process, so the first to call them is another one
        trial = Path(__file__).with_name("trial.py")
        _run([sys.executable, "-I", str(trial), str(built), source, str(head_size)], "it does not run here")
        flush(built)
        # processes that compile at the same moment each put a whole file in place
        return built.replace(folder / f"{stem}-{_checksum(built)}.so")


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise NotBuilt(f"{failure}: {told[:200]}")


def _compile_command(head_size: int, found: Compiler) -> list[str]:
    return [*found.command, *FLAGS, f"-DHEAD={head_size}", *(["-fopenmp"] if _openmp_runtime() else [])]


def _facts(source: str, head_size: int, found: Compiler) -> str:
    code = Path(__file__).with_name(source).read_text(encoding="utf-8")
    return "\n".join([*_compile_command(head_size, found), found.version, str(_openmp_runtime()), _processor(), code])


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """Where libraries are kept; a folder of this process alone where nothing can be kept."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thence"
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        folder, writable = None, False
        log.info("compiled kernels are not kept: %s", first_line(error))
    if folder is not None and writable:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="thence-kernels-") as own:  # a loaded library outlives its file
        yield Path(own)


def _checksum(library: Path) -> str:
    with library.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


@functools.cache  # torch has loaded it by now, and the file that says so has thousands of lines
def _openmp_runtime() -> str | None:
    """The OpenMP runtime that torch has loaded: a second one's threads would fight with torch's. None: no threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line.rsplit("/", 1)[-1]}
    return min(loaded, default=None)


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return "".join(line for line in info.read_text().splitlines() if line.startswith(("model name", "flags")))[:4000]
