"""``thence audit thence`` where torch sees the device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import Record

ROOT = Path(__file__).resolve().parents[2]


def run(device: torch.device, small: bool, record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "audit.json"
        command = [sys.executable, "-m", "thence", "audit", "thence", "--python", sys.executable, "--json", str(out)]
        command += ["--quick"] if small else []
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        print(done.stdout[-4000:] + done.stderr[-2000:])
        record.true("the audit of thence has no finding", done.returncode == 0, f"exit code {done.returncode}")
        record.true("it wrote what it found", out.is_file() and out.stat().st_size > 0)
