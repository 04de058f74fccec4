"""What a comparison's contrasts can decide, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from thence.compare.power import MOST_BLOCKS, Foreseen
from thence.compare.recipe import ComparisonRecipe
from thence.pages.comparison.decided import PER
from thence.pages.table import Cell, Table, TableRow


def power_table(recipe: ComparisonRecipe, found: Sequence[Foreseen]) -> Table:
    """One row a contrast, with what the columns mean in the notes."""
    target = recipe.power.target if recipe.power else 0.9
    slopes = {contrast.name for contrast in recipe.contrasts if contrast.kind == "slope"}
    rows = [
        TableRow(
            each.name,
            (
                Cell(str(each.blocks)),
                Cell(f"{100 * each.sd:.1f}", each.origin),
                Cell(_effect(each, each.name in slopes)),
                Cell(share_text(each.power)),
                Cell("–" if each.equal_at_zero is None else share_text(each.equal_at_zero)),
                Cell(f"over {MOST_BLOCKS}" if each.blocks_needed is None else str(each.blocks_needed)),
            ),
            "Primary" if each.primary else "Exploratory",
        )
        for each in found
    ]
    headers = ("", "blocks", "spread", "effect", "power", "equal if 0", "needed")
    notes = [
        "Blocks: planned for the contrast. Spread: standard deviation of a block's difference as it will be measured, "
        "in points. Effect: true difference in points; of a slope, in points per 10 points of the covariate. Power: "
        "chance to find it; where equality is expected, to find that it is beyond the bound. Equal if 0: chance of "
        'the verdict "equal" where there is no difference. Needed: blocks of the whole comparison for a chance of '
        f'{target:.0%} to find the effect, or to decide "equal" where that is expected.',
        "Primary contrasts are tested at 5% divided by their number, Holm's hardest step; exploratory ones at 5%, "
        "before the correction for their number. Simulated with normal differences.",
    ]
    return Table("", headers, tuple(rows), (*notes, *(note for each in found for note in each.notes)))


def _effect(each: Foreseen, is_slope: bool) -> str:
    return f"{100 * (PER if is_slope else 1) * each.effect:.3g}"


def share_text(share: float) -> str:
    """A chance in per cent; one that was never or always seen says that it is not certain."""
    return "< 1%" if share < 0.005 else "> 99%" if share > 0.995 else f"{share:.0%}"
