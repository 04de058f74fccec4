"""What the audit solves with: least squares, gradients of updates, finding examples, telling cuts apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thence.audit.judge.windows import planned_places
from thence.audit.result import Case
from thence.audit.run.cases import cases_for, matrix
from thence.audit.run.runner import adapter_names, load_adapter
from thence.audit.solve.observation import ForwardRow, forward_rows
from thence.audit.solve.probe import LENGTHS, make_examples
from thence.audit.solve.recover import LeastSquares, gradient_of_update
from thence.audit.solve.sequences import KnownExample, find_pieces


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_least_squares_gives_back_any_weights(seed: int, units: int) -> None:
    draw = np.random.default_rng(seed)
    columns = draw.normal(size=(units, 400)) * draw.lognormal(size=(units, 1))
    weights = draw.normal(size=units)
    fit = LeastSquares(columns).solve(weights @ columns)
    assert fit.weights == pytest.approx(weights, abs=1e-9)
    assert fit.residual < 1e-9


def test_columns_that_cannot_be_told_apart_are_said_to_be() -> None:
    draw = np.random.default_rng(0)
    columns = draw.normal(size=(3, 100))
    columns[2] = columns[1]
    fit = LeastSquares(columns).solve(columns[0] + columns[1])
    assert fit.undetermined.tolist() == [False, True, True]


def test_the_update_of_adam_with_a_huge_epsilon_gives_the_gradient_exactly() -> None:
    gradient = np.array([3.0, -0.5, 1e-3])
    change = 1e4 * gradient / (np.abs(gradient) + 1e4)
    assert gradient_of_update(change, np.zeros(3), "adamw", 1e4, 1e4) == pytest.approx(gradient, rel=1e-12)


def test_examples_are_found_under_any_template_and_in_packed_rows() -> None:
    known = [KnownExample((10, 11), (20,), (), ()), KnownExample((12, 13), (21, 22), (), ())]
    row = (1, 10, 11, 2, 20, 9, 1, 12, 13, 2, 21, 22, 9, 5, 0, 0)
    mask = tuple(int(t < 14) for t in range(16))
    pieces, strange = find_pieces([ForwardRow(row, mask, None, 0, 0)], known, end=9)
    assert strange == 0
    assert [p.ids for p in pieces] == [(1, 10, 11, 2, 20, 9), (1, 12, 13, 2, 21, 22, 9, 5)]
    assert pieces[0].roles == ("prompt", "prompt", "prompt", "prompt", "first", "end")
    assert pieces[1].roles[-4:] == ("first", "body", "end", "after")
    assert find_pieces([ForwardRow((7, 7), (1, 1), None, 0, 0)], known, end=9) == ([], 1)


def test_a_short_response_is_not_taken_for_a_letter_of_the_template() -> None:
    """The end token behind it tells them apart."""
    known = [KnownExample((10, 11), (20,), (), ())]
    pieces, _ = find_pieces([ForwardRow((1, 10, 11, 20, 2, 20, 9), (1,) * 7, None, 0, 0)], known, end=9)
    assert pieces[0].roles == ("prompt",) * 5 + ("first", "end")


def test_examples_that_are_alike_are_taken_in_turn() -> None:
    """Two equal responses of a group are no example that came twice."""
    one, other = KnownExample((), (), (5, 6, 7), (-100, 6, 7)), KnownExample((), (), (5, 8, 9), (-100, 8, 9))
    known = [one, other, one]
    rows = [ForwardRow(item.row, (1, 1, 1), None, 0, 0) for item in known]
    assert [piece.example for piece in find_pieces(rows, known, end=9)[0]] == [0, 1, 2]
    assert [piece.example for piece in find_pieces(rows[:1], known, end=9, seen={0: 1})[0]] == [2], "in a later step"
    assert [piece.example for piece in find_pieces(rows[:1] * 3, known, end=9)[0]] == [0, 2, 0], "really repeated"


def test_padding_that_a_mask_does_not_hide_is_no_text_of_the_template() -> None:
    record = {"forwards": [{"step": 0, "input_ids": [[1, 2, 3, 0, 0]], "attention_mask": [[1, 1, 1, 1, 1]]}]}
    record["forwards"][0]["position_ids"] = None
    assert forward_rows([record], 0, pad=0)[0].mask == (1, 1, 1, 0, 0)


def test_a_stack_without_an_axis_has_its_cases_skipped_by_name() -> None:
    chosen = cases_for({"adamw"})
    skipped = {case.name: reason for case, reason in chosen if reason}
    assert any("2 ranks" in name for name in skipped)
    assert all("this stack lacks" in reason for reason in skipped.values())
    assert len([case for case, _ in cases_for({"ranks", "epochs"}, quick=True)]) == 4
    assert len({case.name for _, case in matrix()}) == len(matrix())


def token_counts(case: Case) -> list[list[int]]:
    """Trained tokens of the micro-batches, accumulation steps and ranks of each step, and of the steps."""
    found: list[list[int]] = []
    steps: list[tuple[int, ...]] = []
    for places in planned_places(case):
        for key in (lambda m, r: (m, r), lambda m, r: m, lambda m, r: r):
            sums: dict[object, int] = {}
            for example, micro, rank in places:
                sums[key(micro, rank)] = sums.get(key(micro, rank), 0) + LENGTHS[example]
            found.append(list(sums.values()))
        steps.append(tuple(sorted(example for example, _, _ in places)))
    return [*found, [sum(LENGTHS[example] for example in step) for step in set(steps)]]


def cuts() -> list[Case]:
    """Every case of the matrix and of the adapters that come with thence."""
    own = [case for name in adapter_names() for case in load_adapter(name).cases]
    return [case for _, case in matrix()] + own


def test_no_two_parts_of_a_cut_hold_token_counts_of_a_small_ratio() -> None:
    """Or a mean of means would look like a token mean (1), or like rows that count twice (2), thrice (3) and so on."""
    for case in cuts():
        for counts in token_counts(case):
            for a, b in itertools.combinations(sorted(counts), 2):
                for ratio in (1, 3 / 2, 2, 3, 4):
                    assert abs(b / a / ratio - 1) > 0.04, (case.name, a, b)


def test_examples_have_the_lengths_of_the_probe_and_no_two_begin_alike() -> None:
    examples = make_examples()
    assert len({e.prompt[0] for e in examples}) == len(examples)
    assert [len(e.response) + 1 for e in examples] == list(LENGTHS)
