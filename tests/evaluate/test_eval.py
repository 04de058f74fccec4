"""`thence eval` on the command line: native sampling, contexts, browsing, mistakes, and the model of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluate.counting import Counting, run, settings_of
from thence.cli import main
from thence.errors import UserError
from thence.evaluate.backends import room_for
from thence.evaluate.store import Store


def test_an_error_of_a_grader_names_the_flag(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "e", settings_of(data), Counting())
    assert main(["eval", "--regrade", str(tmp_path / "e"), "--grader", "mth"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("thence: --grader: ")
    assert "reward:" not in said


@given(prompt=st.integers(1, 5000), limit=st.integers(1, 5000), context=st.none() | st.integers(1, 5000))
def test_room_stays_in_the_context_and_wastes_less_than_a_step(prompt: int, limit: int, context: int | None) -> None:
    room = room_for(prompt, limit, context)
    assert 0 <= room <= limit
    if context is None:
        assert room == limit
    else:
        assert room == 0 if prompt >= context else prompt + room <= context
        assert room > min(limit, max(0, context - prompt)) - 64


def test_native_sampling_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["eval", "world:chain/rich", "--suite", "embedded", "--tasks", "chain-test", "--limit", "6"]
    assert main([*common, "--samples", "2", "--folder", "all"]) == 0
    assert main([*common, "--samples", "2", "--rows", "3"]) == 0  # into evals/embedded-world-chain-rich
    assert "chain-test" in capsys.readouterr().out
    one, other = Store(Path("all")), Store(Path("evals/embedded-world-chain-rich"))
    texts = [{s.place: s.text for s in store.samples("chain-test")} for store in (one, other)]
    assert len(texts[0]) == 12 and texts[0] == texts[1]
    assert len(one.environment()["weights"]) == 16
    assert all((one.folder / name).is_file() for name in ("results.json", "results.csv", "report.html"))
    assert main(["eval", "--compare", "all", "embedded-world-chain-rich"]) == 0
    assert "+0.0" in capsys.readouterr().out
    assert main(["eval", "--regrade", "all", "--grader", "exact"]) == 0
    assert len(one.grades("chain-test")) == 24


def test_short_contexts_are_counted_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from thence.evaluate import native_backend

    monkeypatch.setattr(native_backend, "context_of", lambda config: 20)
    arguments = ["--suite", "embedded", "--tasks", "chain-test", "--limit", "6", "--folder", str(tmp_path / "e")]
    assert main(["eval", "world:chain/rich", *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "6 of 6 prompts leave fewer than max_tokens = 160" in out
    assert "left less than the limit of tokens for 6 responses" in out
    samples = Store(tmp_path / "e").samples("chain-test")
    assert all(s.tokens is not None and s.room is not None and s.tokens <= s.room < 20 for s in samples)


def test_a_prompt_beyond_the_context_is_not_answered_instead_of_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from thence.evaluate import native_backend

    monkeypatch.setattr(native_backend, "context_of", lambda config: 40)
    questions = ["1+1?", "2+2?", *(f"{i}" * 60 for i in range(6))]  # more than the refusals that stop it
    rows = [json.dumps({"question": text, "answer": str(i)}) for i, text in enumerate(questions)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    arguments = ["--suite", str(tmp_path / "sums.jsonl"), "--grader", "exact", "--max-tokens", "4", "--samples", "1"]
    assert main(["eval", "world:chain/rich", *arguments, "--folder", str(tmp_path / "e")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "6 problems were not answered" in said
    store = Store(tmp_path / "e")
    assert len(store.samples("sums")) == 2
    refused = store.refusals("sums").values()
    assert {one.kind for one in refused} == {"too long"}
    assert all("tokens, the model's context 40" in one.reason for one in refused)


def test_browsing_an_evaluation(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting(right=lambda r: r.sample > 0))
    folder = str(store.folder)
    assert main(["sample", folder, "--verdict", "wrong", "--n", "20"]) == 0
    assert capsys.readouterr().out.count(" wrong ") == 6
    key = store.samples("sums")[0].problem
    assert main(["sample", folder, "--task", "sums", "--problem", key[:6], "--n", "20"]) == 0
    out = capsys.readouterr().out
    assert out.count("0+0=?") == 3 and key in out
    assert main(["sample", folder, "--task", "nothing"]) == 2
    assert "tasks: sums" in capsys.readouterr().err
    assert main(["sample", folder, "--stage", "rl"]) == 2


def test_ctrl_c_on_the_command_line_exits_with_130_and_names_the_folder(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from thence.evaluate import native_backend

    monkeypatch.setattr(native_backend, "NativeBackend", lambda *_: Counting(stop_after=4))
    arguments = ["--suite", str(data), "--folder", str(tmp_path / "e"), "--grader", "exact"]
    assert main(["eval", "m", *arguments]) == 130
    assert str(tmp_path / "e") in capsys.readouterr().err
    assert len(Store(tmp_path / "e").samples("sums")) == 4


def test_mistakes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    assert main(["eval", "m"]) == 2
    assert "--suite" in capsys.readouterr().err
    assert main(["eval", "m", "--suite", "gsm8k", "--backend", "endpoint"]) == 2
    assert "--endpoint" in capsys.readouterr().err
    assert main(["eval", "--compare", str(tmp_path), "nothing"]) == 2
    assert "no evaluation here" in capsys.readouterr().err
    assert main(["eval", "m", "--suite", "gsm8k", "--data", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "--data" in message and "thence[datasets]" in message


def test_the_model_of_a_run(tmp_path: Path) -> None:
    from thence.evaluate.origin import find_model, short_name
    from thence.recipe import load_recipe
    from thence.toml import to_toml

    (tmp_path / "recipe.toml").write_text(to_toml(load_recipe("quickstart").resolved()))
    with pytest.raises(UserError, match="no trained model yet"):
        find_model(str(tmp_path))
    for stage in ("sft", "rl"):
        (tmp_path / "stages" / stage / "model").mkdir(parents=True)
    assert find_model(str(tmp_path))[1] == "rl"
    model, stage = find_model(f"{tmp_path}:sft")
    assert (model.path, stage) == (str(tmp_path / "stages" / "sft" / "model"), "sft")
    assert find_model(f"{tmp_path}:base")[0].path == "world:chain/rich"
    with pytest.raises(UserError, match="has no model"):
        find_model(f"{tmp_path}:eval")
    assert find_model("world:chain/rich") == (find_model("world:chain/rich")[0], None)
    assert find_model("package:p/q.gguf")[0].gguf_file == "q.gguf"
    assert [short_name(n) for n in ("a/b/c", "world:chain/rich", "package:p_q")] == ["b-c", "world-chain-rich", "p_q"]


def test_listing_and_help_import_no_torch() -> None:
    code = "import sys; from thence.cli import main; main(['eval', '--list']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "paper-id" in done.stdout
