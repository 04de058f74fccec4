"""How the processes of a run find each other when it starts, and an error instead of waiting for ever.

torchrun starts processes again in the same store of keys, where the addresses of the processes before still stand, and
gloo would connect to those. So the first rank gives every start a name of its own, and what follows is kept under it.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from thence.errors import UserError, first_line

PATIENCE = "THENCE_RENDEZVOUS_SECONDS"
"""The environment variable for how long a process waits for the others when a run starts. Default: 300."""
SILENCE = timedelta(minutes=30)
"""How long a rank waits for another one in the middle of a run: the first one may be writing a large model."""
LOOK_SECONDS = 0.05


def meet(backend: str, rank: int, world: int) -> None:
    """Wait until all processes are there, and make a group of them.

    Raises:
        UserError: some do not come in time; a variable of the environment is missing.
    """
    seconds = patience()
    limit = timedelta(seconds=seconds)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))  # pyright: ignore[reportPrivateImportUsage]
        name = gather_all(store, world, limit) if rank == 0 else join(store, rank, limit)
    except ValueError as error:  # a variable of the environment is not set
        raise UserError(
            f"rank {rank} cannot find the others: {first_line(error)}",
            remedy="let torchrun set it, or set it to the machine and port where rank 0 waits",
            field="MASTER_ADDR, MASTER_PORT",
        ) from None
    except (dist.DistError, TimeoutError) as error:
        raise UserError(
            f"rank {rank} waited {seconds:g} seconds for all {world} processes of this run, and not all came: "
            f"{first_line(error)}",
            remedy="start all of them, with one MASTER_ADDR and MASTER_PORT and ranks from 0 on; see that the machines "
            f"reach each other there; where they only start slowly, set {PATIENCE}",
            field=PATIENCE,
        ) from None
    own = dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=SILENCE)


def gather_all(store: Any, world: int, limit: timedelta) -> str:
    """On the first rank: name this start and tell it to all others. Raises TimeoutError, which says who is missing."""
    name, end = f"thence/{uuid.uuid4().hex}", time.monotonic() + limit.total_seconds()
    missing = set(range(1, world))
    while missing:
        for rank in sorted(missing):
            if store.check([f"thence/hello/{rank}"]):  # of this start, or of one before, which nobody hears
                store.set(f"thence/welcome/{store.get(f'thence/hello/{rank}').decode()}", name)
        missing = {rank for rank in missing if not store.check([f"{name}/in/{rank}"])}
        if missing and time.monotonic() > end:
            raise TimeoutError(f"rank {', '.join(map(str, sorted(missing)[:8]))} of {world} is not there")
        time.sleep(LOOK_SECONDS if missing else 0)
    store.set(f"{name}/go", "yes")
    return name


def join(store: Any, rank: int, limit: timedelta) -> str:
    """On another rank: say that it is there, and learn the name of the start. Raises DistError if nobody answers."""
    own = uuid.uuid4().hex
    store.set(f"thence/hello/{rank}", own)
    store.wait([f"thence/welcome/{own}"], limit)
    name = store.get(f"thence/welcome/{own}").decode()
    store.set(f"{name}/in/{rank}", "yes")
    store.wait([f"{name}/go"], limit)
    return name


def patience() -> float:
    """Seconds to wait for the others. Raises UserError where the environment says something else than a number."""
    text = os.environ.get(PATIENCE, "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86_400:
        raise UserError(
            f"the environment variable {PATIENCE} is {text!r}, not a number of seconds up to a day",
            remedy="set it to a number, for example 300, or unset it",
            field=PATIENCE,
        )
    return seconds
