"""The ways into the audit: your own step, any program, pytest, and the command line with its files."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from thence.audit import audit_stack, check, random_rows
from thence.audit.run.program import allowed_cases, audit_program, placeholders
from thence.audit.run.runner import load_adapter
from thence.cli import main
from thence.errors import UserError

PROGRAM = Path(__file__).parent / "audit_program.py"
WORDS = [
    sys.executable, str(PROGRAM), "--model", "{model}", "--data", "{data}", "--out", "{out}",
    "--micro-batch", "{micro_batch}", "--accumulation", "{accumulation}",
]  # fmt: skip


def own_step(model: Any, rows: list[dict[str, list[int]]], micro_batch: int, accumulation: int) -> None:
    """AdamW over padded micro-batches, each with its own mean: the fault that people write."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, len(rows), micro_batch):
        micro = rows[start : start + micro_batch]
        longest = max(len(row["input_ids"]) for row in micro)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in micro])
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in micro])
        (model(input_ids=ids, labels=labels).loss / accumulation).backward()
    optimizer.step()


def counted_step(model: Any, rows: list[dict[str, list[int]]], micro_batch: int, accumulation: int) -> None:
    """The same, with sums over one count of tokens, and plain SGD of learning rate 0.5."""
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        target = torch.tensor(row["labels"][1:])
        (torch.nn.functional.cross_entropy(logits, target, reduction="sum") / tokens).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad


def test_check_names_the_fault_of_a_step_of_ones_own(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(torch.float32)
    before = [p.clone() for p in model.parameters()]
    report = check(own_step, model=model)
    assert report.verdict.outcome == "finding"
    assert report.verdict.objective == "micro-batch-mean"
    assert "mean of micro-batch means" in str(report)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the model was changed"


def test_check_passes_a_right_step_and_knows_its_scale(tiny_model: Callable[..., Any]) -> None:
    report = check(counted_step, model=tiny_model(torch.float32), lr=0.5)
    assert report.ok and report.verdict.exit_code == 0
    assert all(s.scale == pytest.approx(1, abs=1e-3) for c in report.cases for s in c.steps)
    half = check(counted_step, model=tiny_model(torch.float32), lr=0.25)
    assert half.verdict.outcome == "finding", "the learning rate is not the one that was said"


def test_check_of_a_step_without_a_cut_says_what_it_cannot_tell_apart(tiny_model: Callable[..., Any]) -> None:
    def plain(model: Any, rows: list[dict[str, list[int]]]) -> None:
        counted_step(model, rows, 1, 1)

    report = check(plain, model=tiny_model(torch.float32), lr=0.5)
    assert report.ok
    assert "mean of micro-batch means" in report.not_told_apart[0]
    assert "takes no micro_batch" in report.not_told_apart[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adamw_with_its_usual_weight_decay_and_unused_rows_is_judged(kind: str, tiny_model: Callable[..., Any]) -> None:
    """Rows of the vocabulary and positions that no example uses only decay; they must not hide the signs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "initializer_range": 0.2, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))

    def right(model: Any, rows: list[dict[str, list[int]]], micro_batch: int, accumulation: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = sum(label != -100 for row in rows for label in row["labels"])
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            target = torch.tensor(row["labels"][1:])
            (torch.nn.functional.cross_entropy(logits, target, reduction="sum") / tokens).backward()
        optimizer.step()

    report = check(right, model=model)
    assert report.ok, str(report)


def test_a_bfloat16_model_is_judged_with_the_tolerance_of_bfloat16(tiny_model: Callable[..., Any]) -> None:
    report = check(counted_step, model=tiny_model(torch.float32).bfloat16())
    assert report.ok, str(report)


def test_check_of_a_step_that_raises_cannot_judge(tiny_model: Callable[..., Any]) -> None:
    def broken(model: Any, rows: Any) -> None:
        raise ValueError("no such column")

    report = check(broken, model=tiny_model(torch.float32))
    assert report.verdict.exit_code == 2
    assert "no such column" in report.verdict.sentences[1]


def test_rows_without_labels_are_refused_by_number(tiny_model: Callable[..., Any]) -> None:
    rows = random_rows(40)
    bad = [*rows[:2], {"input_ids": [1, 2]}]
    with pytest.raises(UserError, match="row 2 has no labels"):
        check(counted_step, model=tiny_model(torch.float32), batch=bad)


def test_every_family_of_model_is_judged(tiny_model: Callable[..., Any]) -> None:
    for kind in ("qwen3", "gpt2"):
        assert check(counted_step, model=tiny_model(torch.float32, kind), lr=0.5).ok, kind


@pytest.mark.everything
@pytest.mark.slow
def test_a_program_with_adamw_and_clipping_is_judged_from_outside(tmp_path: Path) -> None:
    right = audit_program(WORDS, only=["micro 2 x 4"])
    assert right.ok, str(right)
    assert any("no other set claims to be the trained model" in line for line in right.not_verified), str(right)
    wrong = audit_program([*WORDS, "--loss", "means"], only=["micro 2 x 4", "micro 8 x 1"])
    assert wrong.verdict.objective == "micro-batch-mean"
    failed = audit_program([*WORDS, "--fail"], only=["micro 2 x 4"])
    assert failed.verdict.exit_code == 2
    assert "the disk of this trainer is full" in failed.cases[0].reason


def test_placeholders_that_a_program_lacks_narrow_the_matrix() -> None:
    have = placeholders(WORDS)
    cases, reasons = allowed_cases(have, "token-mean", quick=False)
    assert any("ranks" in reason for reason in reasons)
    assert all(reason for case, reason in cases if case.ranks > 1)
    fewer = placeholders([w for w in WORDS if "micro" not in w and "accumulation" not in w])
    cases, reasons = allowed_cases(fewer, "token-mean", quick=False)
    assert [case.name for case, reason in cases if not reason] == ["as the program cuts it"]
    assert any("{micro_batch}" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "{model}", "{data}"], r"no \{out\}"),
        (["train", "{model}", "{data}", "{out}", "{batchsize}"], "batchsize"),
        (["train", "{model}", "{data}", "{out}", "{"], "'{'"),
    ],
)
def test_wrong_placeholders_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        placeholders(words)


def test_the_command_line_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "no-such-stack"]) == 2
    assert "trl-sft" in capsys.readouterr().err
    assert main(["audit", "command"]) == 2
    assert "no program" in capsys.readouterr().err
    assert main(["audit", "transformers", "--python", "/nowhere/python", "--quick"]) == 2
    assert "--python" in capsys.readouterr().err


def test_an_unknown_objective_case_or_model_type_is_refused_with_those_that_there_are(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no objective 'token_mean'.*\n.*token-mean, sequence-mean"):
        check(counted_step, model=tiny_model(torch.float32), asked="token_mean")
    with pytest.raises(UserError, match=r"no objective 'mean'"):
        audit_program(WORDS, asked="mean")
    with pytest.raises(UserError, match=r"no case has 'micro 9'.*\n.*'micro 8 x 1'"):
        audit_program(WORDS, only=["micro 9"])
    with pytest.raises(UserError, match=r"no case has 'micro 9'"):
        audit_stack("thence", only=["micro 9"])
    with pytest.raises(UserError, match=r"no causal language model of type 'lama'.*\n.*'llama'"):
        audit_program(WORDS, model_type="lama")
    adapter = tmp_path / "mine.py"
    case = {"name": "a", "micro_batch": 8, "accumulation": 1, "asked": "mean"}
    adapter.write_text(f"STACK, PACKAGES, AXES, CASES = 'mine', (), (), ({case!r},)\n")
    with pytest.raises(UserError, match=r"no objective 'mean'"):
        audit_stack(str(adapter))
    adapter.write_text("STACK, PACKAGES, AXES, CASES = 'mine', (), ('rank',), ()\n")
    with pytest.raises(UserError, match=r"unknown axis 'rank'.*\n.*ranks, incomplete"):
        load_adapter(str(adapter))


ADAPTER = """
import os, time
STACK, PACKAGES, AXES = "torch", ("torch",), frozenset()
CASES = tuple(
    {"name": what, "micro_batch": 8, "accumulation": 1, "options": {"do": what}}
    for what in ("skip", "raise", "exit", "hang", "train")
)

def prepare():
    import transformers

def run(case, session):
    import torch
    from transformers import AutoModelForCausalLM
    what = case["options"].get("do")
    if what == "skip":
        session.skip("this version has no such thing")
    if what == "raise":
        raise ValueError("the disk is full")
    if what == "exit":
        os._exit(3)
    if what == "hang":
        time.sleep(600)
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
"""


@pytest.mark.everything
@pytest.mark.slow
def test_a_case_that_fails_crashes_or_hangs_costs_no_other(tmp_path: Path) -> None:
    """A stack's process that dies or never answers is started again for the cases that are left."""
    path = tmp_path / "my_stack.py"
    path.write_text(ADAPTER)
    report = audit_stack(str(path), only=["skip", "raise", "exit", "hang", "train"], seconds=20.0)
    found = {case.case.name: (case.status, case.reason) for case in report.cases}
    assert found["train"] == ("judged", "")
    assert found["skip"] == ("skipped", "this version has no such thing")
    assert found["raise"] == ("failed", "ValueError: the disk is full")
    assert found["exit"][0] == "failed" and "ended" in found["exit"][1]
    assert found["hang"][0] == "failed" and "20 s" in found["hang"][1]
    assert report.verdict.outcome == "cannot judge", "three cases failed: what they do is not known"
    assert "'raise'" in report.verdict.sentences[1]


@pytest.mark.slow
def test_the_audit_of_thence_itself_passes_and_writes_its_files(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html", "xml")}
    code = main(
        ["audit", "thence", "--quick", "--quiet", "--json", str(files["json"]), "--html", str(files["html"]),
         "--junit", str(files["xml"])]
    )  # fmt: skip
    report = json.loads(files["json"].read_text())
    assert code == 0, report["verdict"]
    assert report["verdict"]["outcome"] == "no finding"
    assert all(case["status"] == "judged" for case in report["cases"])
    assert "<html" in files["html"].read_text()
    suite = ElementTree.parse(files["xml"]).getroot()
    assert int(next(suite.iter("testsuite")).get("failures", "1")) == 0


@pytest.mark.slow
def test_the_pytest_plugin_shows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from tests.tiny_model import make_tiny_model
from tests.audit.test_ways import counted_step, own_step

def test_right(audit_token_mean):
    audit_token_mean(counted_step, model=make_tiny_model(torch.float32), lr=0.5)

def test_wrong(audit_token_mean):
    audit_token_mean(own_step, model=make_tiny_model(torch.float32))

def test_asked(audit_objective):
    audit_objective(own_step, "micro-batch-mean", model=make_tiny_model(torch.float32))
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert "2 passed" in done.stdout and "1 failed" in done.stdout, done.stdout
    assert "mean of micro-batch means" in done.stdout
    assert "test_wrong" in done.stdout


def test_an_adapter_may_import_the_file_beside_it(tmp_path: Path) -> None:
    for folder, axis in (("a", "ranks"), ("b", "packing")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside.py").write_text(f"AXES = {{{axis!r}}}\n")
        text = "from .beside import AXES\nSTACK, PACKAGES, CASES = 'mine', (), ()\n"
        (tmp_path / folder / "my.adapter.py").write_text(text)
        assert load_adapter(str(tmp_path / folder / "my.adapter.py")).axes == {axis}
