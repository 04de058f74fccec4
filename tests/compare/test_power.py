"""Power by simulation: known answers, what it takes from a pilot, and what it cannot do without."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import nct, norm, t

from tests.compare.blocks import contrast, make_blocks
from tests.compare.small import tables
from thence.compare.power import Foreseen, foresee
from thence.compare.recipe import ComparisonRecipe, load_comparison
from thence.compare.result import results_json
from thence.errors import RecipeError
from thence.toml import to_toml

ARMS = {"sft": lambda s: 0.5, "broken": lambda s: 0.4, "same": lambda s: 0.2 + 0.8 * s}


def planned(folder: Path, *contrasts: dict[str, Any], blocks: int = 24, **changes: Any) -> ComparisonRecipe:
    """A plan for that many blocks of 100 problems, two samples each."""
    made = tables(folder)
    splits = {name: {"split": "test", "limit": 100} for name in ("test", "dev", "skill")}
    made |= {"seeds": list(range(blocks)), "contrasts": list(contrasts), "eval": {**made["eval"], "splits": splits}}
    made |= {"covariate": {"arm": "base", "column": "skill"}, "tuning": {"seeds": [1000]}}
    return load_comparison({**made, **changes})


def only(recipe: ComparisonRecipe) -> Foreseen:
    [found] = foresee(recipe)
    return found


def test_power_is_that_of_students_t_where_differences_are_normal(tmp_path: Path) -> None:
    power = {"pilot": {"sd": 0.08}, "effect": 0.06}
    found = only(planned(tmp_path, contrast("c", "sft", "broken", equal_within=0.06), power=power))
    sd = math.hypot(0.08, math.sqrt(0.5 / 200))
    assert (found.blocks, found.problems, found.samples, found.origin) == (24, 100, 2, "assumed")
    assert found.sd == pytest.approx(sd) and found.sd_luck == pytest.approx(math.sqrt(0.5 / 200))
    limit, shift = t.ppf(0.975, 23), 0.06 * math.sqrt(24) / sd
    assert found.power == pytest.approx(nct.sf(limit, 23, shift), abs=0.03)
    inside = 0.06 / (sd / math.sqrt(24)) - t.ppf(0.95, 23)
    assert found.equal_at_zero == pytest.approx(2 * norm.cdf(inside) - 1, abs=0.06)


def test_the_blocks_that_it_asks_for_give_the_power_and_fewer_do_not(tmp_path: Path) -> None:
    power = {"pilot": {"sd": 0.08}, "effect": 0.05, "target": 0.8}
    asked = contrast("c", "sft", "broken")
    needed = only(planned(tmp_path, asked, power=power)).blocks_needed
    assert needed is not None and 20 < needed < 60
    assert only(planned(tmp_path / "more", asked, blocks=needed, power=power)).power >= 0.8
    assert only(planned(tmp_path / "less", asked, blocks=needed - 8, power=power)).power < 0.8


def test_several_primary_contrasts_share_the_error_and_halves_need_twice_the_blocks(tmp_path: Path) -> None:
    first = contrast("a", "sft", "broken", effect=0.2)
    half = contrast("b", "sft", "broken", blocks="upper half", effect=0.2)
    apart = contrast("c", "sft", "broken", primary=False, effect=0.2)
    found = foresee(planned(tmp_path, apart, first, half, power={"pilot": {"sd": 0.1}}))
    assert [each.name for each in found] == ["a", "b", "c"]
    assert [each.level for each in found] == [0.025, 0.025, 0.05]
    assert [each.blocks for each in found] == [24, 12, 24]
    assert found[1].blocks_needed == 2 * (found[0].blocks_needed or 0)


def test_two_blocks_can_never_decide_and_a_hopeless_contrast_says_so(tmp_path: Path) -> None:
    power = {"pilot": {"sd": 0.001}, "effect": 0.9, "problems": 10}
    assert only(planned(tmp_path, contrast("c", "sft", "broken"), blocks=2, power=power)).power == 0
    power = {"pilot": {"sd": 1.0}, "effect": 0.01}
    assert only(planned(tmp_path / "b", contrast("c", "sft", "broken"), power=power)).blocks_needed is None


def kept(folder: Path, **changes: Any) -> str:
    """The results of a pilot, as a file."""
    pilot = make_blocks(ARMS, blocks=60, problems=200, spread=0.05, **changes)
    file = folder / "pilot.json"
    file.write_text(results_json(pilot))
    return str(file)


def test_the_spread_between_blocks_is_the_pilots_without_its_luck_and_with_the_plans(tmp_path: Path) -> None:
    found = only(planned(tmp_path, contrast("c", "sft", "broken"), power={"pilot": kept(tmp_path)}))
    luck = math.sqrt((0.25 + 0.24) / 200)
    assert found.sd_luck == pytest.approx(luck, rel=0.05)
    assert found.sd == pytest.approx(math.hypot(0.05 * math.sqrt(2), luck), rel=0.2)
    assert found.origin == "pilot, 60 blocks"


def test_what_a_line_explains_is_no_spread_of_an_adjusted_contrast_or_a_slope(tmp_path: Path) -> None:
    plain, adjusted, slope = (
        contrast("a", "same", "broken"),
        contrast("b", "same", "broken", adjust="linear"),
        contrast("c", "same", "broken", kind="slope"),
    )
    power = {"pilot": kept(tmp_path), "effect": 0.08}
    a, b, c = foresee(planned(tmp_path, plain, adjusted, slope, power=power))
    assert a.sd > 1.3 * b.sd and b.sd == c.sd
    assert b.power > a.power
    assert c.effect == pytest.approx(0.08 / 0.55, rel=0.1)  # over the pilot's range of skill


def test_a_slope_is_found_as_often_as_least_squares_with_a_robust_error_would(tmp_path: Path) -> None:
    power = {"pilot": {"sd": 0.08}, "effect": 0.2, "span": [0.0, 0.5]}
    found = only(planned(tmp_path, contrast("c", "sft", "broken", kind="slope"), power=power))
    z = np.linspace(0, 0.5, 24)
    centred = z - z.mean()
    leverage = 1 / 24 + centred**2 / (centred @ centred)
    se = found.sd * math.sqrt((centred**2 / (1 - leverage)).sum()) / (centred @ centred)  # HC3, as is expected of it
    assert found.effect == pytest.approx(0.4)
    assert found.power == pytest.approx(nct.sf(t.ppf(0.975, 22), 22, 0.4 / se), abs=0.03)


def test_a_pilot_may_call_arms_and_test_sets_differently(tmp_path: Path) -> None:
    asked = contrast("c", "sft", ["broken", "same"], choose_on="dev", column="test@0.6", effect=0.3)
    recipe = planned(tmp_path, asked, power={"pilot": kept(tmp_path), "names": {"sft": "same", "same": "sft"}})
    assert only(recipe).origin == "pilot, 60 blocks" and not only(recipe).notes
    recipe = planned(tmp_path, asked, power={"pilot": kept(tmp_path), "names": {"dev": "other"}})
    assert "no 'dev'" in only(recipe).notes[0]


@pytest.mark.parametrize(
    ("asked", "power", "field", "remedy"),
    [
        ({}, None, "power.pilot", "pilot = { sd = 0.1 }"),
        ({}, {"pilot": "none.json"}, "power.pilot", "an earlier comparison"),
        ({"kind": "slope"}, {"pilot": {"sd": 0.1}}, "power.span", "[0.0, 0.6]"),
        ({}, {"pilot": "pilot", "names": {"sft": "sfft"}}, "contrasts.c", "power.names"),
        ({"column": "dev"}, {"pilot": "pilot", "names": {"dev": "dve"}}, "contrasts.c", "power.names"),
    ],
)
def test_what_is_not_known_is_asked_for(tmp_path: Path, asked: dict, power: Any, field: str, remedy: str) -> None:
    if power and power["pilot"] == "pilot":
        power = {**power, "pilot": kept(tmp_path)}
    recipe = planned(tmp_path, contrast("c", "sft", "broken", **asked), **({"power": power} if power else {}))
    with pytest.raises(RecipeError) as refused:
        foresee(recipe)
    assert refused.value.field == field and remedy in (refused.value.remedy or "")


def test_without_contrasts_there_is_nothing_to_foresee(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to decide"):
        foresee(planned(tmp_path))


def test_an_own_assumption_goes_before_the_pilot(tmp_path: Path) -> None:
    asked = contrast("c", "sft", "broken", sd=0.3, effect=0.5)
    found = only(planned(tmp_path, asked, power={"pilot": kept(tmp_path)}))
    assert found.origin == "assumed" and found.sd > 0.3


def test_problems_that_no_limit_tells_are_those_of_the_pilot_or_asked_for(tmp_path: Path) -> None:
    whole = {"max_tokens": 8, "samples": 2, "splits": {"test": {}, "dev": {}, "skill": {}}}
    asked = contrast("c", "sft", "broken", effect=0.3)
    assert only(planned(tmp_path, asked, power={"pilot": kept(tmp_path)}, eval=whole)).problems == 200
    with pytest.raises(RecipeError, match="how many problems"):
        foresee(planned(tmp_path / "b", asked, power={"pilot": {"sd": 0.1}}, eval=whole))
    given = {"pilot": {"sd": 0.1}, "problems": 50}
    assert only(planned(tmp_path / "c", asked, power=given, eval=whole)).problems == 50


def test_the_command_prints_a_table_of_80_columns_and_json_without_torch(tmp_path: Path) -> None:
    made = tables(tmp_path) | {"contrasts": [contrast("correct", "sft", "broken", equal_within=0.05)]}
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(made | {"seeds": list(range(30)), "power": {"pilot": {"sd": 0.05}}}))
    code = "import sys; from thence.cli import main; code = main(sys.argv[1:]); "
    code += "sys.exit(9 if 'torch' in sys.modules else code)"

    def said(*flags: str) -> str:
        command = [sys.executable, "-c", code, "compare", str(file), "--power", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = said()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "correct" in text and "needed" in text and "chance of 90%" in " ".join(text.split())
    event = json.loads(said("--json"))
    assert event["event"] == "power" and event["contrasts"][0]["name"] == "correct"
    assert 0 < event["contrasts"][0]["power"] < 1 and event["contrasts"][0]["blocks"] == 30
    assert not (tmp_path / "comparison").exists()
