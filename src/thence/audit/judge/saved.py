"""A case that saves: is what was saved the model that was trained?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thence.audit.judge.untouched import groups
from thence.audit.result import CaseResult, Finding
from thence.audit.solve.observation import Observation, load_states

if TYPE_CHECKING:
    from thence.audit.judge.case import Judge

State = Mapping[str, Tensor]
NARROW = (torch.bfloat16, torch.float16)
NEAR = 1e-5
"""Norm of the difference of two tensors over that of what was trained in them, for which they are the same."""


def judge_saved(judge: Judge, observed: Observation, said: Mapping[str, Any]) -> CaseResult:
    """Compare what was saved with the parameters after the last step.

    Args:
        said: by the adapter: ``lora`` where the model has adapters, ``saved_dtype`` where the settings ask for another
            type of number than the parameters have.
    """
    from safetensors.torch import load_file

    case, path = observed.case, observed.folder / "rank-0" / "saved.safetensors"
    states, found = load_states(observed.folder, len(observed.records))
    if len(states) < 2 or not path.exists():
        reason = "the adapter kept nothing that was saved, or no step was taken"
        return CaseResult(case, "not judged", reason, seconds=observed.seconds)
    saved, aliases = plain_names(load_file(str(path))), tied(judge.model)
    if _holds_adapters(states[0]) and not _holds_adapters(saved):
        lora = said.get("lora")
        if lora is None:
            return CaseResult(
                case, "not judged", "the adapter did not say the strength of LoRA", seconds=observed.seconds
            )
        found += merged_findings(states[-1], saved, lora["alpha"] / lora["rank"])
    else:
        if _holds_adapters(saved) and not any(name.endswith("base_layer.weight") for name in saved):
            states = [{name: value for name, value in state.items() if ".lora_" in name} for state in states]
        found += lacking_findings(states[-1], saved, aliases)
        found += other_findings(states, saved, aliases, str(said.get("saved_dtype", "")))
    words = f"{len(saved)} tensors compared with those in memory after step {len(states) - 1}"
    unique = {finding.id: finding for finding in reversed(found)}
    return CaseResult(case, "judged", "", (), tuple(reversed(unique.values())), observed.seconds, said=words)


def plain_names(saved: State) -> dict[str, Tensor]:
    """What was saved under the names that the model has: peft's files leave out the adapter's name."""
    found = {}
    for name, value in saved.items():
        name = name.removeprefix("base_model.model.")
        for part in ("lora_A", "lora_B"):
            name = name.replace(f".{part}.weight", f".{part}.default.weight")
        found[name] = value
    return found


def tied(model: nn.Module) -> dict[str, str]:
    """Second names of parameters that have two, each with the first."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            found[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return found


def lacking_findings(live: State, saved: State, aliases: Mapping[str, str]) -> list[Finding]:
    """Tensors that were not saved, or not whole, and second names of a tied one that hold something else."""
    second = {first: name for name, first in aliases.items()}
    lacking = [name for name in live if name not in saved and second.get(name) not in saved]
    parts = [name for name in live if name in saved and saved[name].shape != live[name].shape]
    found = []
    if lacking:
        found.append(Finding("saved-missing", "fault", f"{len(lacking)} of {len(live)} parameters: {groups(lacking)}"))
    elif parts:
        shapes = f"{tuple(saved[parts[0]].shape)} where {tuple(live[parts[0]].shape)} was trained"
        detail = f"{len(parts)} of {len(live)} parameters are not whole: {groups(parts)}, {shapes}"
        found.append(Finding("saved-missing", "fault", detail))
    untied = [n for n, first in aliases.items() if n in saved and first in saved and not _same(saved[n], saved[first])]
    if untied:
        detail = f"{untied[0]} is one with {aliases[untied[0]]} in the model, and another tensor where it was saved"
        found.append(Finding("saved-untied", "fault", detail))
    return found


def other_findings(states: Sequence[State], saved: State, aliases: Mapping[str, str], dtype: str) -> list[Finding]:
    """What the saved tensors are where they are not those after the last step.

    Args:
        states: before the first step and after each.
        dtype: that the settings ask for; empty: that of the parameters.
    """
    second = {first: name for name, first in aliases.items()}
    stored = {n: saved.get(n, saved.get(second.get(n, ""))) for n in states[-1]}
    kept = {n: v for n, v in stored.items() if v is not None and v.shape == states[-1][n].shape}
    live = {n: states[-1][n] for n in kept}
    if dtype:
        live = {n: v.to(getattr(torch, dtype)) for n, v in live.items()}
    other = [n for n in kept if not _same(kept[n], live[n])]
    if not other:
        return []
    for narrow in NARROW:
        if all(_same(kept[n], live[n].to(narrow)) for n in other):
            types = f"rounded to {_name(narrow)}; in memory: {_name(live[other[0]].dtype)}"
            detail = f"{len(other)} of {len(kept)} tensors are {types}"
            return [Finding("saved-rounded", "fault", detail)]
    return [_stale(states, kept, other) or _average(states, kept) or _unexplained(states, kept, other)]


def merged_findings(live: State, saved: State, strength: float) -> list[Finding]:
    """What a model with merged adapters is where it is not the weights plus all that the adapters add.

    Args:
        strength: alpha over rank.
    """
    shares: dict[str, float] = {}
    expected: dict[str, Tensor] = {}
    for name, value in live.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        expected[plain] = value
        pair = [live.get(name.replace("base_layer", f"lora_{part}.default")) for part in "BA"]
        if plain == name or name.endswith("bias") or pair[0] is None or pair[1] is None:
            continue
        added = strength * pair[0].double() @ pair[1].double()
        expected[plain] = (value.double() + added).to(value.dtype)
        if plain in saved and saved[plain].shape == value.shape:
            rest = saved[plain].double() - value.double()
            share = float((rest * added).sum() / (added * added).sum().clamp_min(1e-30))
            if float((rest - share * added).norm()) <= 1e-3 * float(added.norm()):
                shares[plain] = round(share, 2)
    found = lacking_findings(expected, saved, {})
    wrong = {n: s for n, s in shares.items() if s != 1.0}
    if wrong:
        said = ", ".join(f"{share:g}" for share in sorted(set(wrong.values())))
        detail = (
            f"in {len(wrong)} of {len(shares)} places the adapters were added with a factor of {said} in place of 1"
        )
        return [*found, Finding("saved-merge", "fault", detail)]
    there = {n: v for n, v in expected.items() if n in saved and saved[n].shape == v.shape}
    other = [n for n in there if not _near(saved[n], there[n], live)]
    if other:
        detail = f"{len(other)} of {len(there)} tensors are not the weights with the adapters added: {groups(other)}"
        found.append(Finding("saved-differs", "fault", detail))
    return found


def _stale(states: Sequence[State], kept: State, other: Sequence[str]) -> Finding | None:
    """Tensors, or rows of them, that are those after an earlier step."""
    for step in range(len(states) - 2, -1, -1):
        old, live = states[step], states[-1]
        if all(_same(kept[n], old[n]) for n in other):
            if len(other) == len(kept):
                return Finding("saved-stale", "fault", f"the whole saved model is that of step {step}")
            detail = f"of {len(kept)} tensors {len(other)} are as after step {step}: {groups(other)}"
            return Finding("saved-stale", "fault", detail)
        rows = {n: _rows(kept[n], old[n]) for n in other}
        if all((rows[n] | _rows(kept[n], live[n])).all() for n in other):
            name = max(other, key=lambda n: int(rows[n].sum()))
            part = float(rows[name].double().mean())
            detail = f"parts of {len(other)} of {len(kept)} tensors are as after step {step}: {part:.0%} of {name}"
            return Finding("saved-stale", "fault", detail)
    return None


def _average(states: Sequence[State], kept: State) -> Finding | None:
    """One average of the parameters after all steps, as an exponential moving average is."""
    last = _flat(states[-1], kept)
    basis = torch.stack([_flat(state, kept) - last for state in states[:-1]], 1)
    rest = _flat(kept, kept) - last
    shares = torch.linalg.lstsq(basis, rest[:, None]).solution[:, 0]
    if float((basis @ shares - rest).norm()) > 1e-3 * float(rest.norm()):
        return None
    said = ", ".join(f"{share:.2f}" for share in [*shares.tolist(), 1 - float(shares.sum())])
    detail = f"the tensors are an average of those of steps 0 to {len(states) - 1} with shares {said}"
    return Finding("saved-average", "fault", detail)


def _unexplained(states: Sequence[State], kept: State, other: Sequence[str]) -> Finding:
    step = _flat(states[-1], kept) - _flat(states[-2], kept)
    far = float((_flat(kept, kept) - _flat(states[-1], kept)).norm() / step.norm().clamp_min(1e-30))
    which = f"{len(other)} of {len(kept)} tensors differ from those in memory"
    return Finding("saved-differs", "fault", f"{which}, by {far:.2g} of the last step: {groups(other)}")


def _holds_adapters(state: State) -> bool:
    return any(".lora_" in name for name in state)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.double() == b.double()).all())


def _rows(a: Tensor, b: Tensor) -> Tensor:
    """Which slices along the first dimension are equal."""
    equal = a.double() == b.double()
    return equal.reshape(len(equal), -1).all(1) if equal.ndim else equal.reshape(1)


def _near(saved: Tensor, expected: Tensor, live: State) -> bool:
    return float((saved.double() - expected.double()).norm()) <= NEAR * max(float(expected.double().norm()), 1e-30)


def _flat(state: State, names: State) -> Tensor:
    return torch.cat([state[name].double().reshape(-1) for name in names])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
