"""A checkpoint as a model in the Hugging Face layout, whoever wrote it: one process, or ranks that wrote their parts.

The weights are read into a model on the host that is built from the checkpoint's own configuration, so one copy of
them is held. transformers gives them their published names when it saves them. No bit of a weight changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thence.errors import DamagedFile, UserError
from thence.files import read_json
from thence.recipe import Model
from thence.train.checkpoint import MANIFEST, checkpoints, damaged_file, manifest_of, publish, removed_on_failure
from thence.train.model import empty_model
from thence.train.model_files import check_files
from thence.train.state import load_weights, stored, types_of
from thence.train.weights import fill, first_names, named_parts

STATE = "state.json"
_OF_WEIGHTS = (".safetensors", ".safetensors.index.json")
_WRITTEN_ANEW = (STATE, "config.json", "generation_config.json")


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    Args:
        folder: where it is.
        parameters: how many it has.
        dtypes: the types of its parameters.
        bytes: of all its files.
    """

    folder: Path
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


def export(source: Path, folder: Path, *, trust_remote_code: bool = False) -> Exported:
    """Make a folder that ``AutoModelForCausalLM.from_pretrained`` opens. It is whole or not there.

    Args:
        source: a checkpoint of thence, or a model that a stage has published, which is copied.
        folder: not there yet, or empty.
        trust_remote_code: run Python code that the model ships, where it ships some.

    Raises:
        UserError: the folder holds files; the source is no checkpoint; its architecture is not known here.
        DamagedFile: a file of the source is not as it was written.
        CheckpointError: the weights are not those of the model that the configuration describes.
    """
    place = check_free(folder)
    check_source(source)
    if (source / STATE).is_file() and any(".lora_A." in name for name in stored(source)):
        raise UserError(
            "the checkpoint holds adapters (LoRA) alone, and not the model under them",
            remedy=f"merge them into it: thence merge {source} FOLDER",
            file=source,
        )
    settings = Model(path=str(source), trust_remote_code=trust_remote_code)
    check_files(settings)
    temporary = place.with_name(f".{place.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with removed_on_failure(temporary):
        temporary.mkdir(parents=True)
        if (source / STATE).is_file():
            _write(opened(source, settings), source, temporary)
        else:
            for name in manifest_of(source) or ():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, temporary / name)
        found = measured_model(temporary, place)
        publish(temporary, place)
    return found


def check_free(folder: Path) -> Path:
    """Where a folder will be. Raises UserError where something is there already, or nothing can be written."""
    place = folder.expanduser().absolute()
    if place.is_symlink() or (place.exists() and not place.is_dir()) or (place.is_dir() and any(place.iterdir())):
        raise UserError(
            "it is there, and is not an empty folder", remedy="give a folder that is not there", file=folder
        )
    return place


def check_source(source: Path) -> None:
    """Make sure that a folder is a checkpoint or a model of thence, and as it was written.

    Raises:
        UserError: it is neither.
        DamagedFile: a file has changed, or is gone.
    """
    parts = [path.name for path in source.glob("*.safetensors")] if source.is_dir() else []
    if not ((source / MANIFEST).is_file() or (parts and (source / STATE).is_file())):
        raise UserError(
            "no checkpoint or model of thence",
            remedy="give a run, RUN:STAGE, or a folder stages/NAME/checkpoints/step-NNNNNN of a run",
            file=source,
        )
    damaged = damaged_file(source)
    if damaged is None:
        return
    others = [path for path in checkpoints(source.parent) if path != source]
    raise DamagedFile(
        f"this file of the checkpoint is {'not as it was written' if damaged.exists() else 'not there any more'}",
        remedy=f"export another checkpoint: {others[-1]}" if others else "put the file back from a copy",
        file=damaged,
    )


def opened(source: Path, settings: Model) -> Any:
    """The model of a checkpoint, on the host, with weights of the types that the files hold.

    Raises:
        UserError: no such architecture.
        CheckpointError: names or shapes are not those of the model.
    """
    model = empty_model(settings)
    fill(model, _room(model, types_of(source)))
    load_weights(model, source)
    return model


def _room(model: nn.Module, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Memory for every weight of a model on the meta device, by its first name."""
    known = {owner: types[name] for name, owner in first_names(model).items() if name in types} | dict(types)
    return {name: torch.empty(part.shape, dtype=known.get(name, part.dtype)) for name, part in named_parts(model)}


def _write(model: Any, source: Path, folder: Path) -> None:
    stops = read_json(source / STATE, remedy="export another checkpoint").get("stops")
    if model.can_generate():
        if (source / "generation_config.json").is_file():
            model.generation_config = type(model.generation_config).from_pretrained(source)
        if stops:  # as `thence run` does when it publishes a model
            model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)
    for name in manifest_of(source) or ():
        if not name.endswith(_OF_WEIGHTS) and name not in _WRITTEN_ANEW:  # the tokenizer, and code of the model
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def measured_model(folder: Path, final: Path) -> Exported:
    """What the weights of a folder are, as the model that is, or will be, at ``final``."""
    from safetensors import safe_open

    parameters, types = 0, set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:  # pyright: ignore[reportGeneralTypeIssues]
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                kept = tensors.get_slice(name)
                parameters += torch.Size(kept.get_shape()).numel()
                types.add(kept.get_dtype())
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Exported(final, parameters, tuple(sorted(types)), sum(sizes))
