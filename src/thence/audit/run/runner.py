"""Let an adapter take its steps: in the stack's own Python, in child processes with a time limit.

One process (one per rank) takes several cases one after the other, so that a slow import is paid once. A case that
crashes or hangs is reported as failed, and the processes are started again for those that are left.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thence.audit.result import Case
from thence.audit.run.cases import AXES
from thence.audit.run.printed import last_cause, names_error, printed_lines
from thence.audit.solve.observation import Observation
from thence.audit.solve.probe import Probe
from thence.errors import UserError
from thence.files import write_atomically

CHILD = Path(__file__).parent / "child.py"
ADAPTERS = Path(__file__).parents[1] / "adapters"
LAST_LINES = 8
"""Of what a process printed before it failed to start, so many lines are shown."""


@dataclass(frozen=True)
class Adapter:
    """The constants of an adapter's file.

    Args:
        name: as on the command line.
        path: of its file.
        stack: name of the audited package.
        axes: what the stack has, keys of ``cases.AXES``.
        cases: its own cases.
        defaults: options of the cases that do not name them.
    """

    name: str
    path: Path
    stack: str
    axes: frozenset[str]
    cases: tuple[Case, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StackRun:
    """How the cases of a stack are run.

    Args:
        adapter: of the stack.
        python: of the environment in which the stack is installed.
        folder: for everything that is written.
        seconds: most for one case, imports apart.
    """

    adapter: Adapter
    python: str
    folder: Path
    seconds: float = 120.0


@dataclass(frozen=True)
class StackProcesses:
    """The processes of one start, one a rank: they import the stack and wait for their cases.

    Args:
        job: the file that will hold the cases.
    """

    ranks: int
    job: Path
    processes: tuple[subprocess.Popen[bytes], ...]


def adapter_names() -> list[str]:
    """Names of the adapters that come with thence."""
    return sorted(p.stem.replace("_", "-") for p in ADAPTERS.glob("*.py") if not p.stem.startswith("_"))


def load_adapter(name: str) -> Adapter:
    """An adapter by its name, or from a file ``path/to/adapter.py``.

    Raises:
        UserError: there is none of that name, or it has an axis that there is not.
    """
    if name.endswith(".py"):
        from thence.audit.run.child import load_adapter as load_file

        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no adapter file {name}", remedy="give the path of an adapter's Python file")
        module = load_file(str(path))
    else:
        if name not in adapter_names():
            raise UserError(
                f"there is no adapter {name!r}",
                remedy=f"choose one of {', '.join(adapter_names())}, give an adapter's file, or audit any program "
                "with `thence audit command -- ...`",
            )
        path = ADAPTERS / f"{name.replace('-', '_')}.py"
        module = importlib.import_module(f"thence.audit.adapters.{path.stem}")
    if unknown := sorted(set(module.AXES) - AXES.keys()):
        raise UserError(
            f"the adapter has an unknown axis {unknown[0]!r}", remedy=f"axes are {', '.join(AXES)}", file=path
        )
    cases = tuple(Case(**fields) for fields in module.CASES)
    name, defaults = Path(name).stem.replace("_", "-"), getattr(module, "DEFAULTS", {})
    return Adapter(name, path, module.STACK, frozenset(module.AXES), cases, defaults)


def absolute_python(python: str) -> str:
    """The Python as a path that holds in every folder; a bare name is looked up on the PATH.

    A link is not followed: the Python of a virtual environment is one, and knows its environment by its own place.

    Raises:
        UserError: there is no such file.
    """
    if os.sep not in python:
        return python
    path = Path(os.path.abspath(os.path.expanduser(python)))  # noqa: PTH100, PTH111
    if not path.is_file():
        raise UserError(
            f"there is no {python}", remedy="give the stack's Python: --python ENV/bin/python", field="--python"
        )
    return str(path)


def start_processes(run: StackRun, ranks: int) -> StackProcesses:
    """Start processes that import the stack, before there are cases or a probe.

    Raises:
        UserError: ``python`` cannot be started.
    """
    for old in run.folder.glob("ready-*.json"):
        old.unlink()
    job = run.folder / "job.json"
    write_atomically(job, json.dumps({"adapter": str(run.adapter.path.resolve()), "out": str(run.folder)}))
    return StackProcesses(ranks, job, tuple(_start(run, job, ranks)))


@contextlib.contextmanager
def started_processes(run: StackRun, ranks: int) -> Iterator[StackProcesses]:
    """:func:`start_processes`; the processes always end with the block."""
    started = start_processes(run, ranks)
    try:
        yield started
    finally:
        if any(process.returncode is None for process in started.processes):
            _stop(started.processes, grace=0.0)


def run_cases(
    run: StackRun,
    probe: Probe,
    cases: Sequence[Case],
    *,
    tell: Callable[[Observation], None] = lambda _: None,
    first: StackProcesses | None = None,
) -> tuple[list[Observation], dict[str, str], float]:
    """Run cases and return their observations in order, the stack's versions, and the seconds of its imports.

    Args:
        tell: called with every observation as it comes.
        first: processes already started, for the cases of as many ranks.

    Raises:
        UserError: the stack could not be imported at all.
    """
    numbered = [(f"case-{i}", case) for i, case in enumerate(cases)]
    found: dict[str, Observation] = {}
    versions: dict[str, str] = {}
    imports = 0.0
    for ranks in sorted({case.ranks for case in cases}):
        left = [(name, case) for name, case in numbered if case.ranks == ranks]
        while left:
            early = first if first is not None and first.ranks == ranks else None
            started, first = early or start_processes(run, ranks), None
            try:
                done, said, waited = _run_started(run, started, probe, left, tell)
            except UserError as error:
                if not found:
                    raise
                # It started before: what was judged is kept.
                done, said, waited = _failed(run, left, str(error), tell), {}, 0.0
            versions |= said
            imports += waited
            found |= done
            left = [(name, case) for name, case in left if name not in found]
    return [found[name] for name, _ in numbered], versions, imports


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run_started(
    run: StackRun,
    started: StackProcesses,
    probe: Probe,
    cases: Sequence[tuple[str, Case]],
    tell: Callable[[Observation], None],
) -> tuple[dict[str, Observation], dict[str, str], float]:
    """One start of the processes: as many cases as they manage, at least one."""
    processes, ranks, folder = started.processes, started.ranks, run.folder
    for name, _ in cases:
        shutil.rmtree(folder / name, ignore_errors=True)
    job = {
        "adapter": str(run.adapter.path.resolve()),
        "model": str(probe.model),
        "data": {layout: str(path) for layout, path in probe.data.items()},
        "out": str(folder),
        "cases": [asdict(case) | {"folder": name} for name, case in cases],
    }
    write_atomically(started.job, json.dumps(job))
    found: dict[str, Observation] = {}
    try:
        ready = _wait(processes, [folder / f"ready-{r}.json" for r in range(ranks)], 600.0)
        if not ready:
            raise UserError(
                f"{run.adapter.stack} does not start in {run.python}: {_cause(folder, ranks)}",
                remedy=f"give the Python in which {run.adapter.stack} is installed: --python ENV/bin/python",
            )
        facts = json.loads((folder / "ready-0.json").read_text(encoding="utf-8"))
        for name, case in cases:
            begun = time.monotonic()
            records = [folder / name / f"rank-{r}" / "record.json" for r in range(ranks)]
            complete = _wait(processes, records, run.seconds)
            found[name] = _observe(run, case, name, complete, time.monotonic() - begun)
            tell(found[name])
            if not complete:
                break
        return found, facts["versions"], facts["import_seconds"]
    finally:
        _stop(processes, grace=2.0 if len(found) == len(cases) else 0.0)


def _failed(
    run: StackRun, cases: Sequence[tuple[str, Case]], reason: str, tell: Callable[[Observation], None]
) -> dict[str, Observation]:
    found = {name: Observation(case, run.folder / name, (), "failed", reason) for name, case in cases}
    for observation in found.values():
        tell(observation)
    return found


def _start(run: StackRun, job: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    port, processes = free_port(), []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(run.folder / "hub"),
            "WANDB_MODE": "disabled",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment.pop("PYTHONPATH", None)
        if ranks == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                environment.pop(name)
        log = (run.folder / f"log-{ranks}-{rank}.txt").open("ab")
        options = {"stdin": subprocess.DEVNULL, "env": environment, "cwd": run.folder, "start_new_session": True}
        with log:
            try:
                processes.append(
                    subprocess.Popen([run.python, str(CHILD), str(job)], stdout=log, stderr=log, **options)
                )
            except OSError as error:
                raise UserError(
                    f"{run.python} cannot be started: {error}",
                    remedy="give the stack's Python: --python ENV/bin/python",
                ) from None
    return processes


def _wait(processes: Sequence[subprocess.Popen[bytes]], files: Sequence[Path], seconds: float) -> bool:
    """Until all files are there; False if a process ends without them, or the time is over."""
    limit = time.monotonic() + seconds
    while True:
        if all(_complete(file) for file in files):
            return True
        dead = [p for p in processes if p.poll() is not None]
        if dead:
            return all(_complete(file) for file in files)
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)


def _complete(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _observe(run: StackRun, case: Case, name: str, complete: bool, waited: float) -> Observation:
    folder = run.folder / name
    paths = [folder / f"rank-{rank}" / "record.json" for rank in range(case.ranks)]
    records = tuple(json.loads(path.read_text(encoding="utf-8")) for path in paths if _complete(path))
    if not complete:
        failed = [r["reason"] for r in records if r["status"] == "failed"]
        why = f"no answer within {run.seconds:g} s" if waited >= run.seconds else "the process ended"
        reason = f"{failed[0]} ({why} on another rank)" if failed else f"{why}: {_tail(run.folder, case.ranks)}"
        return Observation(case, folder, records, "failed", reason, waited)
    for status in ("failed", "skipped"):
        reasons = [r["reason"] for r in records if r["status"] == status]
        if reasons:
            return Observation(case, folder, records, status, reasons[0], waited)
    return Observation(case, folder, records, "done", "", waited)


def _tail(folder: Path, ranks: int) -> str:
    """The line in the logs of the processes that tells most: the last error, else the last line."""
    said = _logs(folder, ranks)
    causes = [cause for cause in map(last_cause, said) if cause]
    lines = causes or [line for lines in said for line in lines]
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def _cause(folder: Path, ranks: int) -> str:
    """The line that tells most, and under it the last lines that the same process printed."""
    said = _logs(folder, ranks)
    chosen = next((lines for lines in said if any(map(names_error, lines))), next(iter(said), []))
    below = "".join(f"\n    {line[:200]}" for line in chosen[-LAST_LINES:])
    return f"{_tail(folder, ranks)}{below}"


def _logs(folder: Path, ranks: int) -> list[list[str]]:
    """Lines that say something, of each process that said anything."""
    paths = [folder / f"log-{ranks}-{rank}.txt" for rank in range(ranks)]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.exists()]
    return [lines for lines in map(printed_lines, texts) if lines]


def _stop(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End the processes and whatever they started."""
    limit = time.monotonic() + grace
    for process in processes:
        while process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
