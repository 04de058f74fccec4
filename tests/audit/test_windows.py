"""Which rows a step of the audit was due, and whether it held them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from thence.audit.judge.windows import window_findings
from thence.audit.result import Case
from thence.audit.solve.sequences import Piece


def found(case: Case, steps: Sequence[Sequence[int]], again: bool = False) -> list[tuple[str, str]]:
    seen: dict[int, int] = {}
    findings = []
    for number, examples in enumerate(steps, start=1):
        pieces = [Piece(example, (), (), row, 0, None, None) for row, example in enumerate(examples)]
        findings += window_findings(case, number, pieces, seen, again)
    return [(finding.id, finding.kind) for finding in findings]


UNEVEN = [("examples-uneven", "fault")]
ALL = list(range(8))


@pytest.mark.parametrize("examples", [[0, 1, 2, 3] * 2, [0, 0, 1, 2, 3, 4, 5, 6], [7] * 8])
def test_a_full_window_that_trains_rows_again_in_place_of_others_is_a_fault(examples: list[int]) -> None:
    assert found(Case("ranks", 4, 1, ranks=2), [examples]) == UNEVEN


def test_data_that_do_not_move_on_are_a_fault_in_the_step_in_which_it_shows() -> None:
    case = Case("three steps", 2, 2, epochs=2, steps=3)
    assert found(case, [[0, 1, 2, 3], [0, 1, 2, 3]]) == UNEVEN
    assert found(case, [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 0, 1]]) == UNEVEN


def test_every_order_of_an_epoch_is_right() -> None:
    case = Case("three steps", 2, 2, epochs=2, steps=4)
    assert not found(case, [[7, 1, 2, 3], [4, 5, 6, 0], [0, 7, 1, 2], [3, 4, 5, 6]])


def test_rows_of_one_generation_may_come_again_in_later_steps() -> None:
    case = Case("two updates", 2, 4, steps=2, epochs=2)
    assert not found(case, [ALL, ALL], again=True)
    half = Case("two updates of half", 2, 2, steps=2)
    assert not found(half, [[0, 1, 2, 3], [0, 1, 2, 3]], again=True)
    assert found(half, [[0, 0, 1, 2]], again=True) == UNEVEN


def test_after_a_window_of_another_size_no_epoch_is_assumed() -> None:
    case = Case("epoch edge", 2, 4, examples=10, epochs=3, steps=5)
    dropped = [[*range(8)], [2, 3, 4, 5, 6, 7, 8, 9], [*range(8)], [0, 1, 2, 3, 4, 5, 6, 9]]
    assert {name for name, _ in found(case, dropped)} <= {"window-dropped", "window-mixed"}
