"""A folder that is no model, or not one that can be opened, is refused by what lies in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thence.errors import DamagedFile, UserError
from thence.recipe import Model
from thence.train.context_length import open_config
from thence.train.model import load_tokenizer

NEW = {"model_type": "made_up_last_week"}
CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
CASES: dict[str, tuple[dict[str, bytes], dict[str, str], str, str]] = {
    "an empty folder": ({}, {}, "holds no config.json", "Hugging Face folder"),
    "a GGUF file that is not named": ({"m.gguf": b"GGUF"}, {}, "holds no config.json", "model.gguf_file = 'm.gguf'"),
    "an adapter": ({"adapter_config.json": b"{}"}, {}, "holds no config.json", "merge it"),
    "a GGUF file that is none": ({"m.gguf": b"PK\x03\x04"}, {"gguf_file": "m.gguf"}, "not a GGUF file", "whole copy"),
    "a GGUF file that is not there": ({}, {"gguf_file": "m.gguf"}, "No such file", "name of a file"),
    "a new architecture": ({"config.json": json.dumps(NEW).encode()}, {}, "'made_up_last_week'", "version"),
    "no architecture": ({"config.json": b"{}"}, {}, "names no model_type", "whole copy"),
    "code of its own": ({"config.json": json.dumps(CODE).encode()}, {}, "Python code", "trust_remote_code = true"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_is_no_model_says_what_it_lacks(name: str, tmp_path: Path) -> None:
    files, fields, problem, remedy = CASES[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    settings = Model.model_validate({"path": str(tmp_path), **fields})
    for open_it in (load_tokenizer, open_config):
        with pytest.raises(UserError) as refused:
            open_it(settings)
        assert problem in refused.value.problem
        assert remedy in refused.value.remedy
        assert str(refused.value.file).startswith(str(tmp_path))
        assert str(refused.value.field).startswith("model.")


def test_a_configuration_cut_short_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type":\n "llama"')
    with pytest.raises(DamagedFile) as refused:
        load_tokenizer(Model(path=str(tmp_path)))
    assert refused.value.line == 2
