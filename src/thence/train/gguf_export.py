"""A Hugging Face folder as one GGUF file, as llama.cpp reads it, read back and compared before it counts as written.

Names, metadata and types are those of the package gguf. The rows of Llama's query and key matrices are reordered for
llama.cpp's rotary embedding. What this module does not know how to write, or what is read back otherwise, is refused.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from thence.errors import UserError
from thence.recipe import Model
from thence.train.checkpoint import removed_on_failure
from thence.train.gguf_cut import PROBES, find_cut, merges_decide
from thence.train.gguf_rope import FREQUENCIES, check_rope, write_rope
from thence.train.model import load_model, load_tokenizer

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
ARCHITECTURES = ("llama", "qwen2", "qwen3")
TEXTS = (
    "Hello world",
    "What is 12 + 7*(3-1)?\n\nIt's 26!",
    "  naïve café — 数学 1234567",
    "def f(x):\n\treturn x\n",
    *PROBES,
)
"""What both tokenizers must cut into the same tokens."""
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
    window = getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)
    biased = config.model_type == "llama" and (config.attention_bias or getattr(config, "mlp_bias", False))
    wrong = None
    if config.model_type not in ARCHITECTURES:
        wrong = f"the architecture {config.model_type!r} cannot be verified as GGUF; {', '.join(ARCHITECTURES)} can"
    elif window or biased:
        wrong = "a sliding window is not written" if window else "biases of Llama are not written"
    if wrong:
        raise UserError(wrong, remedy="export a Hugging Face folder, and use llama.cpp's converter", file=source)
    check_rope(config, source)


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
    writer.add_rope_dimension_count(head)
    frequencies = write_rope(gguf, writer, config)
    writer.add_vocab_size(config.vocab_size)
    types = gguf.LlamaFileType
    writer.add_file_type(
        {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}[kind]
    )
    _write_tokenizer(gguf, writer, tokenizer, config, source)
    if frequencies is not None:
        writer.add_tensor(FREQUENCIES, frequencies.numpy(), raw_dtype=gguf.GGMLQuantizationType.F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
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
    pre = _check_tokenizer(kept, tokenizer.backend_tokenizer, source)
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


def _check_tokenizer(kept: Mapping[str, Any], backend: Any, source: Path) -> str:
    """llama.cpp's name of how a tokenizer cuts text. Raises UserError where llama.cpp would give other tokens."""
    remedy = "export a Hugging Face folder, and use llama.cpp's converter"
    kind, name = kept["model"]["type"], None
    changed = (kept.get("normalizer") or {"type": "NFC"})["type"]
    if kind in ("WordLevel", "WordPiece"):
        problem = f"llama.cpp has no tokenizer of this kind: {kind}"
        remedy = "export a Hugging Face folder, which transformers opens"
    elif kind != "BPE" or kept["model"].get("byte_fallback") or (name := find_cut(backend)) is None:
        problem = (
            "the tokenizer is none that is known to llama.cpp by a name here: byte-level BPE that cuts text as "
            "SmolLM2, GPT-2, Qwen2 or Llama 3 does"
        )
    elif changed != "NFC":  # which Qwen has, and llama.cpp's converter passes over too
        problem = f"the tokenizer changes text before it cuts it ({changed}), and llama.cpp does not"
    elif not merges_decide(kept, name):
        problem = "the tokenizer and llama.cpp look up whole words in different ways, and would give other tokens"
    else:
        return name
    raise UserError(problem, remedy=remedy, file=source)


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
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS):  # Qwen's does so, and llama.cpp does not
        if tokenizer(text).input_ids != theirs(text).input_ids:
            raise _differs(f"the tokens of {text!r}", file)
    turns, theirs_turns = model.model.rotary_emb, again.model.rotary_emb
    same = turns.attention_scaling == theirs_turns.attention_scaling
    if not (same and torch.allclose(turns.inv_freq, theirs_turns.inv_freq, rtol=1e-6, atol=0)):
        raise _differs("RoPE's frequencies", file)
    model.load_state_dict(dict(rounded), strict=False)
    ids = torch.tensor([[i * 7 % model.config.vocab_size for i in range(1, 65)]])
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
