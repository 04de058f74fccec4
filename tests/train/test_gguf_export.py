"""GGUF files: read back by transformers and by the gguf package, and refused where they cannot be verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thence
import thence.train.gguf_export as gguf_export
from tests.recipes import file_recipe
from thence.cli import main
from thence.errors import UserError
from thence.recipe import Model
from thence.train.gguf_cut import make_cut
from thence.train.gguf_export import GgufType, write_gguf
from thence.train.model import load_model

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"qwen2": r"\p{N}", "qwen3": r"\p{N}", "llama": r"\p{N}{1,3}"}


def model_folder(folder: Path, kind: str, digits: str = "", cut: str = "", **changes: Any) -> Path:
    """A random model of two layers with a byte-level BPE tokenizer of its family."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(PATTERN.replace("DIGITS", digits or DIGITS.get(kind, DIGITS["llama"]))), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if cut:
        tokenizer.pre_tokenizer = make_cut(cut)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*gguf_export.TEXTS, "hello hello world 123 456 what is it"] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|begin|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "tie_word_embeddings": kind == "qwen2",
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes)))
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            weight.data += torch.randn_like(weight) * 0.1
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("numbers", ["f32", "f16", "bf16", "q8_0"])
def test_a_file_is_read_back_as_it_was_written(kind: str, numbers: GgufType, tmp_path: Path) -> None:
    import gguf

    source, file = model_folder(tmp_path / "model", kind), tmp_path / "model.gguf"
    made = write_gguf(source, file, numbers)
    assert made.file == file and made.bytes == file.stat().st_size and made.largest < 1e-4
    read = gguf.GGUFReader(str(file))
    assert len(read.tensors) == made.tensors
    types = {tensor.tensor_type.name for tensor in read.tensors if len(tensor.shape) > 1}
    assert types == {numbers.upper()}
    assert bytes(read.fields["tokenizer.chat_template"].parts[-1]).decode().startswith("{% for m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]
    with pytest.raises(UserError, match="there already"):
        write_gguf(source, file, numbers)


def test_weights_that_are_read_back_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_folder(tmp_path / "model", "llama")
    true = gguf_export._rounded

    def wrong(gguf: Any, name: str, weight: torch.Tensor, kind: GgufType) -> Any:
        value, chosen, packed = true(gguf, name, weight, kind)
        return value, chosen, packed[::-1].copy() if "up_proj" in name else packed

    monkeypatch.setattr(gguf_export, "_rounded", wrong)
    with pytest.raises(UserError, match=r"up_proj\.weight are read back"):
        write_gguf(source, tmp_path / "model.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    YARN,
    LLAMA3 | {"original_max_position_embeddings": 8192},
    LLAMA3 | {"original_max_position_embeddings": 64, "high_freq_factor": 2.0},
]


@pytest.mark.parametrize("rope", SCALED, ids=["linear", "yarn", "llama3", "other llama3"])
def test_scaled_rope_is_written_and_read(rope: dict[str, Any], tmp_path: Path) -> None:
    source, file = model_folder(tmp_path / "model", "llama", rope_parameters=rope), tmp_path / "model.gguf"
    write_gguf(source, file, "f32")
    cpu = torch.device("cpu")
    own = load_model(Model(path=str(source)), cpu).model
    read = load_model(Model(path=str(tmp_path), gguf_file="model.gguf"), cpu).model
    assert {name: read.config.rope_parameters[name] for name in rope} == rope
    ids = torch.tensor([[i * 7 % 300 for i in range(120)]])
    with torch.no_grad():
        assert torch.equal(own(ids).logits, read(ids).logits)
        read.model.rotary_emb.inv_freq *= 1.01
        assert not torch.allclose(own(ids).logits, read(ids).logits, atol=1e-4)


def test_rope_that_is_read_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "write_rope", lambda gguf, writer, config: writer.add_rope_freq_base(1e4))
    with pytest.raises(UserError, match="RoPE's frequencies are read back"):
        write_gguf(model_folder(tmp_path / "model", "llama", rope_parameters=YARN), tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize(("kind", "cut"), [("llama", "smollm"), ("llama", "gpt-2"), ("llama", "qwen2")])
def test_every_known_cut_is_written(kind: str, cut: str, tmp_path: Path) -> None:
    import gguf

    write_gguf(model_folder(tmp_path / "model", kind, cut=cut), tmp_path / "model.gguf", "f32")
    fields = gguf.GGUFReader(str(tmp_path / "model.gguf")).fields
    assert fields["tokenizer.ggml.pre"].contents() == cut


def test_the_embedded_world_is_refused_with_what_works_instead(tmp_path: Path) -> None:
    from thence.train.places import find_place

    with pytest.raises(UserError, match="no tokenizer of this kind: WordLevel") as told:
        write_gguf(Path(find_place("world:chain/rich")), tmp_path / "model.gguf", "f32")
    assert told.value.remedy == "export a Hugging Face folder, which transformers opens"


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "scaling 'dynamic'"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "'yarn' with attention_factor is not written"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "RoPE with beta_fast = 16 is not written"),
        ("llama", {"attention_bias": True}, "biases of Llama"),
        ("gpt2", {}, "architecture 'gpt2' cannot be verified"),
        ("llama", {"digits": r"\p{N}{1,2}"}, "the tokenizer is none that is known"),
    ],
)
def test_what_cannot_be_verified_is_refused(kind: str, changes: Any, said: str, tmp_path: Path) -> None:
    source = model_folder(tmp_path / "model", kind, **changes)
    with pytest.raises(UserError, match=said):
        write_gguf(source, tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()


def test_a_refused_run_is_named_by_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {**file_recipe(tmp_path), "stages": ["sft"]}
    del recipe["rl"], recipe["eval"]
    run = thence.run(recipe, progress=False)
    assert main(["export", str(run.folder), str(tmp_path / "mine.gguf"), "--gguf", "f32"]) == 2
    said = capsys.readouterr().err
    assert str(run.folder / "stages/sft/model") in said and ".thence-gguf" not in said


def test_a_run_becomes_a_gguf_file_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gguf

    recipe = file_recipe(tmp_path)
    for table in ("rl", "eval"):
        del recipe[table]
    source = model_folder(tmp_path / "model", "qwen2")
    run = thence.run({**recipe, "stages": ["sft"], "model": {"path": str(source)}}, progress=False)
    file = tmp_path / "out" / "mine.gguf"
    assert main(["export", str(run.folder), str(file), "--gguf", "q8_0"]) == 0
    assert "read back: " in capsys.readouterr().out
    read = gguf.GGUFReader(str(file))
    assert bytes(read.fields["general.name"].parts[-1]).decode() == "mine"
    assert main(["export", str(run.folder), str(file), "--gguf", "q8_0"]) == 2
    assert main(["export", str(run.folder), str(tmp_path / "mine"), "--gguf", "f16"]) == 2
    assert main(["export", str(run.folder), str(tmp_path / "x.gguf"), "--gguf", "q9"]) == 2
    assert [path.name for path in file.parent.iterdir()] == ["mine.gguf"] and not (tmp_path / "x.gguf").exists()
    capsys.readouterr()
    assert main(["export", str(run.folder), str(tmp_path / "merged"), "--merge"]) == 0
    assert capsys.readouterr().out.endswith(f"written: {tmp_path / 'merged'}\n")
    assert "the finished model of stage `sft`" in (tmp_path / "merged" / "README.md").read_text()
    again = tmp_path / "out" / "again.gguf"
    assert (
        main(["export", str(run.folder), str(again), "--gguf", "f16", "--merge", "--push-to-hub", "a/b", "--dry-run"])
        == 0
    )
    said = capsys.readouterr().out
    listed = [line.split()[-1] for line in said.splitlines() if " bytes  " in line]
    assert listed == ["again.gguf", "README.md"] and ".thence-gguf" not in said
