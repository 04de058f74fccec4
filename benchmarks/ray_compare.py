"""A comparison on a Ray cluster of two nodes, one of which is killed, against the same on local processes, bit for bit.

    python benchmarks/ray_compare.py --python ENV/bin/python [--comparison quick] [--keep FOLDER]

ENV has Ray and thence (docs/ray.md). Both nodes are on this machine. The second is killed (SIGKILL for its raylet and
workers) when a run there has kept its first checkpoint; then another node joins. Writes
benchmarks/results/ray-compare.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.launch.clusters import Command, TwoNodes, differences  # noqa: E402

NOTE = re.compile(r": (on node|waits for|node .* was lost)")


def main() -> int:
    """Run both, and write what came of it. Returns 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--comparison", default="quick")
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="ray-compare-"))
    folder.mkdir(parents=True, exist_ok=True)
    local = Command(given.python, ["compare", given.comparison, "--folder", str(folder / "local")], folder)
    assert local.wait(7200) == 0, local.text
    on_ray, killed = _on_ray(given.python, given.comparison, folder)
    found = differences(folder / "local", folder / "ray")
    results = json.loads((folder / "ray" / "results.json").read_text())
    record: dict[str, Any] = {
        "command": f"python benchmarks/ray_compare.py --comparison {given.comparison}",
        "comparison": given.comparison,
        "runs": len(results["runs"]) + len(results["tuning_runs"]),
        "models": len(list((folder / "ray").rglob("model.safetensors"))),
        "differences": found,
        "killed": killed,
        "notes": [re.sub(r" \[\w+\]", "", line) for line in on_ray.lines if NOTE.search(line)],
        "environment": {key: results["environment"][key] for key in ("torch", "cpu", "threads", "kernels")},
    }
    (ROOT / "benchmarks" / "results" / "ray-compare.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 1 if found else 0


def _on_ray(python: str, comparison: str, folder: Path) -> tuple[Command, str]:
    with TwoNodes(python) as cluster:
        second = cluster.nodes[1]
        arguments = ["compare", comparison, "--folder", str(folder / "ray"), "--on", f"ray:{cluster.address}"]
        command = Command(python, arguments, folder)
        placed = command.until(lambda: command.line_with("on node", second[:6]), 1800)
        base, seed = re.findall(r"from (\S+), seed (\d+):", placed)[0]
        arm = placed.split(" ")[0]
        pattern = f"runs/{base}/seed{seed}/{arm}-*/stages/*/checkpoints/step-*"
        command.until(lambda: list((folder / "ray").glob(pattern)), 1800)
        cluster.kill(second)
        command.until(lambda: command.line_with("was lost"), 300)
        cluster.add()
        assert command.wait(7200) == 0, command.text
    return command, re.sub(r" \[\w+\]", "", placed)


if __name__ == "__main__":
    sys.exit(main())
