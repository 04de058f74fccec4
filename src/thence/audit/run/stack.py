"""Audit a training stack through its adapter: probe, matrix, steps in its own environment, verdict."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from thence import __version__
from thence.audit.objectives import check_objective
from thence.audit.report import Report, make_report
from thence.audit.result import CaseResult
from thence.audit.run.cases import cases_for, named_like
from thence.audit.run.runner import StackRun, absolute_python, load_adapter, run_cases, started_processes
from thence.audit.solve.observation import Observation
from thence.audit.solve.probe import write_probe
from thence.errors import UserError
from thence.files import to_json, write_atomically

MARKER = ".thence-audit.json"
OnCase = Callable[[CaseResult], None]


def audit_stack(
    name: str,
    *,
    python: str | None = None,
    quick: bool = False,
    extra: bool = False,
    only: Sequence[str] = (),
    model_type: str = "llama",
    seed: int = 0,
    seconds: float = 120.0,
    keep: Path | None = None,
    tell: OnCase = lambda _: None,
) -> Report:
    """Audit a stack by the name of its adapter, or an adapter's file.

    Args:
        python: of the environment in which the stack is installed; None: the one that runs thence.
        quick: the cases that matter most.
        extra: also settings that nobody has by default.
        only: parts of case names; the others are left out.
        model_type: family of the tiny model.
        seed: of the probe.
        seconds: most for one case.
        keep: folder for everything the stack wrote; None: removed afterwards.
        tell: called with every case as it is judged.

    Raises:
        UserError: an unknown adapter, objective of its cases, or model type; the stack does not start, or no case is
            left.
    """
    start = time.monotonic()
    adapter = load_adapter(name)
    chosen = cases_for(adapter.axes, adapter.cases, quick=quick, extra=extra or bool(only))
    chosen = named_like(chosen, only)
    for case, _ in chosen:
        check_objective(case.asked)
    chosen = [(replace(case, options={**adapter.defaults, **case.options}), reason) for case, reason in chosen]
    given, python = python, absolute_python(python or sys.executable)
    cases = [case for case, reason in chosen if not reason]
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(working_folder(keep))
        run = StackRun(adapter, python, folder, seconds)
        first = None
        if cases:
            ranks = min(case.ranks for case in cases)
            first = opened.enter_context(started_processes(run, ranks))
        # The stack is being imported; so is torch now, here.
        from thence.audit.judge.case import Judge

        probe = write_probe(folder / "probe", model_type=model_type, seed=seed)
        judge = Judge.of_probe(probe)
        results: dict[str, CaseResult] = {}

        def judged(observed: Observation) -> None:
            results[observed.case.name] = judge.observation(observed)
            tell(results[observed.case.name])

        for case, reason in chosen:
            if reason:
                results[case.name] = CaseResult(case, "skipped", reason)
        _, versions, imports = run_cases(run, probe, cases, tell=judged, first=first)
    ordered = judge.compare_cuts([results[case.name] for case, _ in chosen])
    flags = [
        *(["--quick"] if quick else []),
        *(["--all"] if extra else []),
        *(f"--only {shlex.quote(part)}" for part in only),
    ]
    flags += [f"--python {shlex.quote(given)}"] if given and python != sys.executable else []
    flags += [f"--model-type {model_type}"] if model_type != "llama" else []
    flags += [f"--seed {seed}"] if seed else []
    return make_report(
        adapter.name,
        ordered,
        versions,
        " ".join(["thence", "audit", name, *flags]),
        probe,
        time.monotonic() - start,
        imports=imports,
    )


def _take(keep: Path) -> None:
    """Make a folder the audit's own. Raises UserError where it holds things that are not of an audit."""
    if keep.is_dir() and not (keep / MARKER).is_file() and (there := sorted(path.name for path in keep.iterdir())):
        raise UserError(
            f"the folder is of no audit and holds other things: {', '.join(there[:3])}",
            remedy="give a new or empty folder",
            file=keep,
            field="--keep",
        )
    if keep.exists() and not keep.is_dir():
        raise UserError("this is a file, not a folder", remedy="give a new or empty folder", file=keep, field="--keep")
    write_atomically(keep / MARKER, to_json({"format": 1, "kind": "thence audit", "thence": __version__}))


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """A folder that is removed at the end, or the one that is to be kept."""
    if keep is not None:
        _take(keep)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="thence-audit-") as name:
        yield Path(name)
