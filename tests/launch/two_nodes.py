"""A Ray cluster of two nodes on this machine, run by an environment that has Ray.

    python two_nodes.py [CORES]

It prints its address and the nodes' ids as a line of JSON. A line ``kill ID`` on its input ends that node suddenly:
SIGKILL for the raylet and all of its workers. ``add`` starts another node. It ends with its input.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's 15 would starve beside other tests

from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

CORES = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
RESOURCES = {"num_cpus": CORES, "object_store_memory": 100 * 2**20}


def children(parent: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                state = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(state[1]) == parent:
                found.append(int(place.name))
    return found


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**RESOURCES, "include_dashboard": False})
    nodes = {node.node_id: node for node in (cluster.head_node, cluster.add_node(**RESOURCES))}
    print(json.dumps({"address": cluster.address, "nodes": list(nodes)}), flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "kill":
            raylet = nodes[rest].all_processes["raylet"][0].process.pid
            for process in (raylet, *children(raylet)):
                os.kill(process, signal.SIGKILL)
        if word == "add":
            node = cluster.add_node(**RESOURCES)
            nodes[node.node_id] = node
            print(json.dumps({"node": node.node_id}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
