"""Which nodes hold what, and what is refused before anything runs."""

from __future__ import annotations

import pytest

from thence.errors import UserError
from thence.launch.base import Needs
from thence.launch.placement import (
    Node,
    has_room,
    refuse_other_software,
    refuse_too_many,
    refuse_what_fits_nowhere,
    room_for,
    say_other_hardware,
)

GB = 10**9
SMALL = Node("1", "small", cores=4, gpus=0, memory=8 * GB)
LARGE = Node("2", "large", cores=16, gpus=2, memory=64 * GB)


def test_a_node_is_read_from_what_ray_says_of_it() -> None:
    record = {
        "NodeID": "ab", "NodeName": "n1", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 5e9, "x": 1},
    }  # fmt: skip
    assert Node.of(record) == Node("ab", "n1", 2.0, 1.0, 5e9)
    assert Node.of({"NodeID": "ab", "NodeManagerAddress": "10.0.0.1"}) == Node("ab", "10.0.0.1", 0, 0, 0)


def test_room_is_what_is_left_beside_what_runs() -> None:
    assert room_for([SMALL, LARGE], Needs(cores=4), most=100) == 5
    assert room_for([SMALL, LARGE], Needs(cores=1, memory=30 * GB), most=100) == 2
    assert room_for([SMALL, LARGE], Needs(gpus=0.5), most=3) == 3
    gpu, cpu = Needs(cores=1, gpus=1), Needs(cores=4)
    assert has_room([SMALL, LARGE], [gpu], gpu)
    assert not has_room([SMALL, LARGE], [gpu, gpu], gpu)
    assert has_room([SMALL], [], cpu) and not has_room([SMALL], [cpu], Needs())
    # a small run beside large ones does not take the only place of a large one
    assert has_room([SMALL, LARGE], [Needs(cores=1), Needs(cores=16)], Needs(cores=3))


def test_what_fits_on_no_node_is_refused_with_the_need_and_the_largest_node() -> None:
    refuse_what_fits_nowhere([SMALL, LARGE], [Needs(16, 2, 64 * GB)])
    with pytest.raises(UserError) as told:
        refuse_what_fits_nowhere([SMALL, LARGE], [Needs(1), Needs(1, 0, 65 * GB)])
    assert "needs 1 core, 65.0 GB of memory" in told.value.problem
    assert "the largest is large (16 cores, 2 GPUs, 64.0 GB of memory)" in told.value.problem
    assert "--memory-gb" in told.value.remedy
    with pytest.raises(UserError, match="2 GPUs"):
        refuse_what_fits_nowhere([SMALL], [Needs(1, 2)])


def test_more_ranks_than_a_cluster_holds_are_refused() -> None:
    refuse_too_many([SMALL, LARGE], Needs(cores=4), 5)
    with pytest.raises(UserError, match=r"6 ranks .* do not fit the Ray cluster: its 2 nodes hold 5"):
        refuse_too_many([SMALL, LARGE], Needs(cores=4), 6)
    with pytest.raises(UserError, match="no node of the Ray cluster has that much"):
        refuse_too_many([SMALL, LARGE], Needs(cores=17), 1)


def test_a_node_with_another_version_is_refused_and_the_versions_are_named() -> None:
    mine = {"python": "3.11.7", "torch": "2.13.0", "files of thence": "aa"}
    refuse_other_software(mine, {**mine, "numpy": "2"}, "n1")
    for name in mine:
        with pytest.raises(UserError, match=f"node n1 .*{name} 0, here {mine[name]}"):
            refuse_other_software(mine, {**mine, name: "0"}, "n1")
    with pytest.raises(UserError, match="torch None"):
        refuse_other_software(mine, {"python": "3.11.7", "files of thence": "aa"}, "n1")


def test_other_processors_are_said_and_not_refused() -> None:
    one, other = {"processor": "A", "C compiler": "gcc 12"}, {"processor": "B", "C compiler": "gcc 12"}
    assert say_other_hardware({"n1": one, "n2": one}) == ""
    said = say_other_hardware({"n1": one, "n2": other})
    assert "processor (A on n1; B on n2): last bits may differ" in said
    assert "C compiler" in say_other_hardware({"n1": one, "n2": {**one, "C compiler": "none"}})
