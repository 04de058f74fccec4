"""Names that become files and folders stay inside their folder, and files that a user names are read or refused."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from thence.cli import main
from thence.compare.recipe import load_comparison
from thence.errors import RecipeError, UserError
from thence.evaluate.origin import short_name
from thence.evaluate.store import Settings
from thence.evaluate.suites import load_suite
from thence.names import LONGEST, as_name, bad_name, same_file
from thence.recipe import load_recipe

MODEL = {"path": "some/model"}
BAD = ["", ".", "..", "../x", "../../x", "/etc/x", "a/b", "a\\b", "a\0b", "a\nb", "x" * 300, " a", "a ", ".a", "-a"]
BAD += ["\x1b[2J", "a:b", "a*", "\ud800", "\u202eabc", "~", "$HOME"]


def folder_names(name: str) -> dict[str, Any]:
    """Every way in which a user's name becomes a file or folder."""
    arms = {"base": {}, "sft": {"kind": "sft"}}
    comparison = {"reference": "base", "seeds": [1], "bases": {"b": {"path": "m"}}, "arms": arms}
    task = {"name": "t", "source": "x"}
    settings = {"model": "m", "suite": "s", "tasks": {"t": task}}
    recipe = {"model": MODEL, "stages": ["eval"]}
    return {
        "run": lambda: load_recipe({**recipe, "name": name}),
        "stage": lambda: load_recipe({"model": MODEL, "stages": [f"sft-{name}" if name else ""]}),
        "split": lambda: load_recipe({**recipe, "eval": {"splits": {name: {}}}}),
        "split that names a test set": lambda: load_recipe({**recipe, "eval": {"data": {"split": name}}}),
        "comparison": lambda: load_comparison({**comparison, "name": name}),
        "arm": lambda: load_comparison({**comparison, "arms": {**arms, name: {}}}),
        "base": lambda: load_comparison({**comparison, "bases": {name: {"path": "m"}}}),
        "suite": lambda: Settings.model_validate({**settings, "suite": name}),
        "task": lambda: Settings.model_validate({**settings, "tasks": {name: task}}),
    }


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_name_that_leaves_its_folder_or_names_no_file_is_refused(name: str) -> None:
    assert bad_name(name)
    for what, build in folder_names(name).items():
        if what == "stage" and name in (".", "-a", ".a", " a"):
            continue  # `sft-.a` is a fine name
        with pytest.raises((UserError, ValueError)) as caught:
            build()
        if what not in ("suite", "task"):
            assert isinstance(caught.value, UserError), what
            assert caught.value.remedy
            assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["a", "A-1", "in-distribution", "größe", "a.b", "lr=1e-4", "模型", "x" * LONGEST])
def test_good_names_are_taken(name: str) -> None:
    assert bad_name(name) is None
    for what, build in folder_names(name).items():
        if what == "stage" and len(name) > LONGEST - 4:
            continue
        if what != "task" or name.isascii():
            build()


def test_names_of_suites_and_tasks_in_files_are_held_to_the_rule(tmp_path: Path) -> None:
    file = tmp_path / "own suite (1).toml"
    file.write_text('[[tasks]]\nname = "t"\nsource = "x"\n')
    assert load_suite(str(file)).name == "own-suite-1"
    for text in ('name = "../../x"\n[[tasks]]\nname = "t"\nsource = "x"\n', '[[tasks]]\nname = "../t"\nsource = "x"\n'):
        file.write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_suite(str(file))
        assert caught.value.file == str(file)
        assert "name" in str(caught.value.field)


def test_names_that_differ_in_capitals_alone_are_refused() -> None:
    arms = {"base": {}, "Base": {}}
    comparison = {"reference": "base", "seeds": [1], "bases": {"b": {"path": "m"}}, "arms": arms}
    for build in (
        lambda: load_recipe({"model": MODEL, "stages": ["sft-a", "sft-A"]}),
        lambda: load_recipe({"model": MODEL, "stages": ["eval"], "eval": {"splits": {"a": {}, "A": {}}}}),
        lambda: load_comparison(comparison),
    ):
        with pytest.raises(UserError, match="share a f"):
            build()
    assert same_file(["straße", "STRASSE"])
    assert same_file(["a", "b"]) is None


def test_names_made_of_model_names_are_names_and_long_ones_differ() -> None:
    long = [f"owner/{'x' * 300}{end}" for end in "ab"]
    for text in ("../../x", "/", "a b", "..", "\x1b[2J", "", "模型", *long, "owner/model", "run:sft"):
        assert bad_name(short_name(text)) is None, text
        assert bad_name(as_name(text)) is None, text
    assert short_name(long[0]) != short_name(long[1])


def test_a_hub_split_without_a_file_name_can_still_be_measured_under_a_name() -> None:
    tables = {"model": MODEL, "stages": ["eval"], "eval": {"data": {"split": "test[:100]"}}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(tables)
    assert "splits" in caught.value.remedy
    tables["eval"] = {"splits": {"mine": {"split": "test[:100]"}}}
    assert load_recipe(tables).stage("eval")


# Files that a user names.


def contents() -> dict[str, tuple[bytes, int | None]]:
    good = 'name = "ä"\nseed = 1\n'
    return {
        "UTF-16": (good.encode("utf-16"), 1),
        "Latin-1": (b"seed = 1\n" + good.encode("latin-1"), 2),
        "binary": (b"\x7fELF\x02\x01\x01\x00\x00", 1),
        "NUL": (b"seed = 1\n\x00", 2),
        "deep lists": (b"x = " + b"[" * 10_000, None),
        "deep names": (b"a." * 200_000 + b"a = 1", 1),
        "deep tables": (b"[" + b"a." * 100_000 + b"a]", 1),
        "long number": (b"seed = " + b"9" * 5000, None),
        "huge": (b"# " + b"x" * 5_000_000, None),
        "no TOML": (b"seed = 1\nseed = = 2\n", 2),
    }


@pytest.mark.parametrize("what", contents())
@pytest.mark.parametrize("load", [load_recipe, load_comparison, lambda path: load_suite(str(path))])
def test_a_file_that_is_no_readable_toml_is_named(what: str, load: Any, tmp_path: Path) -> None:
    content, line = contents()[what]
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load(file)
    assert time.monotonic() - started < 2
    assert caught.value.file == str(file)
    assert caught.value.line == line or line is None
    assert file.read_bytes() == content


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b'\xef\xbb\xbfname = "mine"\nstages = ["sft"]\n[model]\npath = "m"\n')
    assert load_recipe(file).name == "mine"


@pytest.mark.parametrize("load", [load_recipe, load_comparison, lambda path: load_suite(str(path))])
def test_what_is_no_file_is_refused_and_not_waited_for(load: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    for path in (tmp_path / "pipe.toml", tmp_path / "folder.toml", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(RecipeError, match="is no file"):
            load(path)
    for path in (tmp_path / "nothing.toml", tmp_path / ("x" * 300), tmp_path / "folder.toml" / "x.toml", Path("a\0b")):
        with pytest.raises(UserError):
            load(path)


@pytest.mark.parametrize("where", ["file", "file/below", "link", "a\0b", "x" * 300])
def test_a_folder_that_can_be_none_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    folder = str(tmp_path / where)
    with pytest.raises(RecipeError, match="folder"):
        load_recipe({"model": MODEL, "folder": folder}).run_folder()
    arms = {"reference": "base", "seeds": [1], "bases": {"b": {"path": "m"}}, "arms": {"base": {}}}
    with pytest.raises(RecipeError, match="folder"):
        load_comparison({**arms, "folder": folder}).path()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_data_that_are_no_file_are_refused(kind: str, tmp_path: Path) -> None:
    from thence.data.readers import read_examples

    path = tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError) as caught:
        read_examples([str(path)])
    assert caught.value.file == str(path)


# Models.


@pytest.mark.parametrize(
    "path", [3, True, 1.5, "", " ", "a\0b", "https://huggingface.co/x/y", ["a"], "a\nb", "x" * 5000]
)
@pytest.mark.parametrize("field", ["path", "tokenizer", "gguf_file"])
def test_what_is_no_name_of_a_model_is_refused(path: Any, field: str) -> None:
    if field == "gguf_file" and path == "https://huggingface.co/x/y":
        return
    with pytest.raises(RecipeError, match=f"model.{field}"):
        load_recipe({"model": {**MODEL, field: path}})


NOWHERE = ["3", "1e5", "true", "nan", ".x", "a/b/c", "a b", "package:no.such", "package:", "package:json.x"]
NOWHERE += ["package:os"]
NOWHERE += ["world:", "world:no", "world:.", "world:../bases/chain-rich", "package:../x", "/no/such", "x" * 4000]


@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: path[:30])
def test_a_model_that_can_be_nowhere_is_refused_at_once(path: str, tmp_path: Path, monkeypatch: Any) -> None:
    from thence.train.model import resolve

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thence.train.places._is_reachable", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(UserError) as caught:
        resolve(path)
    assert caught.value.field == "model.path"
    (tmp_path / "3").mkdir()
    assert resolve("3") == "3"


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: Any) -> None:
    from thence.train.model import resolve

    monkeypatch.setattr("thence.train.places._is_reachable", lambda: False)
    with pytest.raises(RecipeError, match="cannot be reached"):
        resolve("no-such-owner/no-such-model")


def test_a_hub_that_did_not_answer_is_not_held_against_a_later_run_that_is_offline(monkeypatch: Any) -> None:
    import huggingface_hub

    from thence.train import places
    from thence.train.model import resolve

    places._answers.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match="cannot be reached"):
        resolve("nobody/absent-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("nobody/absent-model") == "nobody/absent-model"


INIT = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 10**9}, {"num_hidden_layers": 10**6}, {"hidden_size": 90_000, "intermediate_size": 10**7},
        {"hidden_size": -8}, {"hidden_size": "8x"}, {"num_attention_heads": 0}, {"model_type": "no-such"},
        {"model_type": 3}, {"vocab_size": 10**8, "hidden_size": 10**6, "num_attention_heads": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_random_start_of_absurd_sizes_is_refused_before_memory_is_asked_for(changed: dict[str, Any]) -> None:
    import torch

    from thence.recipe import Model
    from thence.train.model import load_model

    settings = Model(init={**INIT, **changed}, tokenizer="world:chain/rich")
    with pytest.raises(RecipeError) as caught:
        load_model(settings, torch.device("cpu"))
    assert "model.init" in str(caught.value.field)


# Chat templates.

BOMBS = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a product": '{{ "a" * 10**11 }}',
    "a power": "{{ 10**(10**8) }}",
    "doubled": "{% set n = namespace(t='aaaa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "long text": '{{ "a" * 10**8 }}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_does_not_end_is_stopped(bomb: str, tmp_path: Path, monkeypatch: Any) -> None:
    from thence.data import template
    from thence.recipe import Model
    from thence.train.model import load_tokenizer

    monkeypatch.setattr(template, "LONGEST_RENDERING", 0.5)
    monkeypatch.setattr(template, "MOST_MEMORY", 512 * 2**20)
    tokenizer = load_tokenizer(Model(path="world:chain/rich"))
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + BOMBS[bomb])
    started = time.monotonic()
    with pytest.raises(UserError, match="chat template") as caught:
        template.chat_format(tokenizer, str(file))
    assert caught.value.field == "data.template"
    assert time.monotonic() - started < 20


def test_limits_are_as_before_afterwards_and_other_alarms_still_come() -> None:
    import resource
    import signal

    from thence.data.bounded import TookTooLong, bounded

    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: came.append(number))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TookTooLong), bounded(0.05, 2**30):
            while True:
                pass
        with bounded(1, 2**30):
            pass
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
        time.sleep(0.5)
        assert came == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    said: list[str] = []

    def elsewhere() -> None:
        with bounded(1, 2**30):
            said.append("done")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == ["done"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "Latin-1", "nothing"])
def test_a_template_that_is_no_text_file_is_refused(kind: str, tmp_path: Path) -> None:
    from thence.data.template import chat_format
    from thence.recipe import Model
    from thence.train.model import load_tokenizer

    path = tmp_path / "template.jinja"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "Latin-1":
        path.write_bytes("ä{{ messages }}".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        chat_format(load_tokenizer(Model(path="world:chain/rich")), str(path))
    assert caught.value.field == "data.template"


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "quickstart", "--name", "../../x"],
        ["run", "quickstart", "--folder", "/etc/passwd"],
        ["run", "quickstart", "--model.path", "package:no.such"],
        ["run", "quickstart", "--model.path", "3"],
        ["check", "package:no.such"],
        ["eval", "package:no.such", "--suite", "embedded", "--limit", "1"],
        ["eval", "world:chain/rich", "--suite", "/dev/zero"],
        ["run", "/dev/zero"],
        ["compare", "/dev/zero"],
    ],
    ids=" ".join,
)
def test_commands_refuse_and_write_nothing(argv: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) in (1, 2)
    said = capsys.readouterr()
    assert "remedy" in said.err + said.out
    assert "Traceback" not in said.err


def test_a_list_of_stages_without_brackets_is_recognised():
    with pytest.raises(RecipeError, match=r"""a list is written --stages '\["sft", "eval"\]'"""):
        load_recipe({"model": {"path": "m"}}, {"stages": "sft,eval"})


def test_the_path_of_a_model_takes_the_place_of_random_weights():
    made = {"init": {"model_type": "llama"}, "tokenizer": "world:chain"}
    assert load_recipe({"model": made}, {"model.path": "m"}).model.path == "m"


@pytest.mark.parametrize("command", [["check"], ["eval", "--suite", "gsm8k"]])
def test_an_address_is_no_model(command, capsys):
    assert main([command[0], "https://huggingface.co/x", *command[1:]]) == 2
    assert "download it, and give the path or the hub name" in capsys.readouterr().err
