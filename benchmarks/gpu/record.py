"""What a part found: figures, checks with their limits, and the machine that they hold for."""

from __future__ import annotations

import platform
import shlex
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Record:
    """Figures and checks of one part; every check is printed as it is made."""

    def __init__(self, part: str):
        self.part = part
        self.figures: dict[str, Any] = {}
        self.checks: list[dict[str, Any]] = []

    @property
    def failed(self) -> bool:
        return any(not check["holds"] for check in self.checks)

    def most(self, name: str, value: float, limit: float) -> None:
        """The value has to be at most the limit; one that is not a number fails."""
        self._add(name, value, f"<= {limit:g}", value <= limit)

    def least(self, name: str, value: float, limit: float) -> None:
        """The value has to be at least the limit."""
        self._add(name, value, f">= {limit:g}", value >= limit)

    def true(self, name: str, holds: bool, said: str = "") -> None:
        """A plain yes or no."""
        self._add(name, said or holds, "yes", bool(holds))

    def figure(self, name: str, value: Any) -> None:
        """A number without a limit."""
        self.figures[name] = value
        print(f"   {name}: {_short(value)}", flush=True)

    def broke(self, error: BaseException) -> None:
        """The part, or a piece of it, could not be run."""
        traceback.print_exception(error)
        lines = traceback.format_exception(error)
        self.checks.append({"check": "runs", "value": "".join(lines)[-3000:], "limit": "no error", "holds": False})

    def plain(self) -> dict[str, Any]:
        return {"holds": not self.failed, "figures": self.figures, "checks": self.checks}

    def lines(self) -> list[dict[str, Any]]:
        """Every check and every figure, each by itself."""
        return [*self.checks, *({"figure": name, "value": value} for name, value in self.figures.items())]

    def summary(self) -> str:
        bad = [check["check"] for check in self.checks if not check["holds"]]
        return f"{len(self.checks) - len(bad)} of {len(self.checks)} checks hold" + (f"; not: {bad}" if bad else "")

    def _add(self, name: str, value: Any, limit: str, holds: bool) -> None:
        self.checks.append({"check": name, "value": value, "limit": limit, "holds": bool(holds)})
        print(f"   {'ok ' if holds else 'NOT'} {name}: {_short(value)} ({limit})", flush=True)


def environment(device: str) -> dict[str, Any]:
    """The card, its driver, the versions, and the command."""
    import torch
    import transformers

    import thence

    facts = {
        "thence": thence.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpus_visible": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _driver(),
        }
    return facts


def _driver() -> str | None:
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    return first.split(":", 1)[1].strip()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return str(value)
