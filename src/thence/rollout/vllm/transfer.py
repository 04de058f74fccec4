"""Weights that come in chunks, loaded through vLLM's own weight-transfer API.

`child.py` imports this where vLLM is and thence is not. vLLM's worker calls the engine that is registered here: it
prepares the model, loads chunk by chunk, and finishes. A chunk is a safetensors file in shared memory or, on a GPU,
handles of the trainer's tensors (CUDA IPC).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "thence"


def register() -> dict[str, str]:
    """Make the engine known to vLLM.

    Returns:
        vLLM's `weight_transfer_config` that names it.

    Raises:
        RuntimeError: a vLLM without this API.
    """
    try:
        from vllm.distributed.weight_transfer import (  # pyright: ignore[reportMissingImports]
            WeightTransferEngineFactory,
        )

        WeightTransferEngineFactory.register_engine(NAME, _engine_class())
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"this vLLM cannot take weights in chunks, set transfer = files ({error})") from error
    return {"backend": NAME}


def _engine_class() -> Any:
    from vllm.distributed.weight_transfer import WeightTransferEngine  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.model_loader import reload  # pyright: ignore[reportMissingImports]

    @dataclass
    class Nothing:
        """What the start of a transfer needs."""

    @dataclass
    class Chunk:
        """Args: as the message of a chunk has them."""

        path: str = ""
        gpu: str = ""
        tensors: list[Any] = field(default_factory=list)

    class ChunkEngine(WeightTransferEngine):
        init_info_cls = Nothing
        update_info_cls = Chunk

        def init_transfer_engine(self, init_info: Nothing) -> None:
            pass

        def start_weight_update(self) -> None:
            reload.initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":  # the trainer frees its tensors when it hears that they are taken
                import torch

                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Chunk) -> None:
            chunk = update_info
            found = tensors_in_file(chunk.path) if chunk.path else tensors_on_gpu(chunk.tensors, chunk.gpu, self.device)
            self.model.load_weights(found)

        def finish_weight_update(self) -> None:
            reload.finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    return ChunkEngine


def tensors_in_file(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file, read when asked for."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
            yield name, opened.get_tensor(name)


def tensors_on_gpu(handles: list[Any], gpu: str, device: Any) -> Iterator[tuple[str, Any]]:
    """Copies of another process's tensors on this GPU; never run on one.

    They are copied, since vLLM keeps what came until a layer is complete, and the trainer only until a chunk is taken.

    Raises:
        ValueError: the tensors are on another GPU.
    """
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    own = str(torch.cuda.get_device_properties(device.index).uuid)
    if gpu != own:
        raise ValueError(f"the trainer's weights are on GPU {gpu}, vLLM runs on {own}: set transfer = files")
    for name, handle in handles:
        yield name, rebuild_cuda_tensor(*handle_values(handle, device.index)).clone()


def handle_values(handle: list[Any], index: int) -> tuple[Any, ...]:
    """What `chunks.plain_handle` has made plain, as torch rebuilds a tensor from it, on the device of this number."""
    import torch

    size, stride, start, dtype, memory, length, begin, counter, place, event, waits = handle
    return (
        *(torch.Tensor, torch.Size(size), tuple(stride), start),
        *(torch.storage.TypedStorage, getattr(torch, dtype), index, bytes.fromhex(memory), length, begin),
        *(False, bytes.fromhex(counter), place, bytes.fromhex(event), waits),
    )
