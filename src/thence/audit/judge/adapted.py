"""Cases that train LoRA adapters: the probe's model with the same adapters in it, and nothing else to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
