"""RoPE with scaling in GGUF: the keys and the tensor that llama.cpp reads, written and read.

`linear` and `yarn` are keys. Llama 3's is a tensor, `rope_freqs.weight`: what each frequency is divided by. Three keys
of thence's own keep the numbers that it was computed from; Llama 3.1 to 3.3 have the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thence.errors import UserError

FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_OWN = "thence.rope."
_USUAL: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "partial_rotary_factor": 1.0}
_COMPUTED = ("mscale", "mscale_all_dim", "attention_factor")
_CLOSE = 1e-5
_OTHERWISE = "export a Hugging Face folder, and use llama.cpp's converter"


def check_rope(config: Any, source: Path) -> None:
    """Refuse a RoPE that is not written here. Raises UserError."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    wrong = None
    if kind not in ("default", "linear", "llama3", "yarn"):
        wrong = f"RoPE scaling {kind!r} is not written"
    for name, usual in _USUAL.items():
        if rope.get(name) not in (None, usual):
            wrong = f"RoPE with {name} = {rope[name]:g} is not written"
    if kind == "yarn" and (name := next((name for name in _COMPUTED if rope.get(name) is not None), None)):
        wrong = f"RoPE scaling 'yarn' with {name} is not written"
    if kind == "yarn" and rope.get("factor") is None:
        wrong = "RoPE scaling 'yarn' without a factor is not written"
    if wrong:
        raise UserError(wrong, remedy=_OTHERWISE, file=source)


def write_rope(gguf: Any, writer: Any, config: Any) -> Tensor | None:
    """Write the keys of a model's RoPE. Returns the tensor :data:`FREQUENCIES`, one number a frequency, or None."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    if kind != "llama3":
        return None
    for name in _LLAMA3:
        writer.add_float32(_OWN + name, float(rope[name]))
    return divisors(config, rope)


def divisors(config: Any, rope: Mapping[str, Any]) -> Tensor:
    """What Llama 3's RoPE divides each frequency by: (head / 2,), float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](_with(config, rope), torch.device("cpu"))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
    return (plain / scaled).float()


def _with(config: Any, rope: Mapping[str, Any]) -> Any:
    changed = type(config).from_dict(config.to_dict())
    changed.rope_parameters = dict(rope)
    return changed


def rope_as_said(config: Any, said: Mapping[str, Any], tensor: Tensor | None, file: Path) -> None:
    """Give a configuration that transformers made of a GGUF file the RoPE scaling of the file, which it passes over.

    Args:
        said: the file's metadata.
        tensor: the file's tensor :data:`FREQUENCIES`.

    Raises:
        UserError: a scaling that is not read here.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        return  # no RoPE, or transformers has read its scaling
    if "rope_theta" not in rope:  # a table for each kind of layer
        return
    at = f"{said.get('general.architecture')}.rope.scaling."
    kind, factor = said.get(f"{at}type", "none"), said.get(f"{at}factor")
    unread = [key.removeprefix(at) for key in said if key.startswith(at) and key.removeprefix(at) not in _READ]
    if kind not in ("none", "linear", "yarn") or (kind != "none" and unread):
        raise _unread(f"RoPE scaling {kind!r}" + (f" with {', '.join(unread)}" if unread else ""), file)
    if tensor is not None:
        config.rope_parameters = _llama3(config, rope, said, tensor, file)
    elif kind == "linear" and factor not in (None, 0.0, 1.0):
        config.rope_parameters = {**rope, "rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        before = said.get(f"{at}original_context_length")
        if not factor or not before:
            raise _unread("RoPE scaling 'yarn' without factor and original_context_length", file)
        scaled = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(before)}
        config.rope_parameters = {**rope, **scaled}


_READ = ("type", "factor", "original_context_length", "finetuned")


def _llama3(config: Any, rope: Mapping[str, Any], said: Mapping[str, Any], tensor: Tensor, file: Path) -> Any:
    kept = {name: said.get(_OWN + name, usual) for name, usual in _LLAMA3.items()}
    kept["original_max_position_embeddings"] = int(kept["original_max_position_embeddings"])
    found = {**rope, "rope_type": "llama3", "factor": round(float(tensor.max()), 4), **kept}
    again = divisors(config, found)
    if again.shape != tensor.shape or not torch.allclose(again, tensor, rtol=_CLOSE, atol=0):
        raise _unread(f"the tensor {FREQUENCIES}, which is not that of Llama 3.1 to 3.3,", file)
    return found


def _unread(what: str, file: Path) -> UserError:
    return UserError(
        f"{what} is not read from a GGUF file",
        remedy="give the model as a Hugging Face folder",
        file=file,
        field="model.gguf_file",
    )
