"""Every exception becomes a message with a remedy and an exit code; nothing ends with 0 unless the work was done."""

import errno
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

import thence.cli
from thence.cli import main
from thence.compare import worker
from thence.errors import UserError
from thence.explain import AGAIN, explained, foreign_exit, told
from thence.files import write_atomically
from thence.train.checkpoint import checkpoints, newest_checkpoint, write_checkpoint


def raised(act) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "not permitted"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EMFILE, "open files"),
        (errno.ENFILE, "open files"),
        (errno.ENOENT, "no such file"),
        (errno.EIO, "failed to read or write"),
        (errno.EISDIR, "a folder, where a file"),
        (errno.ENOTDIR, "a file, where a folder"),
        (errno.ELOOP, "circle"),
        (errno.ESTALE, "network drive"),
        (errno.ENOMEM, "out of memory"),
        (errno.EFBIG, "so large"),
        (errno.EADDRINUSE, "port is in use"),
        (errno.EPIPE, "connection broke off"),
        (errno.EDOM, os.strerror(errno.EDOM)),
    ],
)
def test_an_error_of_the_system_names_the_file_and_a_remedy(number, words):
    said = explained(OSError(number, os.strerror(number), "some/file"))
    assert said is not None
    assert words in said.problem
    assert said.file == "some/file"
    assert said.remedy


def test_a_write_that_fails_names_its_file_though_the_system_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    said = explained(raised(lambda: write_atomically(tmp_path / "numbers.json", "{}")))
    assert said is not None
    assert "numbers.json" in (said.file or "")
    assert "disk is full" in said.problem
    assert list(tmp_path.iterdir()) == [], "the space of what could not be finished is given back"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "out of mem"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU is out of memory"),
        (UnicodeDecodeError("utf-8", b"a\nb\xff", 3, 4, "invalid start byte"), "not UTF-8 text: byte 0xff"),
        (json.JSONDecodeError("Expecting value", "{\n?", 2), "not valid JSON"),
        (zipfile.BadZipFile("not a zip file"), "damaged"),
        (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn"), "flash_attn cannot be imported"),
        (ValueError("embedded null byte"), "NUL"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (ConnectionResetError("reset by peer"), "connection broke off"),
        (Exception("Error while serializing: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("unable to write: No space left on device"), "the disk is full"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_libraries_are_explained(error, words):
    said = explained(error)
    assert said is not None
    assert words in str(said)
    assert said.remedy


class Answer(BaseModel):
    value: int


def of_thence(text: str, **names: object) -> Callable[[], object]:
    """An expression as a module of thence runs it, with these local names."""
    module = {"__name__": "thence.reading", "Answer": Answer, "sys": sys, "json": json}
    exec(f"def act({', '.join(names)}):\n    {text}", module)
    act: Any = module["act"]
    return lambda: act(*names.values())


@pytest.mark.parametrize("text", ["raise EOFError('ran out of input')", "Answer(value='x')"])
def test_only_a_file_that_was_read_is_called_damaged(text, tmp_path):
    file = tmp_path / "kept.bin"
    file.write_text("x")
    said = explained(raised(of_thence(text, path=file)))
    assert said is not None
    assert said.file == str(file)
    assert "put back a whole copy" in said.remedy
    assert explained(raised(of_thence(text, folder=tmp_path))) is None
    assert explained(raised(of_thence(text, file=sys.stdin))) is None


def _ends() -> None:
    raise EOFError


@pytest.mark.parametrize("own", [lambda: Answer.model_validate({"value": "x"}), lambda: json.loads("no"), _ends])
def test_an_error_in_code_of_the_user_is_not_called_a_damaged_file(own, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("x")
    assert explained(raised(of_thence("return function()", function=own, path=file))) is None


def test_only_what_nobody_foresaw_is_left():
    for error in (KeyError("x"), TypeError("bad operand"), AssertionError(), RuntimeError("shapes do not match")):
        assert explained(error) is None
    assert explained(UserError("a", remedy="b")) is not None
    assert told(KeyError("x")) == "KeyError: 'x'"
    assert "remedy" in told(MemoryError())


def test_the_line_of_a_decoding_error_is_counted():
    said = explained(raised(lambda: b"a\nb\nc\xff".decode()))
    assert said is not None
    assert said.line == 3


def command(monkeypatch, act) -> None:
    monkeypatch.setattr(thence.cli, "_command", lambda _: act)


def raising(error):
    def act(_):
        raise error

    return act


def test_a_fault_of_ours_says_so_and_keeps_the_traceback(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    command(monkeypatch, raising(KeyError("abc token=Zq7hunter2Zq7")))
    assert main(["run", "x"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "a fault of thence" in said
    assert "THENCE_TRACEBACK=1" in said
    kept = Path(re.search(r"traceback is in (\S+?);?\n", said)[1])  # type: ignore[index]
    assert "KeyError" in kept.read_text()
    assert "Zq7" not in said + kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("error", [KeyError("abc"), OSError(errno.EIO, "x", "f"), UserError("p", remedy="r")], ids=repr)
def test_the_traceback_is_shown_to_who_asks(error, monkeypatch, capfd):
    monkeypatch.setenv("THENCE_TRACEBACK", "1")
    command(monkeypatch, raising(error))
    assert main(["run", "x"]) == (2 if isinstance(error, UserError) else 1)
    assert "Traceback (most recent call last)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("p", remedy="r"), 2, "thence: p\n  remedy: r"),
        (OSError(errno.ENOSPC, "No space left", "runs/a"), 1, "thence: runs/a: the disk is full"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
        (SystemExit(0), 1, "called sys.exit(0)"),
        (SystemExit(None), 1, "called sys.exit()"),
        (SystemExit("bye"), 1, "called sys.exit('bye')"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "a connection broke off"),
    ],
    ids=repr,
)
def test_every_end_has_its_code_and_its_words(error, code, words, monkeypatch, capfd):
    command(monkeypatch, raising(error))
    assert main(["run", "x"]) == code
    said = capfd.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_foreign_code_that_exits_is_named():
    scope = {}
    exec(compile("import sys\ndef reward(): sys.exit(0)", "their_reward.py", "exec"), scope)
    said = foreign_exit(raised(scope["reward"]))  # type: ignore[arg-type]
    assert said.problem.startswith("their_reward.py:2 called sys.exit(0)")
    assert said.remedy.endswith(AGAIN)


@pytest.mark.parametrize("arguments", [["eval", "--help"], ["audit", "--help"], ["doctor", "--help"]])
def test_help_ends_with_0_and_nonsense_with_2(arguments, capfd):
    assert main(arguments) == 0
    assert "Usage: thence" in capfd.readouterr().out
    assert main([arguments[0], "--no-such-flag"]) == 2
    assert "no such flag: --no-such-flag" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "quickstart", "--folder", "FILE"],
        ["run", "quickstart", "--folder", "FILE/x"],
        ["eval", "world:chain/rich", "--suite", "ROWS", "--grader", "math", "--folder", "FILE"],
        ["eval", "world:chain/rich", "--suite", "ROWS", "--grader", "math", "--folder", "FILE/x"],
        ["compare", "quick", "--folder", "FILE"],
        ["compare", "quick", "--folder", "FILE/x", "--report"],
        ["report", "FILE"],
        ["sample", "FILE"],
        ["audit", "FILE"],
        ["doctor", "--python", "FILE"],
        ["doctor", "--python", "FOLDER"],
        ["check", "FILE"],
        ["check", "FOLDER"],
        ["run", "FOLDER"],
        ["eval", "m", "--suite", "FOLDER"],
        ["run", "LONG"],
        ["eval", "LONG", "--suite", "LONG"],
        ["report", "LONG"],
        ["check", "LONG"],
        ["run", "quickstart", "--folder", "LONG"],
        ["compare", "LONG"],
        ["report", "a\0b"],
        ["sample", "a\0b"],
        ["run", "a\0b"],
        ["compare", "a\0b"],
        ["eval", "a\0b", "--suite", "embedded"],
        ["run", "quickstart", "--folder", "a\0b"],
    ],
    ids=lambda arguments: " ".join(arguments).replace("\0", "NUL"),
)
def test_a_path_that_cannot_be_is_refused_with_a_remedy(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    names = {"FILE": "file", "FOLDER": "folder", "LONG": "x" * 5000, "ROWS": "rows.jsonl"}
    for name, path in names.items():
        arguments = [word.replace(name, path) for word in arguments]
    assert main(arguments) in (1, 2)
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert "fault of thence" not in said.err
    assert "remedy:" in said.err + said.out
    assert (tmp_path / "file").read_text() == "kept"


def test_a_rank_whose_neighbour_died_says_so():
    for text in (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        "NCCL error: remote",
    ):
        said = explained(RuntimeError(text))
        assert said is not None
        assert "lost each other" in said.problem


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SystemExit(0), "called sys.exit(0)"),
        (OSError(errno.ENOSPC, "x", "f"), "f: the disk is full"),
        (MemoryError(), "out of memory"),
        (KeyError("k"), "KeyError: 'k'"),
        (UserError("p", remedy="r"), "p\n  remedy: r"),
    ],
    ids=repr,
)
def test_a_worker_of_a_comparison_explains_its_end(error, words, monkeypatch, capfd):
    class Told:
        last: dict | None = None

        def tell(self, **message):
            self.last = message

    def run(*_, **__):
        raise error

    monkeypatch.setattr("thence.pipeline.run.run", run)
    told_by = Told()
    worker._work({"stages": []}, told_by, None)  # type: ignore[arg-type]
    assert words in (told_by.last or {})["failed"]


@pytest.mark.parametrize("flag", ["--json", "--html", "--junit"])
@pytest.mark.parametrize("place", ["nowhere/a", "folder"])
def test_an_audit_whose_files_cannot_be_written_is_refused_before_it_runs(flag, place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    begun = []
    monkeypatch.setattr("thence.audit.run.stack.audit_stack", lambda *_, **__: begun.append(1))
    assert main(["audit", "thence", flag, place]) == 2
    assert f"{place}: {flag}" in capfd.readouterr().err
    assert not begun


def test_a_checkpoint_that_the_disk_has_no_room_for_costs_no_other(tiny_model, tmp_path, monkeypatch):
    class NoTokenizer:
        def save_pretrained(self, folder):
            pass

    model = tiny_model(torch.float32)
    write_checkpoint(tmp_path, 1, model, NoTokenizer(), {}, {"m": torch.ones(2)})
    for name in ("save_file", "flush"):
        with monkeypatch.context() as patched:
            patched.setattr(f"thence.train.checkpoint.{name}", no_space)
            error = raised(lambda: write_checkpoint(tmp_path, 2, model, NoTokenizer(), {}, {"m": torch.ones(2)}))
        said = explained(error)
        assert said is not None
        assert "the disk is full" in said.problem
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 1
    assert checkpoints(tmp_path)
