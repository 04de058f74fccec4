"""The parts of a Hugging Face causal language model: its body and its output layer, taken apart and checked."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thence.errors import UserError, first_line
from thence.models.probing import MOST_ROUNDING, largest_difference, probe_tokens, short_windows, tolerance
from thence.objective import Head, logits_of

PROBE_TOKENS = 13  # a row of the check
# What configurations call a constant that the logits are multiplied by, divided by, or soft-capped at.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def decoder_of(model: Any) -> Any:
    """The model without its output layer; of a model that peft wraps, the wrapped one's, adapters inside."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    candidates = (inner.base_model, inner.get_decoder(), getattr(inner, "model", None))
    return next((part for part in candidates if part is not None and part is not inner), inner)


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of the model's body, outermost lists only: experts and other lists inside of a layer stay whole."""
    return list(_outermost(decoder_of(model)))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if next(layer.parameters(), None) is not None)
        else:
            yield from _outermost(child)


def output_head(model: Any) -> Head:
    """The output layer: weights, bias and what is done to its logits; :func:`check_model` says whether that is all.

    Raises:
        UserError: the layer has an adapter, which its weight alone would pass over.
    """
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    if hasattr(layer, "base_layer"):
        raise UserError(
            f"the output layer of {type(model).__name__} has an adapter, and the loss reads its weight alone",
            remedy="adapt other layers, or train the output layer whole (model.lora.modules_to_save)",
            field="model.lora.targets",
        )
    scale = 1.0
    for field in MULTIPLIERS:
        scale *= float(getattr(config, field, None) or 1.0)
    for field in DIVISORS:
        scale /= float(getattr(config, field, None) or 1.0)
    softcap = next((float(cap) for field in SOFTCAPS if (cap := getattr(config, field, None))), None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def check_model(model: Any) -> None:
    """Make sure, on a few tokens and once for every model, of what every step relies on.

    The logits are the last hidden states through :func:`output_head`; no token changes what stands before it, so that
    rows can be padded on the right without a mask; rows of one batch do not change one another.

    Raises:
        UserError: the model is of another kind.
    """
    if model in _checked:
        return
    name = type(model).__name__
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise UserError(f"{name} has no output layer", remedy="give a causal language model (…ForCausalLM)")
    token_ids = probe_tokens(model, 2 * PROBE_TOKENS).view(2, -1)
    with torch.no_grad(), short_windows(model):
        try:
            alone = torch.cat([_hidden(model, row[None]) for row in token_ids])
            together = _hidden(model, token_ids)
            longer = _hidden(model, torch.cat([token_ids, token_ids.flip(1)], 1))
            expected = model(input_ids=token_ids, use_cache=False).logits
        except Exception as error:  # a model's own code may raise anything; here it is known which model, and when
            raise UserError(
                f"{name} does not read plain token ids: {first_line(error)}",
                remedy="give a causal language model that needs nothing but token ids",
            ) from error
        allowed = tolerance(layer.weight.dtype, layer.weight.device)
        if largest_difference(logits_of(together, output_head(model)), expected) > allowed:
            raise UserError(
                f"the logits of {name} are not its last hidden states times its output layer",
                remedy="models that do something else between the two are not supported",
            )
        for found, beside, problem in (
            (together, _beside_themselves, "depend on the rows beside it"),
            (longer[:, :PROBE_TOKENS], _before_themselves, "depend on the tokens after it"),
        ):
            difference = largest_difference(found, alone)
            if difference <= allowed:
                continue
            # other shapes sum in another order, which trained models with a few very large hidden numbers make visible;
            # other tokens in the same shape do not
            if difference > MOST_ROUNDING or largest_difference(beside(model, token_ids), found) > allowed:
                raise UserError(
                    f"hidden states of a token of {name} {problem}",
                    remedy="give a causal language model; encoders and diffusion models are not supported",
                )
    _checked.add(model)


def _beside_themselves(model: Any, token_ids: Tensor) -> Tensor:
    """Hidden states of each row in a batch of the same shape, with other tokens in the other rows."""
    return torch.stack([_hidden(model, row.expand_as(token_ids))[place] for place, row in enumerate(token_ids)])


def _before_themselves(model: Any, token_ids: Tensor) -> Tensor:
    """Hidden states of the rows with other tokens after them."""
    return _hidden(model, torch.cat([token_ids, token_ids], 1))[:, :PROBE_TOKENS]


def forget(model: nn.Module) -> None:
    """Let the next :func:`check_model` look at the model again, which has been changed since."""
    _checked.discard(model)


def _hidden(model: Any, token_ids: Tensor) -> Tensor:
    return decoder_of(model)(input_ids=token_ids, use_cache=False).last_hidden_state
