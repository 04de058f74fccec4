"""A model whose files are damaged, or a machine too small for it, is refused with the right words."""

import errno
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from thence.data.example import Message
from thence.data.template import render_text
from thence.errors import RecipeError, UserError
from thence.explain import explained
from thence.recipe import Model
from thence.train.model import load_model, load_tokenizer, resolve


def raised(act) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\x80" * 3000),
        ("model.safetensors", b""),
        ("config.json", b"[1, 2]"),
        ("config.json", b"\xff\xfe{"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("tokenizer.json", b'{"a":'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"3"),
        ("generation_config.json", b'{"eos_token_id": '),
        ("generation_config.json", b"\xff"),
        ("generation_config.json", b"[]"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:20],
)
def test_a_damaged_file_of_a_model_is_refused(file, content, tmp_path):
    for path in Path(resolve("world:chain/rich")).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_bytes(content)
    error = raised(lambda: load_model(Model(path=str(tmp_path)), torch.device("cpu")))
    assert isinstance(error, UserError)
    assert error.remedy


def test_a_machine_that_is_out_of_room_is_not_taken_for_a_bad_model(monkeypatch, tmp_path):
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files")):
        monkeypatch.setattr(
            "transformers.AutoConfig.from_pretrained", lambda *_, e=error, **__: (_ for _ in ()).throw(e)
        )
        found = raised(lambda: load_model(Model(path="world:chain/rich"), torch.device("cpu")))
        assert not isinstance(found, RecipeError)
        assert explained(found) is not None


def test_a_model_whose_weights_are_no_numbers_is_refused_as_such(tmp_path):
    for path in Path(resolve("world:chain/rich")).iterdir():
        if path.name != "manifest.json":  # nothing tells that thence wrote it
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    last = sorted(weights)[-1]
    weights[last].view(-1)[7] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    error = raised(lambda: load_model(Model(path=str(tmp_path)), torch.device("cpu")))
    assert isinstance(error, RecipeError)
    assert f"{last} holds NaN" in error.problem


def test_a_chat_template_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("thence.data.template.LONGEST_RENDERING", 0.3)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
    tokenizer = load_tokenizer(Model(path="world:chain/rich"))
    start = time.monotonic()
    error = raised(lambda: render_text(tokenizer, loop, [Message("user", "hello")]))
    assert time.monotonic() - start < 5
    assert isinstance(error, UserError)
    assert error.field == "data.template"
    assert "did not end within 0.3 s" in error.problem
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert render_text(tokenizer, "{{ messages[0].content }}", [Message("user", "hello")]) == "hello"
