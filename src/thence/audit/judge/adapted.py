"""Cases that train LoRA adapters: the probe's model with the same adapters in it, and nothing else to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from thence.audit.result import Finding
from thence.errors import UserError


def add_adapters(model: nn.Module, said: Mapping[str, Any]) -> frozenset[str]:
    """Put adapters into the judge's model as the case's adapter did; their values come from the case.

    Args:
        said: ``rank``, ``alpha`` and ``targets`` (names of modules, or their ends).

    Returns:
        The names of the parameters that such a case trains.

    Raises:
        UserError: peft is not installed, or cannot make such adapters.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            "LoRA is judged with the package peft, which is not installed where thence runs",
            remedy='install it: pip install "thence[lora]"',
        ) from None
    config = peft.LoraConfig(r=said["rank"], lora_alpha=said["alpha"], target_modules=list(said["targets"]))
    try:
        peft.inject_adapter_in_model(config, model, adapter_name="default")
    except ValueError as error:
        raise UserError(
            f"the case's adapters cannot be put into the probe's model: {error}",
            remedy="let the adapter say which modules of the model have adapters",
        ) from error
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def followed(
    model: nn.Module, trained: frozenset[str], states: Sequence[Mapping[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[Finding]]:
    """The parameters of the adapters in every state, and what there is to say of the others.

    Args:
        model: after :func:`add_adapters`; the weights under the adapters are those before training.
        trained: what that has returned. Solving switches gradients of the model on and off, so nobody can ask it later.

    Raises:
        UserError: a state lacks parameters of the model, so nobody can say what became of them.
    """
    parameters = dict(model.named_parameters())
    if lacking := [name for name in parameters if name not in states[0]]:
        raise UserError(
            f"{len(lacking)} of {len(parameters)} parameters of the model with LoRA in it were not kept, "
            f"{lacking[0]} among them",
            remedy="keep the parameters of the whole model under its own names, frozen ones too",
        )
    frozen = [name for name in parameters if name not in trained]
    moved = [n for n in frozen if any(not s[n].float().equal(parameters[n].detach().float()) for s in states)]
    findings = []
    if moved:
        detail = f"{len(moved)} of {len(frozen)} frozen parameters ({', '.join(moved[:3])}) are not those of the probe"
        findings.append(Finding("frozen-moved", "fault", detail))
    return [{name: state[name] for name in parameters if name in trained} for state in states], findings


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder with a LoRA adapter says of the step that made it.

    Args:
        model: the probe's model with such an adapter in it.
        before, after: parameters of the adapter around the step, by name in that model.
    """

    model: nn.Module
    before: dict[str, Tensor]
    after: dict[str, Tensor]


ASSUMED = (
    "the weights under the adapter: the program saved the adapter alone, and they are taken to be the probe's",
    "the adapter's first factor before the step: it is taken from the saved file, since it has no gradient while the "
    "second factor is zero",
)
"""What an adapter's folder does not show."""


def saved_adapter(model: nn.Module, folder: Path) -> SavedAdapter:
    """Read an adapter that one optimizer step has made, and work out where it began.

    A LoRA adapter begins with one factor drawn at random and the other zero. The random one has no gradient in the
    first step, so it is saved as it began; everything else begins as peft makes it.

    Args:
        model: the probe's model; becomes part of the result.
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: peft is not installed, or the adapter is not LoRA, begins elsewhere, or does not fit the model.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            "the program saved an adapter, and adapters are judged with the package peft, which is not installed",
            remedy='install it: pip install "thence[lora]"',
        ) from None
    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    if config.peft_type != peft.PeftType.LORA:
        raise UserError(
            f"the program saved an adapter of type {config.peft_type}; the audit follows LoRA adapters",
            remedy="audit its step with thence.audit.check, which sees any parameters",
        )
    config.inference_mode = False
    fresh = config.init_lora_weights in (True, "gaussian")
    saved = peft.load_peft_weights(str(folder), device="cpu")
    try:
        adapted: Any = peft.get_peft_model(model, config)  # pyright: ignore
        before = _trained(adapted)
        loaded = peft.set_peft_model_state_dict(adapted, saved)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the adapter does not fit the model that it was given: {error}", remedy=_CHECK) from error
    after = {name: tensor.to(next(iter(saved.values())).dtype) for name, tensor in _trained(adapted).items()}
    second = [name for name in before if "lora_B" in name or "lora_embedding_A" in name]
    if not fresh or any(before[name].any() for name in second) or getattr(loaded, "unexpected_keys", None):
        raise UserError(
            f"the adapter does not begin with a factor of zero (init_lora_weights = {config.init_lora_weights!r}), so "
            "where it began is not known",
            remedy=f"let it begin with init_lora_weights = True, or {_CHECK}",
        )
    drawn = [name for name in before if "lora_A" in name or "lora_embedding_B" in name]
    before |= {name: after[name] for name in drawn}
    return SavedAdapter(adapted, {name: tensor.to(after[name].dtype) for name, tensor in before.items()}, after)


_CHECK = "audit its step with thence.audit.check, which sees the adapter before the step"


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
