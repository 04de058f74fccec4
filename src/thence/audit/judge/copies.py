"""Several sets of weights that one program wrote: are those that claim to be the trained model one and the same?"""

from __future__ import annotations

import copy as copying
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thence.audit.judge.saved import tied
from thence.audit.judge.untouched import groups
from thence.audit.result import Finding, SavedSets

State = Mapping[str, Tensor]
Claim = Literal["last", "numbered", "earlier", "average", "other"]
ULPS = {torch.float64: 4.0, torch.float32: 4.0}
"""Units in the last place that two copies may lie apart; narrower types: one, since some truncate."""
BLUR = 8.0
"""What an adapter adds may lie apart by so many times the spacing of its numbers, over the largest that it adds."""
ALIKE = 2e-2
"""Norm of what one factor leaves of a tensor's move, over the norm of the move, for which the factor explains it."""
_LEFT: Mapping[str, str] = {
    "average": "an average, by its name",
    "other": "another model, by its name",
    "earlier": "a checkpoint before the last, by its number",
    "numbered": "a checkpoint whose number is not that of the only step; it holds other numbers",
}
_SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Fields of an adapter's configuration that change what it adds."""


@dataclass(frozen=True)
class WrittenSet:
    """One set of weights.

    Args:
        name: of the file or index, from the folder that the program was given; with the key inside the file.
        folder: where it lies.
        state: tensors by the model's names.
        form: ``model``; ``adapter``: with its configuration beside it; ``parts``: tensors of an adapter without one,
            which say nothing by themselves.
        claim: ``last``: nothing in its name says that it is not the trained model; ``numbered``: the highest number
            of its kind, which need not be the last step; ``earlier``: a lower one; ``average``, ``other``: by its name.
        time: when it was written, ns.
        whole: whether a loader reads it as the whole model.
        lacking: shards that its index or their own names promise and that are not there.
    """

    name: str
    folder: Path
    state: Mapping[str, Tensor]
    form: Literal["model", "adapter", "parts"]
    claim: Claim
    time: int
    whole: bool
    lacking: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """Of the widest numbers."""
        return max(torch.finfo(value.dtype).bits for value in self.state.values())


@dataclass(frozen=True)
class Written:
    """What lies below a folder.

    Args:
        sets: of weights, the one to judge first.
        left_out: files that were not looked at, each with the reason.
    """

    sets: tuple[WrittenSet, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class WholeModel:
    """The model before training.

    Args:
        state: its parameters, tied ones under all their names.
        expected: names of its parameters, tied ones once.
        aliases: second names of tied parameters, each with the first.
    """

    state: Mapping[str, Tensor]
    expected: tuple[str, ...]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, stored: State) -> WholeModel:
        """From a model, for the names, and the numbers that lie in its folder."""
        aliases = tied(model)
        second = {first: alias for alias, first in aliases.items()}
        expected = tuple(name for name, _ in model.named_parameters())
        state = {n: stored[n] if n in stored else stored[second[n]] for n in expected}
        return cls(state | {alias: state[first] for alias, first in aliases.items()}, expected, aliases)

    def named_once(self, state: State) -> dict[str, Tensor]:
        """A state whose tied parameters stand under their first name alone."""
        moved = {self.aliases.get(n, n): v for n, v in state.items() if n in self.aliases}
        return moved | {n: v for n, v in state.items() if n not in self.aliases}


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model of peft with its adapter added, by the names of the model under it."""
    merged: Any = copying.deepcopy(model)
    return {name: value.detach() for name, value in merged.merge_and_unload().state_dict().items()}


def compare_sets(
    written: Written, start: WholeModel, trained: State, frozen: Sequence[str]
) -> tuple[list[Finding], SavedSets]:
    """Compare all sets that claim to be the trained model with the first, which is judged.

    Args:
        trained: the whole model of the first set, an adapter added.
        frozen: parts of the names of parameters that are not trained on purpose, and need not be saved.
    """
    first, *rest = written.sets
    expected = [name for name in start.expected if not any(part in name for part in frozen)]
    found = _own_findings(first, start, expected) if first.form == "model" else []
    same_ones: list[str] = []
    left = list(written.left_out)
    for one in sorted(rest, key=lambda one: one.name):
        if one.claim in ("average", "other", "earlier"):
            left.append(f"{one.name}: {_LEFT[one.claim]}")
            continue
        if one.form != "model" and first.form != "adapter":
            left.append(f"{one.name}: an adapter, beside a model that is judged")
            continue
        wrong = _against(one, first, start, trained)
        if one.form == "model":
            wrong += _own_findings(one, start, expected)
        if not wrong:
            held = len(start.named_once(one.state))
            part = (
                f" ({held} of {len(start.expected)} parameters)" if one.form == "model" and held < len(expected) else ""
            )
            same_ones.append(one.name + part)
        elif one.claim == "numbered":
            left.append(f"{one.name}: {_LEFT[one.claim]}")
        found += wrong if one.claim != "numbered" else []
    return _joined(found), SavedSets(f"{first.name} ({_why(first, rest)})", tuple(same_ones), tuple(left))


def _why(first: WrittenSet, rest: Sequence[WrittenSet]) -> str:
    """Why this set is judged."""
    if not rest:
        return "the only set of weights"
    if first.claim != "last":
        return f"no set claims to be the trained model; {_LEFT[first.claim].split(';')[0]}"
    rivals = [one for one in rest if one.claim == "last"]
    if not rivals:
        return "the only one that claims to be the trained model"
    if first.form == "adapter":
        return "an adapter: its numbers show the step best"
    return f"of {len(rivals) + 1} that claim to be the trained model the one with most to see, or written last"


def _own_findings(one: WrittenSet, start: WholeModel, expected: Sequence[str]) -> list[Finding]:
    """What is wrong with a model by itself."""
    found = untied_findings(one.name, one.state, start.aliases)
    if one.whole or one.lacking:
        found += missing_findings(one.name, start.named_once(one.state), expected, one.lacking)
    return found


def _against(one: WrittenSet, first: WrittenSet, start: WholeModel, trained: State) -> list[Finding]:
    """A set against the one that is judged."""
    if one.form == "model":
        blur = 0.0
        if first.form == "adapter":
            blur = BLUR * max(torch.finfo(v.dtype).eps for v in first.state.values())
        own = start.named_once(one.state)
        return copy_findings(one.name, own, first.name, trained, start.state, blur=blur)
    zero = {n: torch.zeros_like(v) for n, v in first.state.items() if "lora_B" in n or "lora_embedding_A" in n}
    parts = {n: v for n, v in one.state.items() if n in first.state}
    found = copy_findings(one.name, parts, first.name, first.state, zero, blur=0.0)
    gone = [n for n in first.state if n not in parts]
    if gone:
        detail = f"{len(gone)} of {len(first.state)} tensors of {first.name} are not in {one.name}: {groups(gone)}"
        found.append(Finding("saved-missing", "fault", detail))
    if one.form == "adapter":
        a, b = _settings(first.folder), _settings(one.folder)
        other = [name for name in _SETTINGS if (a.get(name) or None) != (b.get(name) or None)]
        if other:
            name = other[0]
            detail = f"{name} is {b.get(name)} beside {one.name} and {a.get(name)} beside {first.name}"
            found.append(Finding("saved-differs", "fault", detail))
    return found


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        return {}


def _joined(found: Sequence[Finding]) -> list[Finding]:
    """One finding an id, with all that was said."""
    details: dict[str, list[str]] = {}
    for finding in found:
        details.setdefault(finding.id, []).append(finding.detail)
    return [Finding(id_, "fault", "; ".join(dict.fromkeys(said))) for id_, said in details.items()]


def copy_findings(name: str, copy: State, judged: str, state: State, start: State, *, blur: float) -> list[Finding]:
    """What a copy is where it is not the judged set, up to the rounding of its numbers.

    Args:
        name: of the copy; ``judged``: of the judged set.
        state: the judged set; of an adapter, the model with the adapter added.
        start: before training.
        blur: share of the largest number that an adapter adds by which its sum may be off; 0: no adapter is added.
    """
    merged = blur > 0
    shared = [n for n in copy if n in state and copy[n].shape == state[n].shape]
    wrong = [n for n in shared if not same(copy[n], state[n], start.get(n), blur)]
    if not wrong:
        return []
    whole = f"{len(wrong)} of {len(shared)} tensors of {name}"
    known = [n for n in wrong if n in start]
    for old, new, stale, other in ((copy, state, name, judged), (state, copy, judged, name)):
        if known and _of_start(old, new, start, known, blur):
            detail = f"{len(wrong)} of {len(shared)} tensors of {stale} hold numbers of before the training, and those "
            detail += f"of {other} do not: {groups(wrong)}"
            return [Finding("saved-merge" if merged else "saved-stale", "fault", detail)]
    factor = _one_factor(copy, state, start, known)
    moved = [n for n in shared if n in start and not _equal(state[n], start[n])]
    if factor is not None and merged:
        detail = f"{whole} hold what the adapter adds with a factor of {factor:.3g} in place of 1: {groups(wrong)}"
        return [Finding("saved-merge", "fault", detail)]
    if factor is not None and len(wrong) >= len(moved) - len(wrong) and factor > 0:
        less, more, share = (name, judged, factor) if factor < 1 else (judged, name, 1 / factor)
        detail = f"{less} lies {share:.2%} of the way from the start to {more}, as an average over the steps does"
        return [Finding("saved-average", "fault", detail)]
    far = _norm({n: copy[n].double() - state[n].double() for n in wrong})
    step = _norm({n: state[n].double() - start[n].double() for n in wrong if n in start})
    size = f", by {far / step:.2g} of the update" if step else ""
    id_ = "saved-merge" if merged else "saved-differs"
    return [Finding(id_, "fault", f"{whole} are not those of {judged}{size}: {groups(wrong)}")]


def missing_findings(name: str, state: State, expected: Sequence[str], lacking: Sequence[str]) -> list[Finding]:
    """Parameters, or whole files, that a set should hold and does not.

    Args:
        expected: names of all parameters that were trained.
        lacking: files that are not there.
    """
    if lacking:
        return [Finding("saved-missing", "fault", f"of {name} {len(lacking)} files are not there: {lacking[0]}")]
    gone = [n for n in expected if n not in state]
    if not gone:
        return []
    detail = f"{len(gone)} of {len(expected)} parameters are not in {name}, or not whole: {groups(gone)}"
    return [Finding("saved-missing", "fault", detail)]


def untied_findings(name: str, state: State, aliases: Mapping[str, str]) -> list[Finding]:
    """Second names of a tied parameter under which a set holds other numbers."""
    apart = [
        (alias, first)
        for alias, first in aliases.items()
        if alias in state and first in state and not _equal(state[alias], state[first])
    ]
    if not apart:
        return []
    alias, first = apart[0]
    return [Finding("saved-untied", "fault", f"{alias} is one with {first} in the model, and another in {name}")]


def same(copy: Tensor, state: Tensor, start: Tensor | None, blur: float = 0.0) -> bool:
    """Whether a tensor is another one up to the rounding of the narrower of both.

    One that is exactly what it was before training, where the other one, rounded alike, is not, is not the same: a
    small step may hide in the rounding of a narrow type.
    """
    if _equal(copy, state.to(copy.dtype)) or _equal(copy.to(state.dtype), state):
        return True
    if copy.dtype == torch.bfloat16 and _equal(copy, _truncated(state)):
        return True
    if start is not None and _equal(copy, start.to(copy.dtype)):
        return False
    return not bool(_far(copy, state, start, blur).any())


def _far(copy: Tensor, state: Tensor, start: Tensor | None, blur: float) -> Tensor:
    """Which numbers lie farther apart than rounding explains."""
    narrow = min(copy.dtype, state.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    a, b, eps = copy.double(), state.double(), torch.finfo(narrow).eps
    size = torch.maximum(a.abs(), b.abs())
    ulp = torch.where(size > 0, torch.exp2(torch.floor(torch.log2(size.clamp_min(1e-300)))), size) * eps
    allowed = ulp * ULPS.get(narrow, 1.0) + torch.finfo(narrow).tiny
    if start is not None and blur and b.numel():
        allowed = allowed + blur * (b - start.double()).abs().max()
    return (a - b).abs() > allowed * (1 + 1e-9)


def _of_start(copy: State, state: State, start: State, wrong: Sequence[str], blur: float) -> bool:
    """Whether all that is wrong are numbers of before the training."""
    for name in wrong:
        value, old = copy[name], start[name].to(copy[name].dtype)
        far = _far(value, state[name], start[name], blur)
        if not (value.double() == old.double())[far].all():
            return False
        if not far.any() and not _equal(value, old):
            return False
    return True


def _one_factor(copy: State, state: State, start: State, wrong: Sequence[str]) -> float | None:
    """By how much larger the copy's move from the start is, if it is one factor for all wrong tensors."""
    if not wrong:
        return None
    a = torch.cat([(copy[n].double() - start[n].double()).reshape(-1) for n in wrong])
    b = torch.cat([(state[n].double() - start[n].double()).reshape(-1) for n in wrong])
    if not b.any() or not a.any():
        return None
    factor = float(a @ b / (b @ b))
    rounding = torch.cat([copy[n].double().reshape(-1) * torch.finfo(copy[n].dtype).eps for n in wrong]).norm()
    rest, size = float((a - factor * b).norm()), abs(factor) * float(b.norm())
    return factor if rest <= ALIKE * size + float(rounding) and size > 4 * float(rounding) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.double() == b.double()).all())


def _truncated(value: Tensor) -> Tensor:
    """Float32 cut to bfloat16 without rounding."""
    return (value.float().view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


def _norm(values: State) -> float:
    return float(torch.cat([value.reshape(-1) for value in values.values()]).norm()) if values else 0.0
