"""Activation checkpointing: layers keep their input alone, and run again in the backward pass.

transformers does it inside of a layer's ``forward``. So nothing is wrapped, names of weights stay, and the hooks of
FSDP, which surround the layer, run once.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from thence.errors import UserError, first_line
from thence.models.layers import layers_of


def recompute(model: Any, which: bool | int) -> None:
    """Let layers of the model be recomputed from now on, in training mode, which is switched on.

    Args:
        model: a Hugging Face causal language model without dropout, whole or cut over ranks.
        which: True: every layer. A number k: the first layer and every k-th from there; the others keep what they
            compute. A model with several lists of layers is counted through, in the order of its modules.

    Raises:
        UserError: transformers cannot recompute this model's layers, or not each by itself.
    """
    name = type(model).__name__
    # transformers 5.23 renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"the layers of {name} cannot be recomputed: {first_line(error)}",
            remedy="set activation_checkpointing = false, and a smaller micro_batch_tokens where memory is short",
            field="activation_checkpointing",
        ) from error
    model.train()  # transformers recomputes in training mode only; dropout was switched off when loading
    if int(which) == 1:
        return
    layers = [switches for layer in layers_of(model) if (switches := _switches(layer))]
    if not layers:
        raise UserError(
            f"{name} recomputes all of its layers or none: transformers has no switch for each",
            remedy="set activation_checkpointing = true",
            field="activation_checkpointing",
        )
    for place, switches in enumerate(layers):
        for switch in switches:
            switch.gradient_checkpointing = place % which == 0


def _switches(layer: nn.Module) -> list[Any]:
    """What has to be switched for this layer: itself, or parts of it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in layer.modules() if isinstance(module, GradientCheckpointingLayer)]
