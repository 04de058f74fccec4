"""How the processes of a stack start: whichever way its Python is named, and what is said where it does not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from thence.audit.result import Case
from thence.audit.run.runner import StackRun, absolute_python, load_adapter, run_cases
from thence.audit.run.stack import audit_stack
from thence.audit.solve.probe import write_probe
from thence.errors import UserError

ADAPTER = '''
"""A loop."""
STACK = "my-loop"
PACKAGES = ("torch",)
AXES = frozenset({AXES})
CASES = ()


def prepare():
    {PREPARE}


def run(case, session):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(session.model)
    session.watch(model)
    session.parameters(model)
    rows = session.rows()
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        target = torch.tensor(row["labels"][1:])
        (torch.nn.functional.cross_entropy(logits, target, reduction="sum") / tokens).backward()
    torch.optim.SGD(model.parameters(), lr=case["lr"]).step()
    session.stepped(model)
'''


def adapter(folder: Path, prepare: str = "pass", axes: str = "set()") -> Path:
    path = folder / "my_loop.py"
    path.write_text(ADAPTER.replace("{PREPARE}", prepare).replace("{AXES}", axes))
    return path


@pytest.fixture
def linked_python(tmp_path: Path) -> Path:
    """A Python whose name is a link, as that of a virtual environment is."""
    place = tmp_path / "env" / "bin"
    place.mkdir(parents=True)
    (place / "python").symlink_to(sys.executable)
    return place / "python"


def test_a_relative_python_is_found_from_every_folder(
    tmp_path: Path, linked_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_python("env/bin/python") == str(linked_python), "the link itself: it knows its environment"
    assert absolute_python("./env/bin/../bin/python") == str(linked_python)
    assert absolute_python("python3") == "python3"
    with pytest.raises(UserError, match="there is no env/bin/pythom"):
        absolute_python("env/bin/pythom")


@pytest.mark.slow
def test_a_stack_is_audited_by_a_relative_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes run in another folder; once "No such file or directory"."""
    adapter(tmp_path)
    relative = os.path.relpath(sys.executable, tmp_path)
    monkeypatch.chdir(tmp_path)
    report = audit_stack("./my_loop.py", python=relative, only=["micro 8 x 1"])
    assert report.ok, str(report)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_keeps_a_stack_from_starting_is_told(tmp_path: Path, ranks: int) -> None:
    """The exception and the lines before it; a harmless last line does not hide it, and rank 1 of 2 is heard too."""
    only_last = 'import os; os.environ.get("RANK", "0") == str(LAST) and check()'.replace("LAST", str(ranks - 1))
    path = adapter(tmp_path, only_last.replace("check()", "fail()"), '{"ranks"}')
    path.write_text(
        path.read_text()
        + """

def fail():
    import atexit, sys

    atexit.register(lambda: print("cleaning up", file=sys.stderr))
    print("this stack wants libfancy 3", file=sys.stderr)
    raise ImportError("libfancy.so.3: cannot open shared object file")
"""
    )
    probe = write_probe(tmp_path / "probe")
    run = StackRun(load_adapter(str(path)), sys.executable, tmp_path)
    with pytest.raises(UserError) as refused:
        run_cases(run, probe, [Case("case", ranks=ranks)])
    said = str(refused.value)
    assert f"my-loop does not start in {sys.executable}: ImportError: libfancy.so.3" in said.splitlines()[0]
    assert "fail()" in said and "raise ImportError" in said, "the last lines of the traceback"
    assert "--python" in said
