"""What the tables [covariate] and [[contrasts]] may say, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compare.small import tables
from thence.compare.contrasts import find_column
from thence.compare.recipe import load_comparison
from thence.compare.result import Column
from thence.errors import RecipeError
from thence.toml import to_toml

SPLITS = {"test": {"split": "test", "limit": 5}, "dev": {"split": "dev", "limit": 5}, "skill": {"limit": 5}}
COVARIATE = {"arm": "base", "column": "skill"}
GOOD = {"name": "c", "arm": "sft", "other": "broken", "expect": "higher"}


def with_contrasts(folder: Path, *contrasts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The small comparison with three test sets and these contrasts."""
    made = tables(folder)
    made["eval"] = {**made["eval"], "splits": SPLITS}
    return {**made, "covariate": COVARIATE, "contrasts": list(contrasts), **changes}


def test_contrasts_are_read_with_their_defaults(tmp_path: Path) -> None:
    best = {**GOOD, "name": "d", "other": ["broken", "same"], "choose_on": "dev", "kind": "slope", "primary": True}
    recipe = load_comparison(with_contrasts(tmp_path, GOOD, best, power={"pilot": {"sd": 0.1}}))
    first, second = recipe.contrasts
    assert (first.kind, first.blocks, first.primary, first.others) == ("difference", "all", False, ["broken"])
    assert second.others == ["broken", "same"] and second.primary
    assert recipe.blocks() == [("small", 0), ("small", 1)]
    assert recipe.columns() == tuple(Column(name, 0.6) for name in SPLITS)


def test_a_file_may_hold_them(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(to_toml(with_contrasts(tmp_path, GOOD, power={"pilot": "results.json", "effect": 0.1})))
    recipe = load_comparison(file)
    assert recipe.power is not None and recipe.power.pilot == "results.json" and recipe.contrasts[0].name == "c"


@pytest.mark.parametrize(
    ("change", "field", "remedy"),
    [
        ({"arm": "sfft"}, "contrasts.c.arm", "arms are: base, sft"),
        ({"other": "sfft"}, "contrasts.c.other", "arms are"),
        ({"other": "sft"}, "contrasts.c.other", "another arm"),
        ({"other": []}, "contrasts.c.other", "name one arm"),
        ({"other": ["broken", "broken"], "choose_on": "dev"}, "contrasts.c.other", "that differ"),
        ({"other": ["broken", "same"]}, "contrasts.c.choose_on", "no contrast reports"),
        ({"other": ["broken", "same"], "choose_on": "test"}, "contrasts.c.choose_on", "no contrast reports"),
        ({"choose_on": "dev"}, "contrasts.c.choose_on", "several arms"),
        ({"column": "tset"}, "contrasts.c.column", "columns are: test@0.6, dev@0.6, skill@0.6"),
        ({"other": ["broken", "same"], "choose_on": "dve"}, "contrasts.c.choose_on", "columns are"),
        ({"expect": "equal"}, "contrasts.c.equal_within", "for example 0.02"),
        ({"adjust": "linear"}, "contrasts.c.adjust", "at least 4"),
        ({"adjust": "linear", "kind": "slope"}, "contrasts.c.adjust", "leave adjust out"),
        ({"expect": "more"}, "contrasts.1.expect", "higher"),
        ({"equal_within": 0.0}, "contrasts.1.equal_within", "above 0"),
        ({"blocks": "upper"}, "contrasts.1.blocks", "upper half"),
    ],
)
def test_a_contrast_that_cannot_be_tested_is_refused_with_field_and_remedy(
    tmp_path: Path, change: dict, field: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        load_comparison(with_contrasts(tmp_path, {**GOOD, **change}))
    assert refused.value.field == field and remedy in (refused.value.remedy or "")


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"covariate": {"arm": "bas"}}, "covariate.arm", "arms are"),
        ({"covariate": {"arm": "base", "column": "tset"}}, "covariate.column", "columns are"),
        ({"contrasts": [GOOD, GOOD]}, "contrasts.c.name", "its own name"),
        ({"seeds": [0]}, "contrasts", "--power"),
        ({"covariate": None, "contrasts": [{**GOOD, "kind": "slope"}]}, "contrasts.c.kind", "[covariate]"),
        ({"covariate": None, "contrasts": [{**GOOD, "blocks": "upper half"}]}, "contrasts.c.blocks", "[covariate]"),
        ({"covariate": None, "sections": [{"kind": "against-covariate"}]}, "sections.0", "[covariate]"),
        ({"contrasts": [], "sections": [{"kind": "contrasts"}]}, "sections.0", "[[contrasts]]"),
        ({"sections": [{"kind": "against-covariate", "to": "sfft"}]}, "sections.0", "did you mean"),
        ({"power": {"span": [0.5]}}, "power.span", "[0.9"),
        ({"power": {"pilot": {"sd": -1.0}}}, "power.pilot.sd", "above 0"),
    ],
)
def test_tables_that_make_no_sense_are_refused_with_field_and_remedy(
    tmp_path: Path, changes: dict, field: str, remedy: str
) -> None:
    made = {key: value for key, value in {**with_contrasts(tmp_path, GOOD), **changes}.items() if value is not None}
    with pytest.raises(RecipeError) as refused:
        load_comparison(made)
    assert refused.value.field == field and remedy in (refused.value.remedy or "")


def test_a_column_is_found_by_split_and_temperature() -> None:
    columns = [Column("test", 0.6), Column("test", 1.0), Column("ood", 1.0)]
    assert find_column("", columns) == columns[0] == find_column("test", columns)
    assert find_column("test@1", columns) == columns[1] and find_column("test@2", columns) is None


def test_the_best_arm_is_not_chosen_on_the_reported_problems_at_another_temperature(tmp_path: Path) -> None:
    best = {**GOOD, "other": ["broken", "same"], "column": "test@0.6", "choose_on": "test@1"}
    made = with_contrasts(tmp_path, best)
    made["eval"]["temperatures"] = [0.6, 1.0]
    with pytest.raises(RecipeError, match="which a contrast reports"):
        load_comparison(made)


def test_the_headline_is_named_where_a_contrast_names_no_column(tmp_path: Path) -> None:
    recipe = load_comparison({**with_contrasts(tmp_path, GOOD), "covariate": {"arm": "base"}})
    assert recipe.contrasts[0].column == "test" and recipe.covariate is not None and recipe.covariate.column == "test"
