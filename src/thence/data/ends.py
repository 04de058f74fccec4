"""Which tokens end a response: in training, in sampling and in a published model, for all of them alike."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from thence.data.template import ChatFormat, chat_format, is_marked, token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, template: str | ChatFormat = "own", model: Any = None
) -> tuple[int, ...]:
    """All tokens that stop sampling, each once: the trained end-of-turn token first, then the tokenizer's eos, then
    those that the model names.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: see `chat_format`; pass its result where template variables are set.
        model: what has a `generation_config` and a `config`: a model of transformers; None: no model is at hand.

    Raises:
        UserError: as `chat_format`.
    """
    chat = template if isinstance(template, ChatFormat) else chat_format(tokenizer, template)
    eos = token_id(tokenizer.eos_token_id)
    found = [chat.end_id, *([] if eos is None else [eos]), *_named_by(model, tokenizer)]
    return tuple(dict.fromkeys(found))


def _named_by(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens of generation_config.json and of config.json that the tokenizer can make.

    A generation config of the model's own is taken at its word. One that transformers made from config.json, and
    config.json itself, may hold the default of the architecture (Llama: 2), which in another tokenizer is an ordinary
    token; there only special and added tokens count. The unknown token ends nothing.
    """
    if model is None:  # asked for every row of a data set
        return []
    generation, config = getattr(model, "generation_config", None), getattr(model, "config", None)
    stated = [] if getattr(generation, "_from_model_config", False) else ids_in(generation)
    implied = [*ids_in(generation), *ids_in(config), *ids_in(getattr(config, "text_config", None))]
    known = len(tokenizer)
    if outside := sorted({token for token in stated if not 0 <= token < known}):
        log.warning(
            "the generation config names end tokens outside of the tokenizer's %d: %s; not used", known, outside
        )
    unknown = token_id(tokenizer.unk_token_id)
    usable = [token for token in (*stated, *implied) if 0 <= token < known and token != unknown]
    return [token for token in usable if token in stated or is_marked(tokenizer, token)]


def ids_in(config: Any) -> list[int]:
    """The end tokens in a configuration: one, a list of them, or none."""
    value = getattr(config, "eos_token_id", None)
    values = value if isinstance(value, Iterable) else [value]
    return [token for token in map(token_id, values) if token is not None]
