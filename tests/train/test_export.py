"""A checkpoint becomes a Hugging Face folder: the same bits under the published names, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.tiny_models import tiny_model
from thence.data.worlds.vocabulary import save_tokenizer
from thence.errors import CheckpointError, DamagedFile, UserError
from thence.train.checkpoint import write_checkpoint, write_parts_checkpoint
from thence.train.export import export
from thence.train.model import save_model
from thence.train.parallel import SingleProcess

KINDS = ["llama", "mixtral", "qwen3_moe", "gemma3_text", "gpt2"]
STOPS = [3, 1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def checkpoint(folder: Path, model: Any, tokenizer: Any, ways: str, step: int = 4) -> Path:
    moments = {"main/some.weight/exp_avg": torch.ones(3)}
    given = (folder, step, model, tokenizer, {"trainer": {}, "stops": STOPS}, moments)
    return write_checkpoint(*given) if ways == "whole" else write_parts_checkpoint(*given, SingleProcess())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ways", ["whole", "parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_has_the_bytes_of_a_published_model(kind: str, ways: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(kind)
    source = checkpoint(tmp_path / "run", model, tokenizer, ways)
    model.generation_config.eos_token_id = STOPS
    save_model(model, tokenizer, tmp_path / "published")
    made = export(source, tmp_path / "exported")
    published, exported = contents(tmp_path / "published"), contents(tmp_path / "exported")
    exported.pop("manifest.json")
    assert exported.keys() == published.keys()
    assert [name for name in published if published[name] != exported[name]] == []
    assert made.dtypes == ("F32",) and made.bytes == sum(map(len, published.values()))


@pytest.mark.parametrize("ways", ["whole", "parts"])
def test_transformers_opens_it_with_the_same_weights_and_logits(ways: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    export(checkpoint(tmp_path / "run", model, tokenizer, ways), tmp_path / "exported")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    for (name, expected), value in zip(model.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(expected, value), name
    ids = torch.arange(9)[None]
    assert torch.equal(found(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").get_vocab() == tokenizer.get_vocab()
    names = {name for file in (tmp_path / "exported").glob("*.safetensors") for name in load_file(file)}
    assert any(name.endswith("experts.0.w1.weight") for name in names), "the names that others know"


def test_weights_of_float64_and_a_tied_head_stay_what_they_are(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.float64)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        model.get_input_embeddings().weight += 1e-12  # lost in float32
    export(checkpoint(tmp_path / "run", model, tokenizer, "parts"), tmp_path / "exported")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(found.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert found.lm_head.weight.data_ptr() == found.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(gone: bool, tokenizer: Any, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "run", tiny_model("llama"), tokenizer, "parts")
    (file,) = source.glob("*.safetensors")
    if gone:
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(DamagedFile) as refused:
        export(source, tmp_path / "exported")
    assert refused.value.file == str(file)
    assert not (tmp_path / "exported").exists()


def test_a_checkpoint_without_a_manifest_or_with_other_weights_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "run", tiny_model("llama"), tokenizer, "whole")
    manifest = json.loads((source / "manifest.json").read_text())
    (source / "manifest.json").unlink()
    with pytest.raises(DamagedFile) as damaged:
        export(source, tmp_path / "exported")
    assert damaged.value.file == str(source / "manifest.json")
    save_file({"lm_head.weight": torch.ones(2, 2)}, source / "model.safetensors")
    manifest["model.safetensors"] = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        export(source, tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing half written stays"


def test_a_folder_that_holds_something_is_left_alone(tokenizer: Any, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "run", tiny_model("llama"), tokenizer, "whole")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "mine", tmp_path / "file", source):
        with pytest.raises(UserError, match="not an empty folder"):
            export(source, folder)
    assert (tmp_path / "mine" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_killed_or_out_of_disk_while_writing_leaves_no_folder(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "run", tiny_model("llama"), tokenizer, "parts")

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", full)
        export(source, tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    export(source, tmp_path / "exported")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="no checkpoint or model of thence"):
            export(folder, tmp_path / "exported")
