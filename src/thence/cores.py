"""How torch's threads share the cores with other programs; settled before torch is loaded. Standard library only.

The threads of a parallel region wait for the slowest of them. By default libgomp, torch's OpenMP runtime on Linux, lets
them spin for 3 ms and more before they sleep. Beside a busy program they keep a core from the thread that they wait
for. A tenth of a millisecond bridges the gaps within a step, and then the core is free. Where another program competes
with the threads already, they sleep at once: that is slower alone and much faster beside it. How threads wait changes
no number, so it may follow from how busy the machine is.

The number of threads does change last bits. So it is never chosen by how busy the machine is, unless the user asks.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from thence.machine import usable_cores

SPINCOUNT = "10000"
"""Turns of libgomp's waiting loop before a thread sleeps, about 0.1 ms (`benchmarks/neighbour.py`)."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ASKED, CHOSEN = "THENCE_THREADS", "chosen"
"""The variable that asks for free cores (``auto``), and what it says once thence has chosen."""
STAT = Path("/proc/stat")
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
WINDOW = 0.3  # seconds of looking, in ticks of 10 ms
BUSY = 0.7  # of a core: a neighbour worth a word


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time so far: of the usable cores, and of this process; and when that was."""

    cores: float
    own: float
    at: float


def usage() -> Usage | None:
    """What was used until now; None where the system does not say (all but Linux)."""
    try:
        lines = STAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(usable_cores()))
    named = {f"cpu{core}" for core in usable}
    told = [words[1:9] for line in lines if (words := line.split()) and words[0] in named]
    if len(told) < len(named) or any(len(words) < 8 or not all(map(str.isdecimal, words)) for words in told):
        return None
    rows = [list(map(int, words)) for words in told]
    # user, nice, system, idle, iowait, irq, softirq, steal: all but idle and iowait
    ticks = sum(sum(row) - row[3] - row[4] for row in rows)
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), time.monotonic())


_begun = usage()


def taken_by_others(since: Usage | None, until: Usage | None) -> float | None:
    """Cores that other programs kept busy on average between two moments; None where that cannot be told."""
    if since is None or until is None or until.at - since.at < WINDOW / 2:
        return None
    return max(0.0, (until.cores - since.cores) - (until.own - since.own)) / (until.at - since.at)


def settle_waiting(environment: MutableMapping[str, str], loaded: bool) -> bool:
    """Choose how waiting threads wait, unless the user has said it. Returns whether it was set.

    They sleep soon, and at once where other programs compete with them now. An idle machine is known at once; a busy
    one is watched for `WINDOW` seconds.

    Args:
        environment: of this process and those that it starts.
        loaded: whether torch is loaded: its runtime has then read the variables already.
    """
    if loaded or not sys.platform.startswith("linux") or any(name in environment for name in WAITING):
        return False
    number_follows = environment.get(ASKED, "") != "" and not any(name in environment for name in THREADS)
    if not number_follows and not were_chosen(environment) and _compete(threads_expected(environment)):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    else:  # the number of threads that THENCE_THREADS chooses leaves others their cores
        environment["GOMP_SPINCOUNT"] = SPINCOUNT
    return True


def threads_expected(environment: Mapping[str, str]) -> int:
    """Threads that torch will start: one for each physical core of this process, or fewer where the user says so.

    Args:
        environment: OMP_NUM_THREADS may name a number for each level; the first one counts. MKL_NUM_THREADS comes
            before it where torch is built with MKL, on x86.
    """
    for name in reversed(THREADS) if platform.machine() in ("x86_64", "AMD64") else THREADS[:1]:
        first = environment.get(name, "").partition(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            return min(int(first), _physical_cores())
    return _physical_cores()


def _physical_cores() -> int:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(usable_cores()))
    try:
        return len({Path(TOPOLOGY.format(core)).read_text(encoding="utf-8") for core in cores})
    except OSError:
        return len(cores)


def _compete(threads: int) -> bool:
    """Whether other programs keep so many cores busy that this many threads have to share theirs."""
    if threads < 2 or not _others_run():
        return False
    if (before := usage()) is None:
        return False
    time.sleep(WINDOW)
    others = taken_by_others(before, usage())
    return others is not None and others >= BUSY and threads > free_cores(others)


def _others_run() -> bool:
    """Whether anything but this process runs or wants to run at this moment."""
    try:
        lines = STAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    running = [words[1] for line in lines if (words := line.split())[:1] == ["procs_running"] and len(words) > 1]
    return any(number.isdecimal() and int(number) > 1 for number in running)


def take_free_cores(environment: MutableMapping[str, str]) -> None:
    """Set the number of threads to that of the free cores, at least one, where ``THENCE_THREADS=auto`` asks for it.

    A number of threads that the user has set stays. Call it before torch is loaded.

    Raises:
        UserError: another value, or a system that does not say how busy its cores are.
    """
    from thence.errors import UserError

    asked = environment.get(ASKED, "")
    if asked in ("", CHOSEN):
        return
    if asked != "auto":
        remedy = f"{ASKED}=auto takes the free cores; OMP_NUM_THREADS=2 takes two threads"
        raise UserError(f"{ASKED} is auto or not set, not {asked!r}", remedy=remedy)
    if any(name in environment for name in THREADS):
        return
    before = usage()
    time.sleep(WINDOW)
    others = taken_by_others(before, usage())
    if others is None:
        remedy = "set OMP_NUM_THREADS to the number of threads"
        raise UserError(f"{ASKED}=auto: this system does not say how busy its cores are", remedy=remedy)
    environment["OMP_NUM_THREADS"] = str(free_cores(others))
    environment[ASKED] = CHOSEN


def free_cores(others: float) -> int:
    """Usable cores less those that others keep busy, at least one."""
    return max(1, usable_cores() - int(others + 0.5))


def beside(environment: Mapping[str, str], threads: int) -> tuple[int, int]:
    """Threads of this process, and of one that it starts and that computes as much beside it, on the same cores.

    A number that the user has set is that of each. Otherwise the threads of this process are dealt to both, the odd one
    to this one.

    Args:
        threads: of torch in this process.
    """
    if any(name in environment for name in THREADS) and not were_chosen(environment):
        return threads, threads
    return max(1, threads - threads // 2), max(1, threads // 2)


def were_chosen(environment: Mapping[str, str]) -> bool:
    """Whether thence has chosen the number of threads by what was free."""
    return environment.get(ASKED) == CHOSEN


def crowded(environment: Mapping[str, str], threads: int) -> str | None:
    """What to say of other programs that this process's threads compete with since it began; None where it is nothing.

    Args:
        environment: whoever sets a number of threads needs no advice.
        threads: of torch in this process.
    """
    if threads < 2 or any(name in environment for name in (*THREADS, ASKED)):
        return None
    others = taken_by_others(_begun, usage())
    if others is None or others < BUSY or threads <= free_cores(others):
        return None
    busy = f"other programs keep {others:.1f} of {usable_cores()} cores busy"
    advice = f"If that stays so, {ASKED}=auto is faster: it takes the free cores"
    return f"{busy}, and {threads} threads wait for the slowest. {advice}. Last bits may differ then"
