"""``thence plan``: the bill of a recipe beforehand."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from thence.accounting.hardware import known_devices, parse_hardware
from thence.cli.app import quiet_libraries
from thence.cli.events import tell
from thence.cli.parsing import none_given
from thence.errors import UserError
from thence.recipe import load_recipe, shipped_recipes
from thence.settings.limits import PartShare, SomeCoefficient, SomeShare


def plan_command(
    recipe: Annotated[str | None, Parameter(completer=lambda _: [*shipped_recipes()])] = None,
    /,
    *,
    hardware: Annotated[
        str | None, Parameter(metavar="NAMExCOUNT", completer=lambda _: [f"{name}x8" for name in known_devices()])
    ] = None,
    utilisation: SomeShare = 0.4,
    sampling_utilisation: SomeShare = 0.5,
    link_utilisation: SomeShare = 0.7,
    no_overlap: bool = False,
    reserve: PartShare = 0.1,
    price: SomeCoefficient | None = None,
    explain: bool = False,
    json_: bool = False,
    overrides: Annotated[dict[str, Any], Parameter(parse=False)],
) -> int:
    """Say what a recipe costs on given hardware, before it runs: tokens, FLOPs, memory, layouts, time, price.

    What does not fit gets the smallest change that makes it fit. Times follow from datasheets and from shares of them
    that are assumed: --explain prints the arithmetic. Nothing is trained, and the hardware need not be here. Any field
    of a recipe is a flag; `thence run --fields` lists them. Exit code 1: the recipe does not fit as it is, or its
    model cannot be counted.

    Examples:

      thence plan paper-qwen --hardware h100x8
      thence plan paper-qwen --hardware h100x16 --price 2.5 --rl.rollout-rows 8
      thence plan mine.toml --hardware my-cluster.toml --explain

    Args:
        recipe: A shipped recipe (`thence recipes`) or a TOML file.
        hardware: h100x8: 8 devices. h100x16: 2 nodes of 8. h100x4x2: 2 nodes of 4. Or a TOML file of your own.
        utilisation: Share of the device's peak that training reaches, by executed FLOPs.
        sampling_utilisation: Share of the memory's bandwidth that sampling and the optimizer reach.
        link_utilisation: Share of a link's speed that messages between ranks reach.
        no_overlap: Count messages between ranks as if nothing were computed meanwhile.
        reserve: Share of a device's memory that is left for libraries and fragmentation.
        price: Price of a device for an hour, in any currency.
        explain: Print the arithmetic behind every figure.
        json_: Print the plan as one JSON object.
    """
    if recipe is None:
        raise none_given("plan", "recipe")
    if hardware is None:
        raise UserError("no hardware is given", remedy="give it, for example --hardware h100x8", field="--hardware")
    asked = parse_hardware(hardware, price)
    loaded = load_recipe(recipe, overrides)
    from thence.accounting.bill import bill_values, make_bill
    from thence.accounting.choices import Planning
    from thence.accounting.estimate import Rates
    from thence.pages.bill import bill_view
    from thence.pipeline.planning import (
        check_heads,
        check_shape,
        facts_of,
        measured_lengths,
        plan_for,
        refusal,
        with_own_memory,
    )
    from thence.pipeline.prompts import RenderedPrompts
    from thence.terminal import make_console

    asked = with_own_memory(asked)
    quiet_libraries()
    check_shape(loaded, asked.ranks)
    facts, unread = facts_of(loaded), ""
    try:
        facts |= measured_lengths(loaded, RenderedPrompts())
    except UserError as error:
        unread = str(error).splitlines()[0]
    rates = Rates(utilisation, sampling_utilisation, link_utilisation, not no_overlap)
    planning = Planning(lambda each, place: plan_for(each, place, facts), refusal, rates, reserve)
    bill = make_bill(loaded, asked, planning)
    check_heads(loaded, bill.given.plan)
    if json_:
        tell("plan", **bill_values(bill), unread=unread or None)
    else:
        make_console().print(bill_view(bill, explain, unread))
    return 0 if bill.given.fits else 1
