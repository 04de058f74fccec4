"""The update of several ranks against that of one process: every layout, method, head, tuning and precision.

    python -m tests.pipeline.update_matrix --out benchmarks/results/update-matrix.json

A cell trains a small model on made-up rollout batches (:mod:`tests.pipeline.update_cells`). The gradients of its
optimizer steps, their norms before clipping, and the change of the weights under AdamW are compared with those of a
process by itself. Processes are forked for ten cells at a time and each number of ranks, and what they found is kept in
`--work`: the same command goes on there. Controls are cells that are broken on purpose: each must be seen. Exit code 1
where a cell is further off than allowed, or a control is not seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import ROOT
from tests.pipeline.update_cells import (
    ALL,
    ALLOWED,
    COMPARED,
    CONTROLLED,
    CONTROLS,
    DTYPES,
    LAYOUTS,
    METHODS,
    OTHER_TOKENS,
    OTHERS,
    Cell,
    Trained,
    differences,
    train,
)
from thence.train.parallel import DataParallel, Ranks, SingleProcess, start_ranks

OTHERWISE = "one process, cut otherwise"
CELLS_OF_A_PART = 10


def of_ranks(cells: Sequence[Cell], world: int, layouts: Sequence[str], folder: Path) -> dict[str, Any]:
    """On one rank: the differences of every cell and control from what a process by itself has written."""
    ranks = start_ranks()[0] if world > 1 else DataParallel.alone(torch.device("cpu"))
    found: dict[str, Any] = {"cells": {}, "controls": {}}
    for cell in cells:
        alone = Trained(**torch.load(folder / f"{cell}.pt", weights_only=True))
        found["cells"][str(cell)] = {layout: differences(train(cell, ranks, layout), alone) for layout in layouts}
    if world > 1 and CONTROLLED in cells:
        alone = Trained(**torch.load(folder / f"{CONTROLLED}.pt", weights_only=True))
        for name, (damage, where) in CONTROLS.items():
            seen = {
                layout: differences(train(CONTROLLED, fresh(ranks), layout, damage), alone)
                for layout in where
                if layout in layouts
            }
            found["controls"][name] = seen
    ranks.wait()
    return found


def fresh(ranks: Ranks) -> Ranks:
    """The same ranks, to be damaged."""
    assert isinstance(ranks, DataParallel)
    return DataParallel(ranks.device)


def alone(cells: Sequence[Cell], folder: Path) -> None:
    """What a process by itself does, kept for the ranks; and how far it is off itself with other micro-batches."""
    found = {}
    for cell in cells:
        whole_run = train(cell, SingleProcess(), "none")
        torch.save(vars(whole_run), folder / f"{cell}.pt")
        found[str(cell)] = {
            OTHERWISE: differences(train(cell, SingleProcess(), "none", tokens=OTHER_TOKENS), whole_run)
        }
    (folder / "otherwise.json").write_text(json.dumps({"cells": found, "controls": {}}))


def matrix(cells: Sequence[Cell], layouts: dict[int, Sequence[str]], folder: Path) -> dict[int, dict[str, Any]]:
    """Try these cells on these numbers of ranks.

    Returns:
        By number, the worst difference over the ranks; by 0, that of one process from itself.
    """
    forked([lambda: alone(cells, folder)])
    found = {0: json.loads((folder / "otherwise.json").read_text())}
    for world, names in layouts.items():
        files = [folder / f"of-{world}-{rank}.json" for rank in range(world)]

        def work(rank: int, world: int = world, names: Sequence[str] = names, files: list[Path] = files) -> None:
            files[rank].write_text(json.dumps(of_ranks(cells, world, names, folder)))

        forked([lambda rank=rank: work(rank) for rank in range(world)])
        found[world] = worst_of([json.loads(file.read_text()) for file in files])
    return found


def worst_of(ranks: Sequence[Any]) -> Any:
    """The largest figure of all ranks in every place."""
    first = ranks[0]
    if isinstance(first, dict):
        return {key: worst_of([rank[key] for rank in ranks]) for key in first}
    return max(ranks)


def forked(works: Sequence[Callable[[], None]]) -> None:
    """Do each work in a process of its own, with the variables of torchrun. Raises RuntimeError where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank, work in enumerate(works):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(works)), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                torch.set_num_threads(1)
                work()
                code = 0
                if dist.is_initialized():
                    dist.destroy_process_group()
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"processes ended with {codes}; see above")


def record_of(found: dict[int, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The kept file: the worst difference of each cell, the worst of all, and whether everything holds."""
    cells = [
        {"ranks": world, "layout": layout, "cell": cell, **figures}
        for world, of_world in found.items()
        for cell, layouts in of_world["cells"].items()
        for layout, figures in layouts.items()
    ]
    controls = [
        {"ranks": world, "layout": layout, "control": name, **figures}
        for world, of_world in found.items()
        for name, layouts in of_world["controls"].items()
        for layout, figures in layouts.items()
    ]
    ranked = [cell for cell in cells if cell["layout"] != OTHERWISE]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("thence", "torch", "transformers", "peft")},
        "seconds": round(seconds),
        "methods": list(METHODS | OTHERS),
        "allowed": ALLOWED,
        "worst": worst(ranked),
        OTHERWISE: worst([cell for cell in cells if cell["layout"] == OTHERWISE]),
        "least_of_controls": min(max(c[what] for what in COMPARED) for c in controls) if controls else None,
        "controls": controls,
        "cells": ranked,
        "holds": all(holds(c) for c in ranked) and all(max(c[w] for w in COMPARED) > 0.01 for c in controls),
    }


def worst(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The largest figures, by precision."""
    by = {dtype: [cell for cell in cells if cell["cell"].endswith(dtype)] for dtype in DTYPES}
    return {dtype: {w: max(c[w] for c in found) for w in COMPARED} for dtype, found in by.items() if found}


def holds(cell: dict[str, Any]) -> bool:
    """Whether all figures of a cell are within what its precision allows."""
    allowed = next(limits for dtype, limits in ALLOWED.items() if cell["cell"].endswith(dtype))
    return all(cell[what] <= allowed[what] for what in COMPARED)


def in_parts(cells: Sequence[Cell], work: Path) -> dict[int, dict[str, Any]]:
    """The same as :func:`matrix`, a part after the other; parts that this code has finished in ``work`` are read."""
    parts, found = -(-len(cells) // CELLS_OF_A_PART), {}
    own = work / f"{digest()}-{len(cells)}"
    for number in range(parts):
        place = own / f"part-{number}"
        if not (done := place / "done.json").exists():
            place.mkdir(parents=True, exist_ok=True)
            made = matrix(cells[number::parts], LAYOUTS, place)
            done.write_text(json.dumps(made))
            for file in place.glob("*.pt"):
                file.unlink()
        for world, of_world in json.loads(done.read_text()).items():
            kept = found.setdefault(int(world), {"cells": {}, "controls": {}})
            kept["cells"] |= of_world["cells"]
            kept["controls"] |= of_world["controls"]
        print(f"part {number + 1} of {parts}", flush=True)
    return found


def digest() -> str:
    """Of the code that the figures follow from."""
    files = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--every", type=int, default=1, help="only every n-th cell")
    parser.add_argument("--work", type=Path, help="where parts are kept; default: a temporary folder")
    given, start = parser.parse_args(arguments), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = in_parts(ALL[:: given.every], given.work or Path(folder))
    record = record_of(found, time.monotonic() - start)
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in record.items() if key != "cells"}, indent=1))
    for cell in record["cells"]:
        if not holds(cell):
            print("too far off:", json.dumps(cell))
    return 0 if record["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
