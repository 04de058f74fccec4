"""The tests of the repository that are not slow, with the GPU in sight."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from record import Record

ROOT = Path(__file__).resolve().parents[2]


def run(device: torch.device, small: bool, record: Record) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if small:
        command += ["tests/train/test_step.py", "tests/train/test_checkpoint.py"]
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    record.figure("summary", lines[-1] if lines else done.stderr[-500:])
    record.figures["failures"] = failures
    print(done.stdout[-9000:] if failures or done.returncode else "")
    passed = re.search(r"(\d+) passed", lines[-1] if lines else "")
    record.least("tests that pass", int(passed.group(1)) if passed else 0, 1)
    record.most("tests that fail", len(failures), 0)
