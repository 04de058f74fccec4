"""Samples of the update matrix, its controls, and the kept figures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import ROOT
from tests.pipeline.update_cells import ALL, CONTROLS, LAYOUTS, METHODS, OTHERS, Cell, cells_of
from tests.pipeline.update_matrix import holds, matrix

KEPT = ROOT / "benchmarks/results"
QUICK = [Cell("sft", True, False, "float64"), Cell("srft", False, True, "float64"), Cell("gspo", True, True, "float32")]
QUICK += [Cell("gift", True, False, "float64"), Cell("asft", False, True, "float64")]
QUICK += [Cell("trapo", False, False, "float64"), Cell("sdft, jsd of top 6", True, False, "float64")]
QUICK += [Cell("sdpo, jsd", False, True, "float64")]
SLOW = [Cell(name, number % 2 == 0, number % 3 == 0, "float64") for number, name in enumerate(METHODS)][1::3]
SLOW += [Cell(name, number % 2 == 0, number % 3 == 0, "float64") for number, name in enumerate(OTHERS) if "," in name]


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


@pytest.mark.everything
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


def test_a_kept_matrix_is_whole_and_holds() -> None:
    for file in KEPT.glob("update-matrix*.json"):
        kept = json.loads(file.read_text())
        found = {(c["ranks"], c["layout"], c["cell"]) for c in kept["cells"]}
        cells = ALL if "methods" in kept else cells_of(METHODS)
        assert found == {(world, layout, str(cell)) for world in LAYOUTS for layout in LAYOUTS[world] for cell in cells}
        assert kept["holds"] and all(map(holds, kept["cells"]))
