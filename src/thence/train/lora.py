"""LoRA (arXiv 2106.09685) by peft: low-rank adapters are trained, the weights that they are laid over stay as they are.

An adapted layer gives ``x W^T + scale x A^T B^T``. A is drawn at random, B starts at zero: a model with fresh adapters
is the model without them. peft puts the adapters into the model, whose class and names stay; nobody but this module
knows how. What leaves the policy (sampling, publishing) has them merged: :mod:`thence.train.weights`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thence.data.order import stable_seed
from thence.errors import RecipeError, UserError
from thence.models.layers import decoder_of, forget
from thence.recipe import Lora
from thence.train.quantized import FourBit

NAME = "default"
"""What peft calls the one adapter of a model."""
PEFT_PREFIX = "base_model.model."
"""Before every name in an adapter's file."""
STIRRED = 0.05


def add_adapters(model: Any, settings: Lora, seed: int) -> None:
    """Put fresh adapters into a plain model, in place, and freeze everything else.

    A follows from the seed and the layer's name alone, so all ranks draw the same, whatever device they are on.

    Args:
        model: may be on the meta device: its adapters are then too.

    Raises:
        UserError: peft is not installed, or has made something else of the model.
        RecipeError: a target or a module to save that the model has not, or that cannot be.
    """
    targets, saved = _targets(model, settings), _saved(model, settings)
    if both := [s for s in saved for t in targets if t == s or t.startswith(f"{s}.") or s.startswith(f"{t}.")]:
        raise RecipeError(
            f"{both[0]} is to be trained whole, and an adapter is asked for in it",
            remedy="leave it out of model.lora.targets or of model.lora.modules_to_save",
            field="model.lora.modules_to_save",
        )
    peft = load_peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.strength,
        target_modules=_short(model, targets),
        modules_to_save=sorted(saved) or None,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=not any(isinstance(model.get_submodule(name), nn.Linear) for name in targets),  # GPT-2's
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # what peft draws is drawn again below
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    places = places_of(model)
    if set(places.adapted) != set(targets) or places.wrapped != set(saved):
        raise UserError(
            f"peft has put adapters into other modules of {type(model).__name__} than it was told",
            remedy="name the layers in model.lora.targets, or train without model.lora",
            field="model.lora.targets",
        )
    for name, layer in places.adapted.items():
        base = layer.base_layer.weight
        a, b = layer.lora_A[NAME], layer.lora_B[NAME]
        a.weight, b.weight = (_fresh(part.weight.shape, base, name, seed, part is b) for part in (a, b))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(places.trains(name))


def load_peft() -> Any:
    """The library peft. Raises UserError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError(
            "LoRA needs the package peft, which is not installed",
            remedy='install it: pip install "thence[lora]"',
            field="model.lora",
        ) from None
    return peft


def has_adapters(model: nn.Module) -> bool:
    """Whether :func:`add_adapters` has been here."""
    return any(_is_adapted(module) for module in model.modules())


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is the one without adapters, bit by bit, with the modules that were saved as they were.

    No parameter is frozen or freed: what a policy cut over ranks has noted of its parameters stays true.
    """
    switches: list[Any] = [m for m in model.modules() if _is_adapted(m) or _is_wrapper(m)]
    for module in switches:
        module._disable_adapters = True  # `enable_adapters` would freeze the parameters besides
    try:
        yield
    finally:
        for module in switches:
            module._disable_adapters = False


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """While it lasts, everything trained is changed a little: adapters that are zero have half of their gradient."""
    forget(model)
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, _ in before:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(noise.to(parameter), alpha=STIRRED)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@dataclass(frozen=True)
class Merge:
    """What is added to a weight: ``scale B A``, transposed for a layer whose weight is stored by input."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    def into(self, weight: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum, in the dtype of the weight, which stays as it is. ``whole`` gathers a tensor that is cut."""
        product = whole(self.b.detach()) @ whole(self.a.detach())
        return weight + self.scale * (product.T if self.transposed else product)


@dataclass(frozen=True)
class Places:
    """Where peft has been in a model."""

    adapted: dict[str, Any]
    wrapped: set[str]

    def plain(self, name: str) -> str | None:
        """What a parameter or buffer is called in the model without adapters; None: it has none such."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            owner, rest = ".".join(parts[:i]), parts[i + 1 :]
            if owner in self.adapted:
                held = part == "base_layer" and rest in (["weight"], ["bias"])  # 4 bits have buffers besides
                return ".".join([owner, *rest]) if held else None
            if owner in self.wrapped:  # followed by the adapter's name
                return ".".join([owner, *rest[1:]]) if part == "modules_to_save" else None
        return name

    def quantized(self, name: str) -> FourBit | None:
        """The layer that keeps this parameter, its weight, in 4 bits; None: it is kept as it is."""
        layer = self.adapted.get(name.removesuffix(".base_layer.weight"))
        base = None if layer is None or not name.endswith(".base_layer.weight") else layer.base_layer
        return base if isinstance(base, FourBit) else None

    def trains(self, name: str) -> bool:
        """Whether a parameter is one of an adapter, or of a module that is trained whole."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            owner = ".".join(parts[:i])
            if owner in self.adapted:
                return part in ("lora_A", "lora_B")
            if owner in self.wrapped:
                return part == "modules_to_save"
        return False

    def merge(self, name: str) -> Merge | None:
        """What is added to this parameter; None: nothing is."""
        layer = self.adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is None or not name.endswith(".base_layer.weight"):
            return None
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
        return Merge(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, float(layer.scaling[NAME]), transposed)


def places_of(model: nn.Module) -> Places:
    """Where peft has been in this model; nowhere in a plain one."""
    modules = dict(model.named_modules())
    adapted = {name: module for name, module in modules.items() if _is_adapted(module)}
    return Places(adapted, {name for name, module in modules.items() if _is_wrapper(module)})


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters and the modules trained whole, by name; shards as shards."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def published_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same under the names of an adapter's file, whole, one at a time. All ranks iterate to the end."""
    for name, value in trained_tensors(model).items():
        own = value.detach()
        plain = name.replace(f".modules_to_save.{NAME}.", ".").replace(f".{NAME}.", ".")
        yield PEFT_PREFIX + plain, own.full_tensor() if isinstance(own, DTensor) else own


def save_adapter(model: Any, tensors: Mapping[str, Tensor], base: str, folder: Path) -> None:
    """Write an adapter as peft does, for ``PeftModel.from_pretrained``.

    Args:
        tensors: of :func:`published_tensors`.
        base: the model that the adapter belongs to; empty: it cannot be found again.
    """
    config = copy.copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode = base or None, True
    config.save_pretrained(str(folder))
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _is_adapted(module: nn.Module) -> bool:
    return "base_layer" in module._modules and "lora_A" in module._modules


def _is_wrapper(module: nn.Module) -> bool:
    return "original_module" in module._modules and "modules_to_save" in module._modules


def _fresh(shape: torch.Size, base: Tensor, name: str, seed: int, zero: bool) -> nn.Parameter:
    """A matrix of a new adapter: B zero; A uniform in +- 1 / sqrt(inputs), as peft's."""
    if base.is_meta or zero:
        return nn.Parameter(torch.zeros(shape, dtype=base.dtype, device=base.device))
    generator = torch.Generator().manual_seed(stable_seed(seed, "lora", name))
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32)
    return nn.Parameter(((2 * drawn - 1) / math.sqrt(shape[1])).to(base))


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The linear layers of the model by name, its output layer apart."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head}


def _targets(model: Any, settings: Lora) -> list[str]:
    linear, field = linear_layers(model), "model.lora.targets"
    if settings.targets == "all-linear":
        found = list(linear)
        if not found:
            raise RecipeError(
                f"{type(model).__name__} has no linear layer to adapt", remedy="train without model.lora", field=field
            )
        return found
    names = {name for name, _ in model.named_modules()}
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    found: list[str] = []
    for target in settings.targets:
        matched = [name for name in linear if _ends(name, target)]
        if head is not None and _ends(head, target):
            raise RecipeError(
                f"{target} is the output layer, whose weight the loss reads itself: an adapter would be passed over",
                remedy=f'leave it out; to train it whole: modules_to_save = ["{target}"]',
                field=field,
            )
        if not matched:
            other = any(_ends(name, target) for name in names)
            raise RecipeError(
                f"{target!r} is {'no linear layer' if other else 'not there'} in {type(model).__name__}",
                remedy=f"its linear layers are: {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}",
                field=field,
            )
        found += matched
    if shared := _shared(model, found):
        raise RecipeError(
            f"the weight of {shared[0]} is that of {shared[1]} too: an adapter would belong to one of them alone",
            remedy="leave it out",
            field=field,
        )
    return list(dict.fromkeys(found))


def _saved(model: Any, settings: Lora) -> list[str]:
    field, found = "model.lora.modules_to_save", []
    named = {name: module for name, module in model.named_modules() if name}
    for given in settings.modules_to_save:
        matched = [name for name in named if _ends(name, given) and next(named[name].parameters(), None) is not None]
        if not matched or decoder_of(model) in [named[name] for name in matched]:
            raise RecipeError(
                f"{given!r} is {'the whole model' if matched else 'no module with weights of ' + type(model).__name__}",
                remedy="give names of modules, or ends of them, as norm or lm_head",
                field=field,
            )
        found += matched
    if shared := _shared(model, found):
        raise RecipeError(
            f"the weight of {shared[0]} is that of {shared[1]} too (tied): trained whole, the two would part",
            remedy="leave it out, or train without model.lora",
            field=field,
        )
    return list(dict.fromkeys(found))


def _shared(model: Any, names: list[str]) -> tuple[str, str] | None:
    """The first of these modules that shares a parameter with another module, and that one."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            others = [o for o in owners[id(parameter)] if o != name and not o.startswith(f"{name}.")]
            if others:
                return name, others[0]
    return None


def _ends(name: str, given: str) -> bool:
    return name == given or name.endswith(f".{given}")


def _short(model: Any, names: list[str]) -> list[str]:
    """The last parts of the names, where they mean these modules alone, for a configuration that can be read."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if any(_ends(name, end) for end in last)}
    return sorted(last) if meant == set(names) else sorted(names)
