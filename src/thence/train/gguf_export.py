"""A Hugging Face folder as one GGUF file, as llama.cpp reads it, read back and compared before it counts as written.

Names, metadata and types are those of the package gguf. The rows of Llama's query and key matrices are reordered for
llama.cpp's rotary embedding. What this module does not know how to write, or what is read back otherwise, is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from thence.errors import UserError
from thence.recipe import Model
from thence.train.checkpoint import removed_on_failure
from thence.train.model import load_model, load_tokenizer

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
ARCHITECTURES = ("llama", "qwen2")
TEXTS = ("Hello world", "What is 12 + 7*(3-1)?\n\nIt's 26!", "  naïve café — 数学 1234567", "def f(x):\n\treturn x\n")
"""What both tokenizers must cut into the same tokens."""
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUT_BY = {_CUT.replace("DIGITS", r"\p{N}"): "qwen2", _CUT.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe"}
"""How Qwen2 and Llama 3 cut text before its pieces are looked up -> llama.cpp's name for it."""
_BLOCK = 32  # values that q8_0 keeps together
_CLOSE = 1e-4


@dataclass(frozen=True)
class WrittenGguf:
    """A GGUF file that was read back and holds what it should.

    Args:
        tensors: how many it holds.
        bytes: its size.
        largest: the largest difference of a logit from the model with the same rounded weights.
    """

    file: Path
    tensors: int
    bytes: int
    largest: float


def write_gguf(source: Path, file: Path, kind: GgufType) -> WrittenGguf:
    """Write a model's folder as a GGUF file, and compare what is read back with the model.

    Weights are compared value by value after rounding to the type, tokens on a few texts, logits on a few tokens.
    Norms and biases stay float32, and with q8_0 matrices whose rows are no multiple of 32 values are float16.

    Args:
        source: a folder in the Hugging Face layout.
        file: not there yet.

    Raises:
        UserError: there is such a file; the package gguf is missing; an architecture, tokenizer or setting that cannot
            be written; what was read back is not the model.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf is not installed", remedy='pip install "thence[gguf]"') from None
    if file.exists():
        raise UserError("the file is there already", remedy="give another name", file=file)
    opened = load_model(Model(path=str(source)), torch.device("cpu"))
    model, tokenizer = opened.model.float().eval(), load_tokenizer(Model(path=str(source)))
    _check(model, source)
    written = {name: _rounded(gguf, name, weight, kind) for name, weight in _weights(model).items()}
    folder = file.with_name(f".{file.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    with removed_on_failure(folder):
        folder.mkdir(parents=True)
        temporary = folder / file.name
        _write(gguf, temporary, model, tokenizer, source, written, kind)
        largest = _compare(temporary, model, tokenizer, {name: value for name, (value, _, _) in written.items()})
        temporary.replace(file)
    shutil.rmtree(folder)
    return WrittenGguf(file, len(written), file.stat().st_size, largest)


def _check(model: Any, source: Path) -> None:
    config = model.config
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)
    biased = config.model_type == "llama" and (config.attention_bias or getattr(config, "mlp_bias", False))
    wrong = None
    if config.model_type not in ARCHITECTURES:
        wrong = f"the architecture {config.model_type!r} cannot be verified as GGUF; {', '.join(ARCHITECTURES)} can"
    elif scaling != "default":
        wrong = f"RoPE scaling {scaling!r} is not written"
    elif window or biased:
        wrong = "a sliding window is not written" if window else "biases of Llama are not written"
    if wrong:
        raise UserError(wrong, remedy="export a Hugging Face folder, and use llama.cpp's converter", file=source)


def _weights(model: Any) -> dict[str, Tensor]:
    found = {name: weight.detach() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def _rounded(gguf: Any, name: str, weight: Tensor, kind: GgufType) -> tuple[Tensor, Any, Any]:
    """The value that the file will give back, the type that it is kept in, and its permutation-free numbers."""
    types = gguf.GGMLQuantizationType
    chosen = types.F32 if weight.ndim < 2 else types[kind.upper()]
    if chosen == types.Q8_0 and weight.shape[-1] % _BLOCK:
        chosen = types.F16
    packed = gguf.quants.quantize(weight.numpy(), chosen)
    value = torch.from_numpy(gguf.quants.dequantize(packed, chosen).copy()).reshape(weight.shape)
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"{name} does not fit into {kind}", remedy="choose f32 or bf16")
    return value, chosen, packed


def _write(
    gguf: Any,
    file: Path,
    model: Any,
    tokenizer: Any,
    source: Path,
    written: Mapping[str, tuple[Tensor, Any, Any]],
    kind: GgufType,
) -> None:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(str(file), config.model_type)
    writer.add_name(source.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    types = gguf.LlamaFileType
    writer.add_file_type(
        {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}[kind]
    )
    _write_tokenizer(gguf, writer, tokenizer, config, source)
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config.model_type], config.num_hidden_layers
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, (_, chosen, packed) in written.items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(f"the tensor {name} has no name in GGUF", remedy="use llama.cpp's converter", file=source)
        module = name.split(".")[-2]
        if config.model_type == "llama" and module in heads:  # halves of a head become neighbours, row by row
            rows = packed.shape[0] // heads[module]
            shape = (heads[module], 2, rows // 2, *packed.shape[1:])
            packed = packed.reshape(shape).swapaxes(1, 2).reshape(packed.shape)
        writer.add_tensor(known, packed, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(gguf: Any, writer: Any, tokenizer: Any, config: Any, source: Path) -> None:
    kept = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(kept, config.model_type)
    if kept["model"]["type"] != "BPE" or pre is None:
        raise UserError(
            "the tokenizer is none that is known to llama.cpp by a name here: byte-level BPE of Qwen2 or Llama 3",
            remedy="export a Hugging Face folder, and use llama.cpp's converter",
            file=source,
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    texts, types = [f"[PAD{i}]" for i in range(config.vocab_size)], [gguf.TokenType.UNUSED] * config.vocab_size
    for text, place in kept["model"]["vocab"].items():
        texts[place], types[place] = text, gguf.TokenType.NORMAL
    for added in kept["added_tokens"]:
        texts[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in kept["model"]["merges"]])
    for place, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if place is not None:
            add(place)
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(kept: Mapping[str, Any], architecture: str) -> str | None:
    """llama.cpp's name of how a tokenizer cuts text, known by its whole pattern; None: it is not known here."""
    found = kept.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if len(parts) != 2 or any(parts[1].get(name) != value for name, value in plain.items()):
        return None
    if parts[0].get("type") != "Split" or parts[0].get("behavior") != "Isolated" or parts[0].get("invert"):
        return None
    name = CUT_BY.get(parts[0]["pattern"].get("Regex"))
    return name if name == {"llama": "llama-bpe"}.get(architecture, architecture) else None


def _compare(file: Path, model: Any, tokenizer: Any, rounded: Mapping[str, Tensor]) -> float:
    """The largest difference of a logit. Raises UserError where weights, tokens or logits are not those written."""
    settings = Model(path=str(file.parent), gguf_file=file.name)
    try:
        again, theirs = load_model(settings, torch.device("cpu")).model.float().eval(), load_tokenizer(settings)
    except UserError as error:
        raise _differs(f"model and tokenizer ({error.problem})", file) from error
    found = _weights(again)
    for name, value in rounded.items():
        if name not in found or not torch.equal(found[name], value):
            raise _differs(f"the weights {name}", file)
    for text in TEXTS:
        if tokenizer(text).input_ids != theirs(text).input_ids:
            raise _differs(f"the tokens of {text!r}", file)
    model.load_state_dict(dict(rounded), strict=False)
    ids = torch.tensor([[i * 7 % model.config.vocab_size for i in range(1, 17)]])
    with torch.no_grad():
        expected, got = model(ids).logits, again(ids).logits
    largest = float((expected - got).abs().max())
    if not largest <= _CLOSE * max(1.0, float(expected.abs().max())):
        raise _differs(f"the logits (by {largest:.2g})", file)
    return largest


def _differs(what: str, file: Path) -> UserError:
    return UserError(
        f"{what} are read back from the GGUF file otherwise than they were written, so it is not kept",
        remedy="export a Hugging Face folder, and use llama.cpp's converter",
        file=file,
    )
