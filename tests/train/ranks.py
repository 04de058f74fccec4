"""Runs a module's ``on_each_rank`` under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests import ROOT


def run_ranks(folder: Path, module: str, world: int, *arguments: int) -> list[dict[str, Any]]:
    """What ``module.on_each_rank(*arguments)`` gives on every rank, by rank; ``folder`` is used up."""
    script = folder / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import importlib, os, torch\ntorch.set_num_threads(1)\n"
        f"found = importlib.import_module({module!r}).on_each_rank(*{arguments})\n"
        f"torch.save(found, {str(folder)!r} + '/' + os.environ['RANK'])\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), script]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]
