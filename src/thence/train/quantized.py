"""QLoRA (arXiv 2305.14314) by bitsandbytes: the frozen weights under adapters are kept in 4 bits.

A weight is cut into blocks of 64 numbers in the order that they lie in memory. Each block keeps its largest magnitude
in float32, and of every number which of the 16 values of NF4 is nearest. The product uses the numbers that these stand
for, so a policy is ``dequantized(W) + scale B A``, and that is what :mod:`thence.train.weights` hands on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thence.errors import CheckpointError, RecipeError, UserError
from thence.models.layers import forget

BLOCK = 64
"""Numbers that share a largest magnitude: bitsandbytes' default, and the paper's."""


class FourBit(nn.Module):
    """A frozen linear layer whose weight is kept in NF4.

    bitsandbytes' own ``Linear4bit`` settles the compute type with the first input that it sees, rounds the bias to it
    in place, and on some CPUs lays the weight out anew for bfloat16: the policy would depend on what was run before.
    The arithmetic is bitsandbytes', its layer is not used.

    Args:
        layer: a linear layer with a float32 weight, which stays as it is. Its bias is taken over.
    """

    absmax: Tensor
    values: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        functional = load_bitsandbytes().functional
        weight = layer.weight.detach()
        # on the host: a GPU's kernel may round another way, and a checkpoint does not hold these numbers
        packed, state = functional.quantize_4bit(
            weight.cpu().contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        self.shape = weight.shape
        self.digest = hashlib.sha256(packed.numpy().tobytes() + state.absmax.numpy().tobytes()).hexdigest()
        self.weight = nn.Parameter(packed.to(weight.device), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("absmax", state.absmax.to(weight.device), persistent=False)
        self.register_buffer("values", state.code.to(weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the type that torch's own layer would give here: autocast's, else the input's."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        y = load_bitsandbytes().matmul_4bit(x.to(dtype), self.weight, quant_state=self._state())
        return y if self.bias is None else y + self.bias.to(dtype)

    def dequantized(self) -> Tensor:
        """The weight that the product uses, whole, in float32. Shape (outputs, inputs)."""
        return load_bitsandbytes().functional.dequantize_4bit(self.weight.data, self._state())

    def _state(self) -> Any:
        return load_bitsandbytes().functional.QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=self.values,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )


def load_bitsandbytes() -> Any:
    """The library bitsandbytes. Raises UserError where it is not installed."""
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "QLoRA needs the package bitsandbytes, which is not installed",
            remedy='install it: pip install "thence[qlora]", or leave model.lora.quantize out',
            field="model.lora.quantize",
        ) from None
    return bitsandbytes


def check_quantizable(model: nn.Module) -> None:
    """Make sure that the layers under the adapters can be kept in NF4. The model may be on the meta device.

    Raises:
        RecipeError: one is of a kind or type that cannot.
    """
    for name, layer in _adapted(model).items():
        base = layer.base_layer
        if type(base) is not nn.Linear:
            raise RecipeError(
                f"{name} is a {type(base).__name__}, and thence quantizes layers of the class Linear alone",
                remedy="leave model.lora.quantize out, or leave the layer out of model.lora.targets",
                field="model.lora.quantize",
            )
        if base.weight.dtype != torch.float32:
            raise RecipeError(
                f"the weight of {name} is {str(base.weight.dtype).removeprefix('torch.')}: NF4 is made from float32",
                remedy='set model.compute_dtype to "float32", "bfloat16" or "auto", or leave model.lora.quantize out',
                field="model.lora.quantize",
            )


def quantize(model: nn.Module) -> None:
    """Keep the weights under a model's adapters in NF4, in place. The same weights give the same bits.

    Raises:
        UserError: bitsandbytes is not installed.
        RecipeError: as :func:`check_quantizable`.
    """
    load_bitsandbytes()
    check_quantizable(model)
    for layer in _adapted(model).values():
        layer.base_layer = FourBit(layer.base_layer)
    forget(model)


def quantized_digest(model: nn.Module) -> str | None:
    """SHA-256 of all that is kept in NF4, which a checkpoint of adapters belongs to; None: nothing is."""
    found = [f"{name} {module.digest}" for name, module in model.named_modules() if isinstance(module, FourBit)]
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if found else None


def check_base(model: nn.Module, digest: str | None, checkpoint: Path) -> None:
    """Make sure that the adapters of a checkpoint were trained over what this model keeps in 4 bits.

    Args:
        digest: what :func:`quantized_digest` gave when the checkpoint was written.

    Raises:
        CheckpointError: they were trained over other numbers.
    """
    if quantized_digest(model) != digest:
        raise CheckpointError(
            "the adapters of the checkpoint were trained over other quantized weights than this machine makes",
            remedy="resume with the version of bitsandbytes, and on the kind of processor, that it was written with",
            file=checkpoint,
        )


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if "base_layer" in module._modules}
