"""Checkpoints that are whole or not there: written beside, checked by checksum, renamed into place.

A checkpoint is a folder that transformers opens, with the optimizer's tensors and the plain state beside the weights.
The weights have the names that they have in memory, which are not the published ones for some architectures (experts
of a mixture lie together in memory). safetensors and JSON only; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from thence.errors import CheckpointError

MANIFEST = "manifest.json"
REPLACED = ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: plain state and the optimizer's tensors. Weights are opened from ``folder``."""

    folder: Path
    step: int
    plain: dict[str, Any]
    tensors: dict[str, Tensor]


def write_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    keep: int = 1,
) -> Path:
    """Write ``folder/step-NNNNNN`` atomically and remove all but the ``keep`` newest before it.

    Killed at any moment, the folder holds the earlier checkpoint, the new one, or both; never a part of one.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".writing-{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary, save_original_format=False)
    tokenizer.save_pretrained(temporary)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(contiguous, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **plain}), encoding="utf-8")
    publish(temporary, final)
    # a checkpoint of a later step can only be a damaged one that resuming passed over
    older = [path for path in checkpoints(folder) if path < final]
    later = [path for path in checkpoints(folder) if path > final]
    for superseded in [*older[: len(older) - (keep - 1)], *later]:
        shutil.rmtree(superseded)
    return final


def publish(temporary: Path, final: Path) -> None:
    """Write a manifest of checksums, flush everything to disk and rename the folder into place."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(temporary)): _sha256(path) for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, temporary / MANIFEST, temporary]:
        _flush(path)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; a damaged one is passed over."""
    for replaced in folder.glob(f"{REPLACED}*"):  # killed between the two renames of `publish`
        if not (place := replaced.with_name(replaced.name.removeprefix(REPLACED))).exists():
            replaced.rename(place)
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return Checkpoint(path, plain.pop("step"), plain, load_file(path / "optimizer.safetensors"))
    return None


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest names is there with its checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all(_sha256(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def load_weights(model: Any, folder: Path) -> None:
    """Copy the weights of a checkpoint into the model, bit by bit; every one of the model's must be there.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    own = model.state_dict()
    filled: set[int] = set()
    for shard in sorted(folder.glob("model*.safetensors")):
        for name, value in load_file(shard).items():
            if name not in own or own[name].shape != value.shape:
                raise _misfit(folder, f"{name} of shape {tuple(value.shape)} is none of the model's weights")
            own[name].copy_(value)
            filled.add(own[name].data_ptr())
    # a tied weight is stored once, under one of its names
    missing = [name for name, value in own.items() if value.numel() and value.data_ptr() not in filled]
    if missing:
        raise _misfit(folder, f"it lacks {', '.join(missing[:3])}")


def _misfit(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint does not fit the model: {why}",
        remedy="resume with the version of thence and the model that wrote it, or begin anew with --restart",
        file=folder,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
