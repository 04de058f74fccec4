"""Which nodes of a cluster can hold what a process needs: the arithmetic alone, Ray does the placing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from thence.errors import UserError
from thence.launch.base import Needs

TINY = 1e-6  # Ray counts resources in ten thousandths


@dataclass(frozen=True)
class Node:
    """A machine of a cluster, with all that it has, free or not.

    Args:
        id: Ray's.
        name: for the reader.
        memory: bytes that Ray deals out.
    """

    id: str
    name: str
    cores: float
    gpus: float
    memory: float

    @staticmethod
    def of(record: Mapping[str, object]) -> Node:
        """From what ``ray.nodes()`` says of one that is alive."""
        has = record.get("Resources")
        has = has if isinstance(has, dict) else {}
        return Node(
            id=str(record["NodeID"]),
            name=str(record.get("NodeName") or record.get("NodeManagerAddress") or "?"),
            cores=float(has.get("CPU", 0)),
            gpus=float(has.get("GPU", 0)),
            memory=float(has.get("memory", 0)),
        )

    def holds(self, needs: Needs) -> bool:
        """Whether it could ever hold one such process."""
        return (
            needs.cores <= self.cores + TINY
            and needs.gpus <= self.gpus + TINY
            and (needs.memory or 0) <= self.memory + TINY
        )

    def less(self, needs: Needs) -> Node:
        """What is left of it beside one such process. Whole GPUs are not cut for another process's fraction."""
        return Node(
            self.id,
            self.name,
            self.cores - needs.cores,
            self.gpus - needs.gpus,
            self.memory - (needs.memory or 0),
        )

    def __str__(self) -> str:
        return f"{self.name} ({Needs(self.cores, self.gpus, int(self.memory))})"


def left_beside(nodes: Iterable[Node], running: Iterable[Needs]) -> list[Node]:
    """What is left of nodes when processes are dealt to them, the largest first, each to the first that holds it."""
    left = list(nodes)
    for needs in sorted(running, key=lambda n: (n.gpus, n.memory or 0, n.cores), reverse=True):
        place = next((i for i, node in enumerate(left) if node.holds(needs)), None)
        if place is not None:
            left[place] = left[place].less(needs)
    return left


def has_room(nodes: Sequence[Node], running: Sequence[Needs], needs: Needs) -> bool:
    """Whether nodes hold one more process beside those that run or wait for their place."""
    return any(node.holds(needs) for node in left_beside(nodes, running))


def room_for(nodes: Sequence[Node], needs: Needs, most: int) -> int:
    """How many such processes nodes hold side by side, counted up to ``most``."""
    left, count = list(nodes), 0
    while count < most:
        place = next((i for i, node in enumerate(left) if node.holds(needs)), None)
        if place is None:
            break
        left[place] = left[place].less(needs)
        count += 1
    return count


def refuse_what_fits_nowhere(nodes: Sequence[Node], needs: Iterable[Needs]) -> None:
    """Raise UserError where a process needs more than any node has, used or not."""
    for each in dict.fromkeys(needs):
        if not any(node.holds(each) for node in nodes):
            largest = max(nodes, key=lambda node: (node.gpus >= each.gpus, node.memory, node.cores))
            remedy = "add a larger node, or state less with --cores, --gpus or --memory-gb"
            raise UserError(
                f"a process needs {each}, and no node of the Ray cluster has that much: the largest is {largest}",
                remedy=f"{remedy}; what takes more memory than was stated may be ended",
                field="--on",
            )


def refuse_too_many(nodes: Sequence[Node], needs: Needs, count: int) -> None:
    """Raise UserError where so many processes that run together do not fit the cluster, whatever else runs there."""
    refuse_what_fits_nowhere(nodes, [needs])
    if (room := room_for(nodes, needs, count)) < count:
        raise UserError(
            f"{count} ranks that each need {needs} do not fit the Ray cluster: its {len(nodes)} nodes hold {room}",
            remedy="add nodes, ask for fewer ranks, or state less with --cores, --gpus or --memory-gb",
            field="--ranks",
        )


def refuse_other_software(mine: Mapping[str, str], theirs: Mapping[str, str], node: str) -> None:
    """Raise UserError where a node has another Python, package or thence: results could not be compared."""
    other = [f"{name} {theirs.get(name)}, here {mine[name]}" for name in mine if theirs.get(name) != mine[name]]
    if other:
        raise UserError(
            f"node {node} of the Ray cluster has other software than this command: {'; '.join(other)}",
            remedy="install the same versions on every node (constraints.txt pins them), and start Ray there with that "
            "Python; results under different versions cannot be compared",
            field="--on",
        )


def say_other_hardware(hardware: Mapping[str, Mapping[str, str]]) -> str:
    """What to say where nodes differ in what last bits depend on; empty where they do not.

    Args:
        hardware: what each node has, by its name.
    """
    for what in ("processor", "C compiler"):
        kinds: dict[str, list[str]] = {}
        for node, has in hardware.items():
            kinds.setdefault(has.get(what, "?"), []).append(node)
        if len(kinds) > 1:
            told = "; ".join(f"{kind} on {', '.join(names[:3])}" for kind, names in kinds.items())
            return f"nodes differ in their {what} ({told}): last bits may differ between runs"
    return ""
