"""Samples of the update matrix, its controls, and the kept figures: docs/scale.md quotes those and no others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.pipeline.update_cells import ALL, COMPARED, CONTROLS, LAYOUTS, METHODS, Cell
from tests.pipeline.update_matrix import holds, matrix

KEPT = ROOT / "benchmarks/results/update-matrix.json"
QUICK = [Cell("sft", True, False, "float64"), Cell("srft", False, True, "float64"), Cell("gspo", True, True, "float32")]
SLOW = [Cell(name, number % 2 == 0, number % 3 == 0, "float64") for number, name in enumerate(METHODS)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return matrix(QUICK, {2: LAYOUTS[2]}, tmp_path_factory.mktemp("two"))[2]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return matrix(SLOW, {4: LAYOUTS[4]}, tmp_path_factory.mktemp("four"))[4]


@pytest.mark.parametrize("cell", QUICK, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_two_ranks_make_the_update_of_one_process(layout: str, cell: Cell, two: dict[str, Any]) -> None:
    figures = two["cells"][str(cell)][layout]
    assert holds({"cell": str(cell), **figures}), figures


@pytest.mark.slow
@pytest.mark.parametrize("cell", SLOW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[4])
def test_four_ranks_make_the_update_of_one_process(layout: str, cell: Cell, four: dict[str, Any]) -> None:
    figures = four["cells"][str(cell)][layout]
    assert holds({"cell": str(cell), **figures}), figures


def test_a_sharded_step_that_is_broken_on_purpose_is_seen(two: dict[str, Any]) -> None:
    """AdamW and clipping hide a gradient divided by the ranks from the weights; its norm shows it."""
    assert two["controls"].keys() == CONTROLS.keys()
    for layout, figures in two["controls"]["gradients averaged over ranks"].items():
        assert figures["norm"] == pytest.approx(0.5), layout
        assert figures["update"] < 1e-12
    assert two["controls"]["norm clipped per shard"]["fsdp2"]["gradient"] > 0.01


@pytest.mark.skipif(not KEPT.exists(), reason="nobody has run the whole matrix yet")
def test_the_kept_matrix_is_whole_and_holds() -> None:
    kept = json.loads(KEPT.read_text())
    found = {(c["ranks"], c["layout"], c["cell"]) for c in kept["cells"]}
    assert found == {(world, layout, str(cell)) for world in LAYOUTS for layout in LAYOUTS[world] for cell in ALL}
    assert kept["holds"] and all(map(holds, kept["cells"]))
    for what in COMPARED:
        for dtype, figures in kept["worst"].items():
            assert figures[what] == max(c[what] for c in kept["cells"] if c["cell"].endswith(dtype))
    assert_quoted(kept["worst"], ROOT / "docs/scale.md")


def assert_quoted(worst: dict[str, Any], page: Path) -> None:
    """The page has these figures, rounded up to one digit."""
    text = page.read_text()
    for figures in worst.values():
        for value in figures.values():
            assert rounded_up(value) in text, value


def rounded_up(value: float) -> str:
    """As 3e-13: one digit, never less than the figure."""
    power = math.floor(math.log10(value))
    digit = math.ceil(value / 10**power)
    return f"1e{power + 1}" if digit == 10 else f"{digit}e{power}"
