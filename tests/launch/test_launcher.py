"""Jobs on a cluster, with a stand-in for Ray: who gets which process, what is said of a job that waits or is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thence.errors import UserError
from thence.launch import on_ray
from thence.launch.base import Needs, Order
from thence.launch.on_ray import RayLauncher
from thence.launch.placement import Node

GB = 10**9


class RayError(Exception):
    pass


class RayTaskError(RayError):
    cause = FileNotFoundError(2, "No such file or directory", "/data")


class Ref:
    """An answer that has not come yet."""

    def __init__(self, *asked: Any):
        self.asked, self.answer = asked, []


class Method:
    def __init__(self, actor: Actor, name: str):
        self.actor, self.name = actor, name

    def remote(self, *given: Any) -> Ref:
        self.actor.asked = Ref(self.name, *given)
        return self.actor.asked


class Actor:
    """Keeps what it is asked; a test answers."""

    def __init__(self, needs: tuple[Any, ...]):
        self.needs, self.killed, self.asked = needs, False, Ref()
        self.where, self.start, self.messages = (Method(self, name) for name in ("where", "start", "messages"))

    def answers(self, *answer: Any) -> None:
        self.asked.answer = list(answer)


class Kind:
    def __init__(self, cluster: Stand, needs: tuple[Any, ...]):
        self.cluster, self.needs = cluster, needs

    def remote(self, *given: Any) -> Actor:
        self.cluster.actors.append(Actor(self.needs))
        return self.cluster.actors[-1]


class Stand:
    """In place of a cluster and of the package ray."""

    exceptions: Any = type("exceptions", (), {"RayError": RayError, "RayTaskError": RayTaskError})

    def __init__(self) -> None:
        self.ray, self.actors, self.asked_nodes = self, [], []
        self.alive = [Node("aaaaaaaa", "a", 4, 0, 8 * GB), Node("bbbbbbbb", "b", 8, 1, 16 * GB)]

    def nodes(self) -> list[Node]:
        return list(self.alive)

    def actor(self, kind: type, cores: float, gpus: float, memory: int | None) -> Kind:
        return Kind(self, (cores, gpus, memory))

    def refuse_what_differs(self, nodes: list[Node], folder: Path) -> str:
        self.asked_nodes += [node.name for node in nodes]
        return ""

    def first_of(self, answers: list[Ref], seconds: float) -> list[Ref]:
        return [answer for answer in answers if answer.answer][:1]

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.answer[0], Exception):
            raise ref.answer[0]
        return ref.answer[0]

    def kill(self, actor: Actor) -> None:
        actor.killed = True


@pytest.fixture
def stand() -> Stand:
    return Stand()


@pytest.fixture
def launcher(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayLauncher:
    monkeypatch.setattr(on_ray, "LOOK_SECONDS", -1.0)
    return RayLauncher(stand, "module", tmp_path, threads=1, say=lambda text: None)  # type: ignore[arg-type]


def order(key: str, needs: Needs | None = None) -> Order:
    return Order(key, {"name": key}, Path("/f") / key, needs or Needs(1))


def heard(launcher: RayLauncher) -> list[tuple[Any, Any]]:
    return list(launcher.events(0))


def placed(launcher: RayLauncher, actor: Actor, id: str = "aaaaaaaa") -> list[tuple[Any, Any]]:
    """Let an actor come to its node and begin with its job."""
    actor.answers({"id": id, "host": "vm"})
    said = heard(launcher)
    actor.answers(None)
    return [*said, *heard(launcher)]


def test_a_job_is_placed_begun_and_heard_and_its_process_takes_the_next_one(launcher, stand: Stand) -> None:
    launcher.start(order("one"))
    (actor,) = stand.actors
    assert actor.needs == (1, 0, None)
    assert placed(launcher, actor) == [("one", {"placed": "on node vm [aaaaaa]"})]
    assert stand.asked_nodes == ["a"]
    actor.answers([{"progress": ["sft", 1, 2]}])
    assert heard(launcher) == [("one", {"progress": ["sft", 1, 2]})]
    actor.answers([])  # nothing new
    assert heard(launcher) == []
    actor.answers([{"progress": ["sft", 2, 2]}, {"done": True}])
    assert heard(launcher) == [("one", {"progress": ["sft", 2, 2]}), ("one", {"done": True})]
    launcher.start(order("two"))
    assert stand.actors == [actor] and actor.asked.asked == ("start", {"name": "two"}, "/f/two")


def test_other_needs_get_another_process_and_the_idle_one_ends(launcher, stand: Stand) -> None:
    launcher.start(order("one", Needs(1, 0, 2 * GB)))
    placed(launcher, stand.actors[0])
    stand.actors[0].answers([{"failed": "why"}])
    assert heard(launcher) == [("one", {"failed": "why"})]
    launcher.start(order("less", Needs(1, 0, 1 * GB)))
    assert len(stand.actors) == 1
    stand.actors[0].answers(None)
    heard(launcher)
    stand.actors[0].answers([{"done": True}])
    heard(launcher)
    launcher.start(order("more", Needs(1, 0, 3 * GB)))
    assert [actor.killed for actor in stand.actors] == [True, False]


def test_an_idle_process_ends_when_another_job_waits_for_room(launcher, stand: Stand) -> None:
    launcher.start(order("one"))
    placed(launcher, stand.actors[0])
    launcher.start(order("two", Needs(8)))
    stand.actors[0].answers([{"done": True}])
    assert heard(launcher) == [("one", {"done": True})]
    assert [actor.killed for actor in stand.actors] == [True, False]


def test_a_job_that_waits_for_room_says_so_once(launcher, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.start(order("one", Needs(2, 0, GB)))
    assert heard(launcher) == []
    monkeypatch.setattr(on_ray, "PATIENCE", -1.0)
    assert heard(launcher) == [("one", {"note": "waits for room in the cluster (2 cores, 1.0 GB of memory)"})]
    assert heard(launcher) == []


def test_a_lost_node_is_told_and_its_process_given_up(launcher, stand: Stand) -> None:
    launcher.start(order("one"))
    placed(launcher, stand.actors[0])
    stand.actors[0].answers(RayError("gone"))
    assert heard(launcher) == [("one", {"lost": "node vm [aaaaaa] was lost, or ended its process (Ray: RayError)"})]
    assert stand.actors[0].killed and launcher.has_room(Needs(1))


def test_what_thence_raises_on_a_node_is_no_lost_node(launcher, stand: Stand) -> None:
    launcher.start(order("one"))
    stand.actors[0].answers({"id": "aaaaaaaa", "host": "vm"})
    heard(launcher)
    stand.actors[0].answers(RayTaskError())
    ((key, message),) = heard(launcher)
    assert key == "one" and "/data: no such file or folder" in message["failed"]


def test_a_job_that_no_node_ever_held_fails_and_one_whose_node_is_gone_waits_for_another(
    launcher, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.start(order("huge", Needs(9)))
    assert not stand.actors
    ((key, message),) = heard(launcher)
    assert key == "huge" and "the largest is b (8 cores, 1 GPU, 16.0 GB of memory)" in message["failed"]
    stand.alive.pop()
    monkeypatch.setattr(on_ray, "PATIENCE", -1.0)
    launcher.start(order("large", Needs(8)))
    ((key, message),) = heard(launcher)
    assert key == "large" and message["note"].startswith("waits for a node that is large enough (8 cores)")


def test_room_is_that_of_the_nodes_and_of_the_limit(launcher, stand: Stand, tmp_path: Path) -> None:
    for number in range(3):
        assert launcher.has_room(Needs(4))
        launcher.start(order(str(number), Needs(4)))
    assert not launcher.has_room(Needs(4)) and not launcher.has_room(Needs(1))
    stand.alive.append(Node("cccccccc", "c", 4, 0, 8 * GB))
    assert launcher.has_room(Needs(4))
    few = RayLauncher(stand, "module", tmp_path, threads=1, most=1, say=lambda text: None)  # type: ignore[arg-type]
    few.start(order("one"))
    assert not few.has_room(Needs(1))


def test_the_check_asks_only_nodes_that_can_hold_a_job_and_refuses_what_none_can(launcher, stand: Stand) -> None:
    launcher.check([Needs(1, 1)])
    assert stand.asked_nodes == ["b"]
    with pytest.raises(UserError, match="needs 1 core, 2 GPUs"):
        launcher.check([Needs(1), Needs(1, 2)])


def test_everything_ends_with_the_block(launcher, stand: Stand) -> None:
    with launcher:
        launcher.start(order("one"))
        launcher.start(order("two"))
    assert [actor.killed for actor in stand.actors] == [True, True]
