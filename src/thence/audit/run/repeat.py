"""Is a step that nobody can explain a random one? It is taken again from the same parameters with the same rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

APART = 1e-3
"""Two runs of a step that differ by a larger share of the update are not the same step."""
Parameters = Mapping[str, Tensor]


def random_step(
    reason: str,
    run: Callable[[nn.Module], None],
    model: nn.Module,
    trained: nn.Module,
    states: tuple[Parameters, Parameters],
) -> str:
    """Why a step of one's own was not judged, with what a second run of it says.

    Args:
        reason: that the judge gave.
        run: the step on a model, in place.
        model: before the step; it is copied.
        trained: the model that was trained, as the step left it.
        states: parameters before and after the step, by name.
    """
    again = copy.deepcopy(model)
    try:
        run(again)
    except Exception as error:  # the user's own code may raise anything
        return f"{reason}. A second run of the step raised {type(error).__name__}: {error}"
    other = {name: parameter.detach().cpu() for name, parameter in again.named_parameters()}
    return with_cause(reason, apart(*states, other), dropout_of(trained))


def apart(before: Parameters, first: Parameters, second: Parameters) -> float:
    """How far two runs of a step lie apart, as a share of the first one's update."""
    names = [name for name in before if name in first and name in second]
    squares = [
        [float((a[name].double() - b[name].double()).square().sum()) for name in names]
        for a, b in ((first, second), (first, before))
    ]
    difference, update = (float(np.sqrt(np.sum(values))) for values in squares)
    return difference / update if update else float(difference > 0)


def with_cause(reason: str, share: float, dropout: str) -> str:
    """The reason why a step was not judged, with what is known of its randomness in front.

    Args:
        share: how far two runs lie apart.
        dropout: that is on or asked for, in words; empty: none.
    """
    if share > APART:
        cause = (
            f"Dropout: {dropout}. Switch it off"
            if dropout
            else "No dropout was found; something else draws random numbers: tokens or rows left out, noise, an order"
        )
        return (
            f"the step is random: two runs of it from the same parameters with the same rows differ by {share:.0%} of "
            f"the update. {cause}. ({reason})"
        )
    return f"dropout: {dropout}. Switch it off. ({reason})" if dropout else reason


def dropout_of(model: nn.Module) -> str:
    """The dropout that is on in a model as it stands, in words; empty: none."""
    layers = [m for m in model.modules() if type(m).__name__.startswith("Dropout") and m.training and _share(m)]
    said = [f"{len(layers)} layers with p = {_share(layers[0]):g}"] if layers else []
    config = getattr(model, "config", None)
    if model.training and config is not None:
        said += dropout_fields(config.to_dict() if hasattr(config, "to_dict") else vars(config))
    return ", ".join(said)


def dropout_fields(config: Mapping[str, Any]) -> list[str]:
    """The fields of a configuration that ask for dropout, each as ``name = value``."""
    return [
        f"{name} = {value:g}"
        for name, value in config.items()
        if ("drop" in name) and isinstance(value, float | int) and not isinstance(value, bool) and value > 0
    ]


def dropout_of_folder(folder: Path) -> str:
    """The dropout that a model's or an adapter's folder asks for, in words; empty: none."""
    said = []
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).exists():
            said += dropout_fields(json.loads((folder / name).read_text(encoding="utf-8")))
    return ", ".join(said)


def _share(layer: nn.Module) -> float:
    share = getattr(layer, "p", 0.0)
    return float(share) if isinstance(share, float | int) else 0.0
