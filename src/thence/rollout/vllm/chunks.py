"""Weights on their way into one running vLLM, some tensors at a time: nobody holds a copy of them all.

vLLM loads a chunk before the next one is made. It reads it from a file in shared memory, or, where trainer and vLLM are
on one GPU, from the trainer's own tensors (CUDA IPC).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from thence.errors import UserError
from thence.rollout.vllm.weights import keeps_names, no_room

CHUNK_BYTES = 2**28


def check_names(model: Any) -> None:
    """Raises UserError: a model whose files have other names than its parameters, so that it cannot go in chunks."""
    if not keeps_names(model):
        raise UserError(
            f"transformers keeps the weights of {type(model).__name__} under other names than its files, and so they "
            "cannot be handed over in chunks",
            remedy="set transfer = files",
            field="vllm.transfer",
        )


def send_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    give: Callable[[dict[str, Any], int], None],
    folder: Callable[[int], Path],
    device: str,
) -> int:
    """Send tensors in chunks, and hold at most `CHUNK_BYTES` and one tensor of them.

    Args:
        tensors: gathered by all ranks together, so that all of them iterate to the end, whatever fails.
        give: sends a chunk and returns when vLLM has loaded it. Takes its message and how many tensors it holds.
        folder: makes a new one for a file of so many bytes; it is removed here.
        device: kind of device that vLLM's model is on.

    Returns:
        How many there are.

    Raises:
        UserError: no room; the policy is on another kind of device than vLLM's model; what ``give`` raises.
    """
    chunks = _Chunks(give, folder, device)
    count = 0
    for name, value in tensors:
        count += 1
        chunks.add(name, value.detach())
    chunks.flush()
    if chunks.failed is not None:
        raise chunks.failed
    return count


class _Chunks:
    """A chunk that is being filled; what fails is kept, and then nothing more is sent."""

    def __init__(self, give: Callable[[dict[str, Any], int], None], folder: Callable[[int], Path], device: str):
        self.give, self.folder, self.device = give, folder, device
        self.failed: Exception | None = None
        self.held: dict[str, Tensor] = {}
        self.bytes = 0

    def add(self, name: str, value: Tensor) -> None:
        if self.failed is not None:
            return
        self.held[name] = value
        self.bytes += value.numel() * value.element_size()
        if self.bytes >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        held, size = self.held, self.bytes
        self.held, self.bytes = {}, 0
        if not held:
            return
        try:
            if self.device == "cpu":
                self._through_a_file(held, size)
            else:
                self.give(on_gpu(held), len(held))
        except Exception as error:  # whatever it is, the other ranks still gather with this one
            self.failed = error

    def _through_a_file(self, held: dict[str, Tensor], size: int) -> None:
        folder = None
        try:
            folder = self.folder(size)
            path = folder / "chunk.safetensors"
            save_file({name: value.cpu().contiguous() for name, value in held.items()}, path)
            self.give({"path": str(path)}, len(held))
        except (OSError, SafetensorError) as error:
            raise no_room(error, folder) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def on_gpu(held: dict[str, Tensor]) -> dict[str, Any]:
    """The message of a chunk that stays on the trainer's GPU; never run on one. Raises UserError: it is on none."""
    device = next(iter(held.values())).device
    if device.type != "cuda":
        raise UserError(
            f"vLLM runs on a GPU and the policy on {device.type}: vLLM cannot read the policy's memory",
            remedy="set transfer = files",
            field="vllm.transfer",
        )
    handles = [[name, cuda_handle(value)] for name, value in held.items()]
    torch.cuda.synchronize(device)
    return {"gpu": str(torch.cuda.get_device_properties(device).uuid), "tensors": handles}


def cuda_handle(value: Tensor) -> list[Any]:
    """What another process needs to see a tensor of this GPU, as plain values."""
    from torch.multiprocessing.reductions import reduce_tensor

    return plain_handle(reduce_tensor(value.detach())[1])


def plain_handle(values: tuple[Any, ...]) -> list[Any]:
    """What `reduce_tensor` gives for a tensor on a GPU, without classes and device, and bytes as hex digits."""
    _, size, stride, start, _, dtype, _, memory, length, begin, _, counter, place, event, waits = values
    return [
        *(list(size), list(stride), start, str(dtype).removeprefix("torch."), memory.hex(), length, begin),
        *(counter.hex(), place, event.hex(), waits),
    ]
