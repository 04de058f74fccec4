"""What the last bits of a number depend on besides recipe and data: kept with runs and checkpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from thence.cores import crowded, were_chosen
from thence.kernels.build import kernel_facts
from thence.machine import cpu_name

log = logging.getLogger(__name__)


def numerics() -> dict[str, Any]:
    """Processor, its instructions, threads, torch, and the C kernels with their compiler, as they are here and now."""
    import torch

    return {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": kernel_facts(),
    }


def settle_threads(first_start: Mapping[str, Any]) -> None:
    """Where thence has chosen the number of threads, a resumed run keeps that of its first start, and so its last bits.

    If other programs slow this number of threads down, that is logged.

    Args:
        first_start: the environment of the run's first start; empty before it.
    """
    import torch

    kept, now = first_start.get("threads"), torch.get_num_threads()
    if were_chosen(os.environ) and isinstance(kept, int) and kept > 0 and kept != now:
        torch.set_num_threads(kept)
        log.info("threads: %d, as at the run's first start (%d would be free now)", kept, now)
    if said := crowded(os.environ, torch.get_num_threads()):
        log.warning("%s", said)


def say_other_numerics(kept: Mapping[str, Any] | None, whose: str) -> None:
    """Log what is not as it was: the same steps may then end with other last bits.

    Args:
        kept: what :func:`numerics` gave; None says nothing.
        whose: what was made under it, for example ``the checkpoint of step 20``.
    """
    if kept is None:
        return
    now = numerics()
    changed = [f"{key} {kept[key]} -> {now[key]}" for key in now if key in kept and kept[key] != now[key]]
    if changed:
        log.warning(
            "%s was made with other numerics (%s); last bits may differ from here on", whose, ", ".join(changed)
        )
