"""Switch every fault on, take real steps on random probes, and count how often the audit names it.

    python benchmarks/audit_mutation.py [--probes 50] [--clean 500] [--seed 0] [--only NAME ... [--add]]

Writes docs/evidence/audit-mutation.json and prints the table; with ``--add`` only the rows of these faults are new.
About a quarter of a second a probe on one core; of reinforcement learning one to three seconds.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import thence  # noqa: E402
from tests.audit import mutation, policy_mutation  # noqa: E402  # pyright: ignore[reportMissingImports]
from thence.faults.catalogue import FAULTS, Fault  # noqa: E402


@dataclass(frozen=True)
class Kind:
    """Probes of supervised steps, or of reinforcement learning.

    Args:
        made: the module that draws and judges them.
        of_rollouts: whether its faults are those of reinforcement learning.
        clean: what ``--only`` calls its clean probes.
        title: of their row.
    """

    made: Any
    of_rollouts: bool
    clean: str
    title: str


KINDS = (
    Kind(mutation, False, "clean", "none: the clean step"),
    Kind(policy_mutation, True, "clean-rl", "none: the clean steps of RL"),
)
EVIDENCE = ROOT / "docs" / "evidence" / "audit-mutation.json"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--probes", type=int, default=50, help="random probes of every fault")
    parser.add_argument("--clean", type=int, default=500, help="random probes of the clean step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=None, help="these faults only; nothing is written")
    parser.add_argument("--add", action="store_true", help="with --only: put these rows into the evidence there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'fault':28}{'named':>12}{'seconds':>10}  what the audit said (times)")
    rows = []
    for kind in KINDS:
        wanted: list[Fault | None] = [None, *(f for f in FAULTS.values() if bool(f.needs.features) == kind.of_rollouts)]
        for fault in wanted:
            if arguments.only is not None and (fault.name if fault else kind.clean) not in arguments.only:
                continue
            rows.append(measure(kind, fault, arguments.probes if fault else arguments.clean, arguments.seed))
            print(line(rows[-1]), flush=True)
    if arguments.only is None:
        EVIDENCE.write_text(json.dumps(evidence(arguments, rows), indent=1) + "\n", encoding="utf-8")
    elif arguments.add:
        EVIDENCE.write_text(json.dumps(added(rows), indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["right"] == row["probes"] for row in rows) else 1


def measure(kind: Kind, fault: Fault | None, count: int, seed: int) -> dict[str, Any]:
    """One line of the table; the clean step is right where nothing at all is found."""
    start, right, wrong = time.perf_counter(), 0, []
    ids: collections.Counter[str] = collections.Counter()
    for number, probe in enumerate(kind.made.probes(fault, count, seed)):
        result = kind.made.judge_probe(probe, [fault.name] if fault else [])
        found = sorted(finding.id for finding in result.all_findings if finding.kind != "choice")
        ids.update(found or ([result.status] if result.status != "judged" else []))
        judged = result.status == "judged"
        good = judged and (mutation.named(result, fault) if fault else not found)
        right += good
        if not good:
            wrong.append({"probe": number, "status": result.status, "reason": result.reason, "findings": found})
    return {
        "fault": fault.name if fault else kind.title,
        "title": fault.title if fault else "",
        "finds": fault.finds if fault else (),
        "probes": count,
        "right": right,
        "findings": dict(ids.most_common()),
        "wrong": wrong,
        "seconds": round(time.perf_counter() - start, 1),
    }


def line(row: dict[str, Any]) -> str:
    said = ", ".join(f"{name} ({times})" for name, times in row["findings"].items()) or "nothing"
    return f"{row['fault']:28}{row['right']:>6}/{row['probes']:<5}{row['seconds']:>10}  {said}"


def added(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The evidence there is, with these rows new, in the order of the catalogue."""
    found = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    by_name = {row["fault"]: row for row in [*found["table"], *rows]}
    order = [name for name in by_name if name not in FAULTS] + [name for name in FAULTS if name in by_name]
    return found | {"table": [by_name[name] for name in order]}


def evidence(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": f"python benchmarks/audit_mutation.py --probes {arguments.probes} --clean {arguments.clean} "
        f"--seed {arguments.seed}",
        "thence": thence.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "table": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
