"""Handing weights over: safetensors in shared memory, and a short text that both sides read to see them arrived."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from thence.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
SPARE = 1.05  # room asked for, for each byte of weights
PROBE_TOKENS = 24
# Largest difference of a log-probability of the probe, in nats, that may be rounding. Weights that did not arrive
# differ by more, unless the update was tiny; then the digest is what tells them apart.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.5, "float16": 0.1}


@dataclass(frozen=True)
class Push:
    """What handing over weights has told.

    Attributes:
        version, digest: the stamp that every response sampled with these weights carries.
        seconds: from writing to sampling being possible.
        probe_difference: largest difference of a log-probability of the probe between trainer and vLLM, nats.
    """

    version: int
    digest: str
    seconds: float
    probe_difference: float


@dataclass(frozen=True)
class Handed:
    """Weights that were copied for vLLM, which has not loaded them yet.

    Attributes:
        version: what the trainer calls them.
        folder: where the copy is.
        digest: of the copy.
        probe, logps: a short text, and what the trainer says of it with these weights.
        begin: when the copy was begun, of the monotonic clock.
    """

    version: int
    folder: Path
    digest: str
    probe: list[int]
    logps: list[float]
    begin: float


def scratch_folders(prefix: str = "thence-vllm-") -> list[Path]:
    """New folders of this user alone, for the caller to remove: in shared memory, where there is any, and on disk."""
    shared = []
    with contextlib.suppress(OSError):
        shared = [Path(tempfile.mkdtemp(prefix=prefix, dir=SHARED_MEMORY))]
    return [*shared, Path(tempfile.mkdtemp(prefix=prefix))]


def folder_for(model: Any, folders: list[Path]) -> Path:
    """A new folder in the first of these with room for the model, else in the last."""
    return folder_of_size(sum(p.numel() * p.element_size() for p in model.parameters()), folders)


def folder_of_size(size: int, folders: list[Path]) -> Path:
    """A new folder in the first of these with room for so many bytes of weights, else in the last."""
    roomy = [folder for folder in folders if shutil.disk_usage(folder).free > SPARE * size]
    return Path(tempfile.mkdtemp(dir=roomy[0] if roomy else folders[-1]))


def write_weights(model: Any, folder: Path) -> None:
    """Write a Hugging Face model's weights under the names that its files have. Raises UserError: no room."""
    try:
        with _no_progress_bar():
            model.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the weights cannot be handed over to vLLM: {error}",
            remedy="make room there, or set TMPDIR to a folder with room",
            file=folder,
        ) from error


def probe_ids(vocabulary: int) -> list[int]:
    """Token ids spread over the vocabulary, always the same."""
    return [(7919 * i + 104729) % vocabulary for i in range(min(PROBE_TOKENS, 4 * vocabulary))]


@torch.no_grad()
def probe_logps(model: Any, token_ids: list[int]) -> list[float]:
    """The model's log-probabilities of all tokens but the first, at temperature 1."""
    device = next(model.parameters()).device
    ids_1T = torch.tensor([token_ids], device=device)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits_TV, -1).gather(1, ids_1T[0, 1:, None])[:, 0].tolist()


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
