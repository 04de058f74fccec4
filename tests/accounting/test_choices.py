"""The layouts that fit, and the smallest change that makes a recipe fit: each checked again, from its flags."""

from __future__ import annotations

from typing import Any

import pytest

from thence.accounting.bill import bill_values, make_bill
from thence.accounting.choices import LayoutEstimate, Planning, as_flags, changed, different, estimated, layouts
from thence.accounting.estimate import Rates
from thence.accounting.hardware import Hardware, parse_hardware
from thence.accounting.remedies import remedies
from thence.cli.fields import take_fields
from thence.pipeline.planning import plan_for, refusal
from thence.recipe import Recipe, load_recipe

FACTS: dict[str, Any] = {"passes": {"rl": 1.0}}
PLANNING = Planning(lambda recipe, hardware: plan_for(recipe, hardware, FACTS), refusal, Rates(), 0.1)


def again(found: LayoutEstimate, recipe: Recipe) -> LayoutEstimate:
    """The same from the flags that a reader is shown, validated like every recipe."""
    rest, overrides = take_fields(as_flags(found.changes, recipe).split())
    assert not rest
    told = load_recipe(recipe.resolved(), overrides)
    assert not refusal(told, found.hardware)
    return estimated(told, found.hardware, PLANNING, {})


CASES = [
    ("paper-qwen", "h100x8", {"stages": ["sft", "rl"]}),
    ("paper-qwen", "l40sx8", {"stages": ["sft"]}),
    ("paper-llama", "h100x1", {"stages": ["sft"]}),
    pytest.param("paper-qwen", "gh200x16", {}, marks=pytest.mark.slow),
    pytest.param("paper-llama", "a100-80gx16", {"stages": ["rl"]}, marks=pytest.mark.slow),
    pytest.param("paper-qwen", "rtx4090x2", {"stages": ["sft"]}, marks=pytest.mark.slow),
    pytest.param("paper-qwen", "h100x8", {"stages": ["sft"], "parallel": "ddp"}, marks=pytest.mark.slow),
    pytest.param("paper-qwen", "h100x8", {"stages": ["sft"], "model.lora.rank": 8}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("origin", "hardware", "changes"), CASES)
def test_every_layout_and_every_change_that_is_offered_fits_and_would_be_taken(
    origin: str, hardware: str, changes: dict[str, Any]
) -> None:
    recipe, devices = load_recipe(origin, changes), parse_hardware(hardware)
    given = estimated(recipe, devices, PLANNING, {})
    ways = layouts(recipe, devices, PLANNING)
    assert len({as_flags(way.changes, recipe) for way in ways}) == len(ways)
    for way in ways:
        told = again(way, recipe)
        assert told.fits and told.peak == way.peak and told.seconds == way.seconds
    if not given.fits:
        small = remedies(recipe, devices, PLANNING)
        assert small, "something helps in all of these cases"
        assert len({len(each.moves) for each in small}) == 1, "all with the fewest changes"
        prices = [max(move.price for move in each.moves) for each in small]
        assert prices == sorted(prices), "those that keep the result come first"
        for each in small:
            told = again(each.estimate, recipe)
            assert told.fits and told.peak == each.estimate.peak


def test_no_smaller_change_would_do() -> None:
    recipe, devices = load_recipe("paper-qwen", {"stages": ["sft", "rl"]}), parse_hardware("h100x8")
    (first, *_) = remedies(recipe, devices, PLANNING)
    assert different(first.estimate.changes, recipe) == {"rl.rollout_rows": 1}
    more = estimated(recipe, devices, PLANNING, {"rl.rollout_rows": 2})
    assert not more.fits and [stage.name for stage in more.too_large] == ["rl"]


def test_what_fits_needs_no_change_and_what_nothing_helps_is_said_so() -> None:
    small = load_recipe("base-rich")
    assert make_bill(small, parse_hardware("h100x1"), PLANNING).remedies == ()
    large = load_recipe("paper-llama", {"stages": ["rl"], "model.path": "meta-llama/Llama-3.1-70B"})
    bill = make_bill(large, parse_hardware("h100x16"), PLANNING)
    assert not bill.given.fits and bill.remedies == () and bill.layouts == ()
    values = bill_values(bill)
    assert values["as_given"]["fits"] is False and values["remedies"] == values["layouts"] == []


def test_weights_in_4_bits_are_never_cut_and_rows_are_shared_only_if_they_are_packed() -> None:
    four = load_recipe("paper-qwen", {"stages": ["sft"], "model.lora.rank": 8, "model.lora.quantize": "nf4"})
    found = layouts(four, parse_hardware("h100x4"), PLANNING)
    assert {way.plan.layout for way in found} == {"ddp"} and {way.plan.held.context for way in found} == {1}
    padded = load_recipe("paper-qwen", {"stages": ["sft"], "sft.packing": False})
    assert {way.plan.held.context for way in layouts(padded, parse_hardware("h100x8"), PLANNING)} == {1}
    packed = load_recipe("paper-qwen", {"stages": ["sft"]})  # 28 heads, 4 for keys and values: 8 cannot share them
    assert {way.plan.held.context for way in layouts(packed, parse_hardware("h100x8"), PLANNING)} == {1, 2, 4}


def test_a_model_that_cannot_be_counted_has_no_layouts_and_is_not_said_to_fit() -> None:
    unknown = load_recipe({"model": {"path": "nobody/nothing"}, "stages": ["sft"], "sft": {"steps": 3}})
    bill = make_bill(unknown, parse_hardware("h100x8"), PLANNING)
    values = bill_values(bill)
    assert not bill.known and not bill.given.fits and bill.layouts == bill.remedies == ()
    assert values["parameters"] is None and values["as_given"]["fits"] is None and values["as_given"]["peak"] is None


def test_the_price_is_that_of_all_devices() -> None:
    devices = parse_hardware("h100x8", price=2.0)
    found = estimated(load_recipe("paper-qwen", {"stages": ["sft"]}), devices, PLANNING, {})
    assert found.seconds is not None and found.price is not None
    assert found.price[0] == pytest.approx(found.seconds[0] / 3600 * 8 * 2.0)


def test_a_changed_recipe_is_the_one_that_is_loaded_with_the_same_fields() -> None:
    recipe = load_recipe("paper-qwen")
    changes = {"parallel": "hsdp", "sharding.replicas": 2, "rl.rollout_rows": 3, "model.lora.rank": 4}
    assert changed(recipe, changes).same_as(load_recipe(recipe.resolved(), changes))
    own = {"parallel": "auto", "rl.rollout_rows": recipe.tables["rl"].rollout_rows}
    assert as_flags(own, recipe) == "", "what the recipe says already"


def test_devices_are_added_in_whole_nodes() -> None:
    found: Hardware = parse_hardware("h100x2").with_devices(16)
    assert found.ranks == 16
    assert parse_hardware("h100x8").with_devices(64).nodes == 8
