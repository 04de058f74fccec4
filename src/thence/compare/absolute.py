"""Files that a comparison names, named from the root: its workers run in another folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thence.compare.recipe import ComparisonRecipe


def absolute_data(table: Mapping[str, Any]) -> dict[str, Any]:
    """A data table whose files are named from the root."""
    result = dict(table)
    if (sources := table.get("source")) is not None:
        names = [sources] if isinstance(sources, str) else sources
        result["source"] = [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
    if Path(template := str(table.get("template", ""))).is_file():
        result["template"] = str(Path(template).resolve())
    return result


def absolute_reward(spec: str) -> str:
    """A reward whose file, if it has one, is named from the root."""
    file, colon, function = spec.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and Path(file).is_file() else spec


def absolute_stage(table: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's table whose files are named from the root."""
    own = {**table, "data": absolute_data(table["data"])} if "data" in table else dict(table)
    if "reward" in own:
        own["reward"] = absolute_reward(str(own["reward"]))
    if isinstance(environment := own.get("environment"), Mapping):
        own["environment"] = {**environment, "path": absolute_reward(str(environment.get("path", "")))}
    elif environment is not None:
        own["environment"] = absolute_reward(str(environment))
    if "rewards" in own:
        own["rewards"] = {absolute_reward(spec): weight for spec, weight in own["rewards"].items()}
    if "splits" in own:
        own["splits"] = {name: absolute_data(split) for name, split in own["splits"].items()}
    return own


def with_absolute_paths(recipe: ComparisonRecipe) -> ComparisonRecipe:
    """Workers run elsewhere: files are named from the root."""
    return recipe.model_copy(
        update={
            "data": absolute_data(recipe.data),
            "sft": absolute_stage(recipe.sft),
            "rl": absolute_stage(recipe.rl),
            "eval": absolute_stage(recipe.eval),
            "tuning": recipe.tuning.model_copy(update={"eval": absolute_stage(recipe.tuning.eval)}),
        }
    )
