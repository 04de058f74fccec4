"""The configuration of a recipe's model, read without its weights."""

from __future__ import annotations

from typing import Any

from thence import recipe as recipes
from thence.errors import RecipeError, UserError, first_line
from thence.explain import is_of_system
from thence.models.lengths import context_of
from thence.train.model import _options, _overridden
from thence.train.model_files import check_files, resolve
from thence.train.random_start import made_config

__all__ = ["context_of", "open_config"]


def open_config(settings: recipes.Model) -> Any:
    """The configuration of a recipe's model, with the recipe's overrides. Raises RecipeError."""
    from transformers import AutoConfig

    try:
        if settings.init is not None:
            return made_config(settings.init)
        check_files(settings)
        config = AutoConfig.from_pretrained(resolve(settings.path or ""), **_options(settings))
    except Exception as error:  # a model's code and files may raise anything
        if isinstance(error, UserError) or is_of_system(error):
            raise
        raise RecipeError(
            f"cannot open {settings.path or settings.init}: {first_line(error)}",
            remedy="give a Hugging Face folder with config.json, weights and tokenizer, or a reachable hub name",
            field="model.path",
        ) from error
    return _overridden(config, settings.config_overrides)
