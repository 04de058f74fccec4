"""The cut of a batch, what faults need of it, and faults by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thence.audit.judge.findings import CATALOGUE
from thence.errors import UserError
from thence.faults.catalogue import FAULTS, Needs, combine
from thence.faults.cut import Cut, cut_rows


@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 4), st.integers(1, 4))
def test_a_cut_holds_every_row_once_in_micro_batches_of_the_given_size(n, micro_batch, accumulation, ranks):
    cut = cut_rows(n, micro_batch, accumulation, ranks)
    assert sorted(i for cell in cut.micro_batches for i in cell) == list(range(n))
    sizes = [len(cell) for cell in cut.micro_batches]
    assert all(size == micro_batch for size in sizes if size != n % micro_batch)
    assert sum(size != micro_batch for size in sizes) <= 1
    assert cut.ranks == ranks
    assert {len(slots) for slots in cut.cells} <= {cut.slots, max(cut.slots - 1, 0)}


def test_micro_batches_are_dealt_to_the_ranks_in_turn():
    assert cut_rows(7, 2, 2, 2) == Cut((((0, 1), (4, 5)), ((2, 3), (6,))), 2)


def test_needs_say_what_a_cut_lacks():
    assert FAULTS["first-and-last-only"].needs.unmet(cut_rows(4, 2, 2)) == ["3 micro-batches a rank"]
    assert FAULTS["rank-means"].needs.unmet(cut_rows(6, 2, 3)) == ["2 ranks with rows"]
    assert FAULTS["no-step"].needs.unmet(cut_rows(6, 2, 3)) == ["fewer micro-batches than planned"]
    assert FAULTS["no-step"].needs.unmet(cut_rows(4, 2, 3)) == []
    assert FAULTS["shard-clipped"].needs.unmet(cut_rows(4, 2, 1, 2)) == ["a norm to clip at"]
    assert FAULTS["shard-clipped"].needs.unmet(cut_rows(4, 2, 1, 2), clip_norm=1.0) == []
    assert Needs(micro_batch=2, short=True).unmet(cut_rows(2, 1, 2)) == [
        "2 rows in a micro-batch", "micro-batches of unequal numbers of rows",
    ]  # fmt: skip


def test_every_fault_names_findings_that_exist():
    for fault in FAULTS.values():
        assert fault.finds and {*fault.finds, *fault.also} <= set(CATALOGUE)
        assert (fault.change is None) != (fault.wrap is None)
        assert fault.title and fault.source


def test_an_unknown_fault_is_refused_by_name():
    with pytest.raises(UserError, match="mean-of-means"):
        combine(["mean-of-mean"])
