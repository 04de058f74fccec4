"""Try thence on a tiny model of every causal-language-model architecture of the installed transformers.

.venv/bin/python benchmarks/model_matrix.py [--only NAME,...] [--sample] [--jobs 2] [--write]

Every architecture runs in a process of its own with a time limit, so that one crash or hang stops no other.
``--write`` stores ``benchmarks/results/model-matrix.json`` and ``docs/models.md``. What the cells ask:
``model_cells.py``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT))

LIMIT = 120.0  # seconds for all cells of one architecture


def child(kind: str, out: Connection) -> None:
    """Run one architecture and send every cell as soon as it is known."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from model_cells import run_cells

    try:
        for name, cell in run_cells(kind):
            out.send((name, cell))
    except Exception as error:  # the model itself could not be built or saved: nothing of thence ran
        out.send(("made", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    out.send(("done", None))


def run_all(kinds: list[str], jobs: int, results: dict[str, dict[str, Any]]) -> None:
    """Fill in the cells by architecture; ``made`` holds the reason where no tiny model can be made."""
    from tests.models.tiny_models import not_made

    context = multiprocessing.get_context("forkserver")
    # modules of these two folders are found by the children only: the server does not take this process's path over
    context.set_forkserver_preload(["transformers.modeling_utils", "thence.train.model", "thence.train.trainer"])
    results.update({kind: {"made": not_made(kind)} for kind in kinds if not_made(kind)})
    waiting = [kind for kind in kinds if kind not in results]
    running: dict[Connection, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(kind, theirs), daemon=True)
            process.start()
            theirs.close()
            running[mine] = (kind, process, time.monotonic())
            results[kind] = {}
        for connection in wait(list(running), timeout=1.0):
            _receive(connection, running, results)  # type: ignore[arg-type]
        for connection, (kind, process, start) in list(running.items()):
            if time.monotonic() - start > LIMIT:
                process.kill()
                _close(results[kind], f"no end within {LIMIT:.0f} s")
                del running[connection]
                _say(kind, results[kind])


def _receive(connection: Connection, running: dict[Connection, Any], results: dict[str, Any]) -> None:
    kind, process, _ = running[connection]
    try:
        name, cell = connection.recv()
    except EOFError:
        process.join()
        _close(results[kind], f"the process ended with code {process.exitcode}")
        name, cell = "done", None
    if name == "done":
        process.join()
        del running[connection]
        _say(kind, results[kind])
    else:
        results[kind][name] = cell


def _close(cells: dict[str, Any], reason: str) -> None:
    """The cell that was running takes the blame; those after it did not run."""
    from model_cells import CELLS, Cell

    missing = [name for name in CELLS if name not in cells]
    for i, name in enumerate(missing):
        cells[name] = Cell("not run" if i else "traceback", reason)


def _say(kind: str, cells: dict[str, Any]) -> None:
    words = f"not made: {cells['made']}" if "made" in cells else " ".join(f"{n}={c.verdict}" for n, c in cells.items())
    print(f"{kind:28s} {words}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="architectures, comma-separated")
    parser.add_argument("--sample", action="store_true", help="the families that the tests run")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--write", action="store_true", help="store the results and docs/models.md")
    parser.add_argument("--json", type=Path, help="store the results here")
    options = parser.parse_args()
    from tests.models.tiny_models import SAMPLE, architectures, variants

    kinds = [*architectures(), *variants()]
    if options.only:
        kinds = options.only.split(",")
    elif options.sample:
        kinds = list(SAMPLE)
    start = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    try:
        run_all(kinds, options.jobs, results)
    except KeyboardInterrupt:
        print("stopped: only what was finished is reported")
    results = {kind: results[kind] for kind in kinds if kind in results}
    report = make_report(results, time.monotonic() - start)
    print(json.dumps(report["counts"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if options.write:
        from model_page import write_page

        place = ROOT / "benchmarks" / "results" / "model-matrix.json"
        if options.only or options.sample:
            report = joined(json.loads(place.read_text(encoding="utf-8")), report)
        place.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write_page(report, ROOT / "docs" / "models.md")


def make_report(results: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The results with what they depend on, as plain values."""
    import model_cells
    import torch
    import transformers

    from tests.models.tiny_models import class_of

    counts = {
        name: dict(Counter(cells[name].verdict for cells in results.values() if name in cells))
        for name in model_cells.CELLS
    }
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": model_cells.SEED,
        "tolerances": {
            "logp": model_cells.LOGP_TOLERANCE[torch.float64],
            "gradient": model_cells.GRADIENT_TOLERANCE[torch.float64],
            "logp_float32": model_cells.LOGP_TOLERANCE[torch.float32],
            "gradient_float32": model_cells.GRADIENT_TOLERANCE[torch.float32],
            "sampled": model_cells.SAMPLED_TOLERANCE,
        },
        "seconds": round(seconds, 1),
        "counts": counts,
        "models": {
            kind: {"class": class_of(kind), "made": cells["made"]}
            if "made" in cells
            else {"class": class_of(kind), "cells": model_cells.as_plain(cells)}
            for kind, cells in results.items()
        },
    }


def joined(stored: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The stored results with those of some architectures replaced. Raises SystemExit where they do not compare."""
    if any(stored[name] != new[name] for name in ("versions", "seed", "tolerances")):
        raise SystemExit("the stored results are of other versions, seed or tolerances: run all architectures")
    models = stored["models"] | new["models"]
    cells = [model["cells"] for model in models.values() if "cells" in model]
    counts = {name: dict(Counter(c[name]["verdict"] for c in cells if name in c)) for name in stored["counts"]}
    return stored | {"models": models, "counts": counts}


if __name__ == "__main__":
    main()
