"""Handing weights over: safetensors in shared memory, and a short text that both sides read to see them arrived."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thence.errors import UserError
from thence.files import to_json
from thence.rollout.vllm.wire import weight_files

SHARED_MEMORY = Path("/dev/shm")
SPARE = 1.05  # room asked for, for each byte of weights
FILE_BYTES = 2**28
INDEX = "model.safetensors.index.json"
PROBE_TOKENS = 24
# Largest difference of a log-probability of the probe, in nats, that may be rounding. Weights that did not arrive
# differ by more, unless the updates since were tiny; then the version and the number of tensors tell them apart.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.5, "float16": 0.1}


@dataclass(frozen=True)
class Push:
    """What handing over weights has told.

    Attributes:
        version, digest: the stamp that every response sampled with these weights carries. The digest follows from the
            trainer's log-probabilities of the probe.
        seconds: from writing to sampling being possible.
        probe_difference: largest difference of a log-probability of the probe between trainer and vLLM, nats.
    """

    version: int
    digest: str
    seconds: float
    probe_difference: float


@dataclass(frozen=True)
class Probe:
    """A short text, and what the trainer says of it.

    Args:
        token_ids: of the text.
        logps: log-probabilities of all of them but the first, at temperature 1.
        dtype: in which the trainer computed them.
    """

    token_ids: list[int]
    logps: list[float]
    dtype: str = "float32"

    def digest(self, version: int, tensors: int) -> str:
        """16 hex digits that stand for weights: these log-probabilities to the last bit, with version and number."""
        said = repr([version, tensors, self.logps])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def tolerance(self, dtype: str) -> float:
        """Largest difference that may be rounding, where the other side computes in ``dtype``."""
        return max(TOLERANCE[dtype], TOLERANCE.get(self.dtype, 0.0))


def scratch_folders(prefix: str = "thence-vllm-") -> list[Path]:
    """New folders of this user alone, for the caller to remove: in shared memory, where there is any, and on disk."""
    shared = []
    with contextlib.suppress(OSError):
        shared = [Path(tempfile.mkdtemp(prefix=prefix, dir=SHARED_MEMORY))]
    return [*shared, Path(tempfile.mkdtemp(prefix=prefix))]


def folder_for(size: int, folders: list[Path]) -> Path:
    """A new folder in the first of these with room for so many bytes of weights, else in the last."""
    roomy = [folder for folder in folders if shutil.disk_usage(folder).free > SPARE * size]
    return Path(tempfile.mkdtemp(dir=roomy[0] if roomy else folders[-1]))


def write_weights(model: Any, folder: Path) -> None:
    """Write a Hugging Face model's weights under the names that its files have. Raises UserError: no room."""
    try:
        with _no_progress_bar():
            model.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise no_room(error, folder) from error


def keeps_names(model: Any) -> bool:
    """Whether a model's files have its parameters under its own names, each as it is.

    transformers keeps those of some architectures (mixtures of experts, for one) in other names and shapes in memory.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return False
    own = {name: torch.empty_like(value, device="meta") for name, value in model.named_parameters()}
    try:
        written = revert_weight_conversion(model, dict(own))
    except Exception:  # whatever it does with tensors that hold nothing: then it is not known
        return False
    return {name: value.shape for name, value in written.items()} == {name: value.shape for name, value in own.items()}


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path | None) -> int:
    """Write tensors into safetensors files as they come, and hold at most `FILE_BYTES` and one tensor of them.

    Args:
        tensors: gathered by all ranks together, so that all of them iterate to the end, whatever fails.
        folder: None: this rank writes nothing.

    Returns:
        How many there are.

    Raises:
        UserError: no room.
    """
    files = _Files(folder)
    count = 0
    for name, value in tensors:
        count += 1
        files.add(name, value)
    files.end()
    return count


class _Files:
    """Safetensors files of a folder and their index, filled one after the other; what fails is raised at the end."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.failed: Exception | None = None
        self.held: dict[str, Tensor] = {}
        self.places: dict[str, str] = {}
        self.number = self.bytes = 0

    def add(self, name: str, value: Tensor) -> None:
        if self.folder is None or self.failed is not None:
            return
        self.held[name] = value.detach().cpu().contiguous()
        self.bytes += value.numel() * value.element_size()
        if self.bytes >= FILE_BYTES:
            self._write()

    def end(self) -> None:
        """Write the rest. Raises UserError: no room."""
        if self.held:
            self._write()
        if self.folder is not None and self.failed is None:
            index = {"metadata": {}, "weight_map": self.places}
            self._try(lambda folder: (folder / INDEX).write_text(to_json(index)))
        if self.failed is not None:
            raise no_room(self.failed, self.folder) from self.failed

    def _write(self) -> None:
        name, held = f"model-{self.number:05d}.safetensors", self.held
        self._try(lambda folder: save_file(held, folder / name, metadata={"format": "pt"}))
        self.places |= dict.fromkeys(held, name)
        self.held, self.bytes, self.number = {}, 0, self.number + 1

    def _try(self, write: Callable[[Path], object]) -> None:
        try:
            if self.folder is not None:
                write(self.folder)
        except (OSError, SafetensorError) as error:
            self.failed = error


def no_room(error: Exception, folder: Path | None) -> UserError:
    """The error to raise where weights cannot be written for vLLM."""
    return UserError(
        f"the weights cannot be handed over to vLLM: {error}",
        remedy="make room there, or set TMPDIR to a folder with room",
        file=folder,
    )


def tensors_in(folder: Path) -> int:
    """How many tensors a folder's safetensors files hold."""
    count = 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            count += len(list(opened.keys()))
    return count


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
