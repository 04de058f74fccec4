"""Every set of weights that a program wrote: models, shards, checkpoints, averages, adapters; and what each claims."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from thence.audit.judge.copies import Claim, Written, WrittenSet

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
UNREAD = (".distcp", ".gguf", ".npz", ".h5", ".msgpack", ".onnx")
LARGEST = 2 << 30
"""Bytes; the probe's models are a thousandth of it."""
STANDARD = re.compile(r"(model|pytorch_model)\.(safetensors|bin)|.*\.index\.json")
"""Files that transformers looks for: whoever loads them gets random numbers for what they lack."""

_ORDER: tuple[Claim, ...] = ("last", "numbered", "average", "other", "earlier")
_AVERAGES = frozenset(
    ("ema", "swa", "avg", "average", "averaged", "polyak", "shadow", "lookahead", "slow", "mean", "moving")
)
_OTHERS = frozenset((
    "init", "initial", "base", "before", "start", "pretrained", "ref", "reference", "orig", "original", "teacher",
    "old", "backup", "prev", "previous", "best", "critic", "reward", "draft",
))  # fmt: skip
_NUMBER = re.compile(
    r"(?:(?<![a-z])(?:checkpoints?|ckpt|steps?|iter|iteration|epochs?|ep|save|model|weights|state)[-_=. ]*|(?:^|/))"
    r"(\d+)(?=[^a-z0-9]|$)"
)
_NO_WEIGHTS = re.compile(r"optim|exp_avg|moment|grad|scheduler|(^|\W)rng|random_states|scaler|training_args")
_SHARD = re.compile(r"(?P<stem>.*?)[-_.]?(?P<number>\d+)[-_]of[-_](?P<all>\d+)(?P<end>\.\w+)")
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_DEEP = 3
_UNREADABLE = (
    OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip


def files_before(out: Path) -> dict[Path, tuple[int, int, int]]:
    """What lies in a folder before the program runs; hand it to :func:`find_written`."""
    return {path: _stamp(path) for path in out.rglob("*") if path.is_file()}


def find_written(
    out: Path, start: Mapping[str, Tensor], expected: int, before: Mapping[Path, tuple[int, int, int]]
) -> Written:
    """Find every set of weights below a folder.

    The set to judge is one that claims to be the last, of these an adapter before models, the one of which most
    numbers moved, the widest numbers, the one written last.

    Args:
        start: the model before training, tied parameters under all their names.
        expected: number of its parameters, tied ones counted once.
        before: files that were there before the program ran; those that are unchanged are not the program's.
    """
    sets: list[WrittenSet] = []
    left: list[str] = []
    for folder in sorted({out, *(path for path in out.rglob("*") if path.is_dir())}) if out.is_dir() else []:
        files = []
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            if before.get(path) == _stamp(path):
                if path.suffix in SUFFIXES:
                    left.append(f"{path.relative_to(out)}: it was there before the program ran")
            elif path.suffix in UNREAD:
                left.append(f"{path.relative_to(out)}: the audit does not read *{path.suffix}")
            else:
                files.append(path)
        found, reasons = _of_folder(out, folder, files, start)
        sets += found
        left += reasons
    sets = _claims(sets)
    return Written(tuple(sorted(sets, key=lambda one: _rank(one, start, expected))), tuple(left))


def _rank(one: WrittenSet, start: Mapping[str, Tensor], expected: int) -> tuple[Any, ...]:
    still = 0
    if one.form == "model":
        still = sum(int((v.double() == start[n].to(v.dtype).double()).sum()) for n, v in one.state.items())
    part = one.form == "model" and len(one.state) < expected
    form = ("adapter", "model", "parts").index(one.form)
    return (one.form == "parts", _ORDER.index(one.claim), form, part, still, -one.bits, -one.time, one.name)


def _of_folder(
    out: Path, folder: Path, files: list[Path], start: Mapping[str, Tensor]
) -> tuple[list[WrittenSet], list[str]]:
    """The sets of one folder, and why files were left out."""
    sets: list[WrittenSet] = []
    left: list[str] = []
    groups, lone, unread = _grouped(files)
    left += [f"{path.relative_to(out)}: the index beside it does not name it" for path in unread]
    for head, members, lacking in groups:
        states = [state for path in members for _, state in _read(path, start, left, out)]
        if states:
            state = {name: value for part in states for name, value in part.items()}
            time = max(path.stat().st_mtime_ns for path in members)
            sets.append(_made(out, head, "", state, time, lacking))
    for path in lone:
        time = path.stat().st_mtime_ns
        sets += [_made(out, path, key, state, time) for key, state in _read(path, start, left, out)]
    return _pieces_joined(sets, start), left


def _made(
    out: Path, path: Path, key: str, state: Mapping[str, Tensor], time: int, lacking: tuple[str, ...] = ()
) -> WrittenSet:
    name = f"{path.relative_to(out)}" + (f" [{key}]" if key else "")
    adapter = path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").exists()
    form = "adapter" if adapter else "parts" if any(_of_adapter(n) for n in state) else "model"
    whole = STANDARD.fullmatch(path.name) is not None or bool(lacking)
    return WrittenSet(name, path.parent, state, form, "last", time, whole, lacking)


def _grouped(files: list[Path]) -> tuple[list[tuple[Path, list[Path], tuple[str, ...]]], list[Path], list[Path]]:
    """Shards that belong together, each with its index; files that stand alone; shards that no index names."""
    groups: list[tuple[Path, list[Path], tuple[str, ...]]] = []
    there = {path.name: path for path in files if path.suffix in SUFFIXES}
    indexed: set[str] = set()
    for index in (path for path in files if path.name.endswith(".index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        groups.append(
            (
                index,
                [there[n] for n in shards if n in there],
                tuple(n for n in shards if not (index.parent / n).exists()),
            )
        )
        indexed |= set(shards)
    suffixes = {Path(name).suffix for name in indexed}
    by_stem: dict[tuple[str, int, str], dict[int, Path]] = {}
    lone, unread = [], []
    for name, path in there.items():
        shard = _SHARD.fullmatch(name)
        if name in indexed:
            continue
        if shard is None:
            lone.append(path)
        elif path.suffix in suffixes:
            unread.append(path)
        else:
            key = (shard["stem"], int(shard["all"]), shard["end"])
            by_stem.setdefault(key, {})[int(shard["number"])] = path
    for (stem, count, end), parts in by_stem.items():
        first = 0 if 0 in parts else 1
        lacking = tuple(f"{stem}, part {n} of {count}{end}" for n in range(first, first + count) if n not in parts)
        groups.append((next(iter(parts.values())), list(parts.values()), lacking))
    return groups, lone, unread


def _read(
    path: Path, start: Mapping[str, Tensor], left: list[str], out: Path
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The sets of weights in a file, each with its key there; says in ``left`` why there are none."""
    name = str(path.relative_to(out))
    if _NO_WEIGHTS.search(path.name.lower()):
        left.append(f"{name}: no weights, by its name")
        return
    if path.stat().st_size > LARGEST:
        left.append(f"{name}: larger than {LARGEST >> 30} GiB")
        return
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        left.append(f"{name}: it cannot be read ({' '.join(str(error).split())[:100]})")
        return
    found = list(_sets_within(content, start))
    if not found:
        left.append(f"{name}: no floating-point tensor with the name and shape of a parameter")
    yield from found


def _sets_within(
    content: Any, start: Mapping[str, Tensor], key: str = "", deep: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(content, Mapping) or deep > _DEEP:
        return
    tensors = {n: v for n, v in content.items() if isinstance(n, str) and isinstance(v, Tensor)}
    state = plain_state(tensors, start)
    if state:
        yield key, state
    for name, value in content.items():
        if isinstance(value, Mapping) and not _NO_WEIGHTS.search(str(name).lower()) and name != "state":
            yield from _sets_within(value, start, f"{key}.{name}" if key else str(name), deep + 1)


def plain_state(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have the name of a parameter, and those of adapters, under the model's own names.

    Tensors of another shape and numbers that are not floating-point are left out; wrappers' prefixes are removed.
    """
    plain = {}
    for name, value in tensors.items():
        for part in _WRAPPERS:
            name = name.replace(part, "")
        plain[name.replace(".base_layer.", ".").replace(".default.", ".")] = value
    heads = Counter(n.removesuffix(own) for n in plain for own in start if n == own or n.endswith(f".{own}"))
    prefix = heads.most_common(1)[0][0] if heads else "base_model.model."
    plain = {name.removeprefix(prefix): value for name, value in plain.items() if value.is_floating_point()}
    return {
        name: value
        for name, value in plain.items()
        if (name in start and value.shape == start[name].shape) or _of_adapter(name)
    }


def _of_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _pieces_joined(sets: list[WrittenSet], start: Mapping[str, Tensor]) -> list[WrittenSet]:
    """Files of one folder that hold different parameters, and together more than each, are one set."""
    parts = [s for s in sets if s.form == "model" and not s.whole and "[" not in s.name]
    names = [name for one in parts for name in one.state]
    if len(parts) < 2 or len(names) != len(set(names)):
        return sets
    first = parts[0]
    state = {name: value for one in parts for name, value in one.state.items()}
    joined = replace(first, name=", ".join(one.name for one in parts), state=state, time=max(one.time for one in parts))
    return [*(one for one in sets if one not in parts), joined]


def _claims(sets: list[WrittenSet]) -> list[WrittenSet]:
    """The sets, each with what its name claims; numbers are compared with those of names that are alike else."""
    numbers = {one.name: _number(one.name) for one in sets}
    highest: dict[str, int] = {}
    for family, number in (found for found in numbers.values() if found is not None):
        highest[family] = max(number, highest.get(family, -1))
    result = []
    for one in sets:
        words, claim, numbered = set(re.findall("[a-z]+", one.name.lower())), "last", numbers[one.name]
        if words & _AVERAGES:
            claim = "average"
        elif words & _OTHERS:
            claim = "other"
        elif numbered is not None and numbered[1] < highest[numbered[0]]:
            claim = "earlier"
        elif numbered is not None and numbered[1] != 1:
            claim = "numbered"  # every case of a program takes one step
        result.append(replace(one, claim=claim))
    return result


def _number(name: str) -> tuple[str, int] | None:
    """The last number of a checkpoint's name, and the name without numbers; None: there is none."""
    plain = re.sub(r"[-_.]?\d+[-_]of[-_]\d+", "", name.lower())
    numbers = re.findall(_NUMBER, plain)
    return (re.sub(_NUMBER, "#", plain), int(numbers[-1])) if numbers else None


def nothing_written(written: Written, out: Path) -> str:
    """Why there is no set of weights to judge."""
    kinds = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
    reasons = [*(f"{one.name}: an adapter without adapter_config.json" for one in written.sets), *written.left_out]
    left = f"; {'; '.join(reasons[:3])}" if reasons else ""
    return f"no model ({kinds}) was written below {{out}} ({out.name}){left}"


def _stamp(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino
