"""An adapter in peft's layout, whoever trained it, merged into its model: a plain Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from thence.errors import UserError, first_line
from thence.files import read_json
from thence.models.probing import largest_difference, probe_tokens, tolerance
from thence.recipe import Model
from thence.train.checkpoint import publish, removed_on_failure
from thence.train.export import check_free
from thence.train.lora import load_peft
from thence.train.model import Loaded, load_model, save_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def merge(adapter: Path, folder: Path, base: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """Merge a LoRA adapter into its model. The folder is whole or not there, its weights are float32 (or float64).

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        folder: not there yet, or empty.
        base: the model that the adapter belongs to; default: the one that its configuration names.
        trust_remote_code: run Python code that the model ships, where it ships some.

    Returns:
        The folder.

    Raises:
        UserError: peft is missing, no such adapter or base, an adapter of another kind or of another model, or a merged
            model that gives other logits than the adapted one.
    """
    place, peft = check_free(folder), load_peft()
    said, tensors = _read(adapter)
    if said.get("peft_type") != "LORA":
        raise UserError(
            f"the adapter is of the kind {said.get('peft_type')!r}", remedy="give a LoRA adapter", file=adapter
        )
    base = base or said.get("base_model_name_or_path") or None
    if base is None:
        raise UserError(
            "the adapter does not say which model it belongs to",
            remedy="name it: --base MODEL",
            file=adapter,
            field="base",
        )
    double = any(value.dtype == torch.float64 for value in tensors.values())
    settings = Model(path=base, compute_dtype="float64" if double else "float32", trust_remote_code=trust_remote_code)
    loaded = load_model(settings, torch.device("cpu"))
    try:
        adapted = peft.PeftModel.from_pretrained(loaded.model, str(adapter), autocast_adapter_dtype=False).eval()
        taken = peft.get_peft_model_state_dict(adapted)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _misfit(adapter, base, first_line(error)) from error
    name = next(
        (n for n in {*tensors, *taken} if n not in tensors or n not in taken or not _same(tensors[n], taken[n])), None
    )
    if name is not None:
        raise _misfit(adapter, base, f"{name} has no place in it" if name in tensors else f"it lacks {name}")
    token_ids = probe_tokens(loaded.model, 12)[None]
    with torch.no_grad():
        expected = adapted(input_ids=token_ids, use_cache=False).logits
        merged: Any = adapted.merge_and_unload(safe_merge=True)
        found = merged(input_ids=token_ids, use_cache=False).logits
    if largest_difference(found, expected) > 10 * tolerance(found.dtype, found.device):
        raise UserError(
            f"merged into {base}, the adapter gives other logits than beside it",
            remedy="use it as an adapter: it changes a weight that the model uses twice",
            file=adapter,
        )
    return write_plain(Loaded(merged, loaded.tokenizer, base), place)


def write_plain(loaded: Loaded, place: Path) -> Path:
    """Write a model and its tokenizer as a folder that is whole or not there."""
    temporary = place.with_name(f".{place.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with removed_on_failure(temporary):
        temporary.mkdir(parents=True)
        save_model(loaded.model, loaded.tokenizer, temporary)
        publish(temporary, place)
    return place


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in peft's layout."""
    return (folder / CONFIG).is_file()


def _read(adapter: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    remedy = f"give a folder with {CONFIG} and {TENSORS}, as peft writes them"
    try:
        return read_json(adapter / CONFIG, remedy=remedy), load_file(adapter / TENSORS)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("it holds no adapter", remedy=remedy, file=adapter) from None
    except Exception as error:  # safetensors raises an exception of its own
        if isinstance(error, UserError):
            raise
        raise UserError(f"the adapter cannot be read: {first_line(error)}", remedy=remedy, file=adapter) from error


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _misfit(adapter: Path, base: str, why: str) -> UserError:
    return UserError(
        f"the adapter is not one of {base}: {why}",
        remedy="name the model that it was trained on: --base MODEL",
        file=adapter,
    )
