"""Writes the hashes of every dependency: the files of lock/. `make lock` runs it.

    python tools/lock.py

`lock/requirements.txt` has every package of `constraints.txt` but torch, in that version, and setuptools, which torch
needs, with the sha256 of every file of the release on the package index, so that it serves other systems than the one
it was made on. torch comes from one of two more files: `lock/cpu.txt` has the hash of its CPU build (`torch==X+cpu`),
which is not on that index, so that pip has to find it elsewhere (`--find-links`, or PyTorch's own index);
`lock/cuda.txt` has the builds of the package index and the further packages that these need on Linux. They are two,
since pip takes the package index's build wherever its hash is allowed.

It needs the package index. uv, which reads the hashes from the index and downloads none of the files, is installed into
a folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv==0.13.9"
# what the wheels of the pinned numpy and pyarrow need at the least
PLATFORM = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
CUDA = re.compile(r"cuda-|nvidia-|triton$")
_PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s\\;]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
HEAD = """\
# Written by `make lock` from constraints.txt; do not edit. sha256 of every file of each release.
# {what}
"""
WHAT = {
    "requirements.txt": "Everything that thence and its tests need but torch, which cpu.txt or cuda.txt has.",
    "cpu.txt": "torch's CPU build for Python 3.11 on Linux x86_64; pip has to find it (--find-links, PyTorch's index).",
    "cuda.txt": "torch from the package index, and what it needs besides on Linux x86_64.",
}


class NotLocked(Exception):
    """The hashes could not be had; says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files. Returns 1, and leaves them as they are, where the index cannot be asked."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    try:
        written = locked(ROOT / "constraints.txt", ROOT / "lock")
    except NotLocked as error:
        print(f"lock: nothing was written: {error}", file=sys.stderr)
        return 1
    for name, text in written.items():
        (ROOT / "lock" / name).write_text(text)
        print(f"lock/{name}: {len(read_pins(text))} packages, {len(_HASH.findall(text))} hashes")
    return 0


def locked(constraints: Path, folder: Path) -> dict[str, str]:
    """The text of each file, by its name. `folder` has those of the last time."""
    pins = read_pins(constraints.read_text())
    with tempfile.TemporaryDirectory() as place:
        uv = _uv(Path(place))
        hashes = read_hashes(_run([*uv, str(constraints), "--no-deps"]))
        # with dependencies: what torch from the package index wants besides
        everything = _run([*uv, str(constraints)])
    if missing := sorted(set(pins) - set(hashes)):
        raise NotLocked(f"no hashes of {', '.join(missing)}")
    others, all_hashes = read_pins(everything), read_hashes(everything) | hashes
    cuda = {name: version for name, version in others.items() if CUDA.match(name)} | {"torch": pins["torch"]}
    rest = {name: version for name, version in (others | pins).items() if name not in cuda}
    cpu = {"torch": cpu_build(pins["torch"], folder / "cpu.txt")}
    if not cpu["torch"]:
        raise NotLocked(f"pip finds no torch=={pins['torch']}+cpu, and lock/cpu.txt has no hash of it")
    return {
        "requirements.txt": lock_text("requirements.txt", rest, all_hashes),
        "cpu.txt": lock_text("cpu.txt", {"torch": pins["torch"]}, cpu),
        "cuda.txt": lock_text("cuda.txt", cuda, all_hashes),
    }


def cpu_build(version: str, before: Path) -> list[str]:
    """The hash of torch's CPU build where pip finds one, else the one of that version that stands in `before`."""
    wanted = f"torch=={version}+cpu"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    done = subprocess.run([*command, "--report", "-", wanted], capture_output=True, text=True)
    try:
        installs = json.loads(done.stdout)["install"]
        return [install["download_info"]["archive_info"]["hashes"]["sha256"] for install in installs]
    except (ValueError, LookupError):
        print(f"lock: pip finds no {wanted} here; its hash stays as it was", file=sys.stderr)
    text = before.read_text() if before.exists() else ""
    return read_hashes(text).get("torch", []) if read_pins(text).get("torch") == version else []


def name_of(text: str) -> str:
    """A package's name in its normal form."""
    return re.sub(r"[-_.]+", "-", text).lower()


def read_pins(text: str) -> dict[str, str]:
    """Package -> version, of lines ``name==version``."""
    return {name_of(found[1]): found[2] for line in text.splitlines() if (found := _PIN.match(line))}


def read_hashes(text: str) -> dict[str, list[str]]:
    """Package -> the sha256 of each of its files, of a requirements file with hashes."""
    hashes: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := _PIN.match(line):
            name = name_of(found[1])
        for value in _HASH.findall(line):
            hashes.setdefault(name, []).append(value)
    return hashes


def lock_text(file: str, pins: Mapping[str, str], hashes: Mapping[str, Sequence[str]]) -> str:
    """A requirements file with hashes."""
    lines = [HEAD.format(what=WHAT[file])]
    for name in sorted(pins):
        rows = [f"{name}=={pins[name]}", *(f"    --hash=sha256:{value}" for value in hashes[name])]
        lines.append(" \\\n".join(rows) + "\n")
    return "".join(lines)


def _uv(place: Path) -> list[str]:
    _run([sys.executable, "-m", "venv", str(place / "venv")])
    _run([str(place / "venv/bin/python"), "-m", "pip", "install", "--quiet", UV])
    options = ("--generate-hashes", "--no-header", "--no-annotate", "--quiet", "--no-config", *PLATFORM)
    return [str(place / "venv/bin/uv"), "pip", "compile", *options]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise NotLocked(f"{Path(command[0]).name} {' '.join(command[1:4])}: {' / '.join(last)}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
