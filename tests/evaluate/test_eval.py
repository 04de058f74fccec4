"""`thence eval`: the store survives crashes and refuses mixtures; tables, exports and pages say what it holds."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import ROOT
from thence.cli import main
from thence.errors import UserError
from thence.evaluate.backends import Generation, Request, room_for
from thence.evaluate.problems import Problem, load_problems
from thence.evaluate.run import evaluate, regrade
from thence.evaluate.store import Settings, Store
from thence.evaluate.suites import Task, load_suite
from thence.evaluate.summary import compare_evaluations, summarise


class Counting:
    """A stand-in for a model: right on the samples that `right` names, in the order of the requests.

    It can be told to stop (Ctrl-C) or break after so many samples.
    """

    name = "native"

    def __init__(self, right: Any = lambda request: True, stop_after: int | None = None, weights: str = "w0"):
        self.right, self.stop_after, self.weights = right, stop_after, weights
        self.asked: list[tuple[str, int, int]] = []

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
        for request in requests:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((request.problem.key, request.sample, request.seed))
            answer = request.problem.answer if self.right(request) else "no"
            yield request, Generation(f"{request.seed}<think>#{answer}", 7, "stop")

    def facts(self) -> dict[str, Any]:
        return {"backend": self.name, "weights": self.weights, "chat_template": None}

    def close(self) -> None:
        pass


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six problems in a file of one's own."""
    file = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings_of(data: Path, model: str = "m", limit: int | None = None, **fields: Any) -> Settings:
    suite = load_suite(str(data), {"samples": 3, "grader": "exact", **fields})
    return Settings(model=model, suite=suite.name, limit=limit, tasks={task.name: task for task in suite.tasks})


def problems_of(settings: Settings) -> dict[str, list[Problem]]:
    return {name: load_problems(task, None, settings.limit) for name, task in settings.tasks.items()}


def run(folder: Path, settings: Settings, backend: Counting) -> Store:
    return evaluate(settings, problems_of(settings), folder, lambda: backend)


def test_an_error_of_a_grader_names_the_flag(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "e", settings_of(data), Counting())
    assert main(["eval", "--regrade", str(tmp_path / "e"), "--grader", "mth"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("thence: --grader: ")
    assert "reward:" not in said


def test_a_finished_evaluation_is_not_sampled_again(tmp_path: Path, data: Path) -> None:
    settings = settings_of(data)
    first, second = Counting(), Counting()
    run(tmp_path / "e", settings, first)
    store = run(tmp_path / "e", settings, second)
    assert len(first.asked) == 18 and second.asked == []
    assert len(store.samples("sums")) == len(store.grades("sums")) == 18


def test_ctrl_c_keeps_every_sample_and_the_rest_follows(tmp_path: Path, data: Path) -> None:
    settings = settings_of(data)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e", settings, Counting(stop_after=7))
    assert len(Store(tmp_path / "e").samples("sums")) == 7
    rest = Counting()
    store = run(tmp_path / "e", settings, rest)
    assert len(rest.asked) == 11
    whole = run(tmp_path / "whole", settings, Counting())
    assert store.samples("sums") == whole.samples("sums")


SLOW_CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.evaluate.test_eval import Counting, settings_of, run

class Slow(Counting):
    def generate(self, requests, task):
        for pair in super().generate(requests, task):
            yield pair
            time.sleep(0.05)

run(Path(sys.argv[2]), settings_of(Path(sys.argv[3])), Slow())
"""


def test_kill_minus_nine_loses_no_sample_and_resuming_gives_the_same(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "e"
    arguments = [sys.executable, "-c", SLOW_CHILD, str(ROOT), str(folder), str(data)]
    child = subprocess.Popen(arguments)
    kept = folder / "samples" / "sums.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not kept.exists() or kept.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = len(Store(folder).samples("sums"))
    assert 4 <= before < 18
    settings = settings_of(data)
    rest = Counting()
    store = run(folder, settings, rest)
    assert len(rest.asked) == 18 - before
    assert store.samples("sums") == run(tmp_path / "whole", settings, Counting()).samples("sums")


def test_an_evaluation_killed_while_it_writes_its_settings_goes_on(tmp_path: Path, data: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / ".evaluation.toml.writing").write_text("model = ")
    settings = settings_of(data)
    store = run(tmp_path / "e", settings, Counting())
    assert store.samples("sums") == run(tmp_path / "whole", settings, Counting()).samples("sums")


def test_a_line_cut_by_a_crash_is_sampled_again(tmp_path: Path, data: Path) -> None:
    settings = settings_of(data)
    store = run(tmp_path / "e", settings, Counting())
    for name in ("samples", "grades"):
        path = store.folder / name / "sums.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
    assert len(store.samples("sums")) == 17
    rest = Counting()
    run(store.folder, settings, rest)
    assert len(rest.asked) == 1
    assert len({sample.place for sample in store.samples("sums")}) == 18
    assert summarise(store).missing == 0


def test_a_damaged_line_is_named_set_aside_and_sampled_again(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(data)
    store = run(tmp_path / "e", settings, Counting())
    path = store.folder / "samples" / "sums.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:20], *lines[5:]]) + "\n")
    assert len(store.samples("sums")) == 17 and summarise(store).missing == 1
    assert f"{path}:5" in caplog.text
    rest = Counting()
    run(store.folder, settings, rest)
    assert len(rest.asked) == 1 and summarise(store).missing == 0
    assert path.with_name("sums.jsonl.damaged").read_text() == lines[4][:20] + "\n"


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"max_tokens": 9}, {"seed": 1}, {"template": "boxed"}])
def test_samples_of_other_settings_are_not_mixed_in(tmp_path: Path, data: Path, change: dict[str, Any]) -> None:
    run(tmp_path / "e", settings_of(data), Counting())
    other = Counting()
    with pytest.raises(UserError, match=next(iter(change))):
        run(tmp_path / "e", settings_of(data, **change), other)
    assert other.asked == []


def test_more_problems_and_samples_may_be_added_but_not_taken_away(tmp_path: Path, data: Path) -> None:
    run(tmp_path / "e", settings_of(data, limit=2), Counting())
    more = Counting()
    store = run(tmp_path / "e", settings_of(data, limit=4, samples=5), more)
    assert len(more.asked) == 4 * 5 - 2 * 3
    assert summarise(store).tasks[0].task.samples == 5
    with pytest.raises(UserError, match="limit"):
        run(tmp_path / "e", settings_of(data, limit=3, samples=5), Counting())


def test_changed_weights_and_changed_problems_are_refused(tmp_path: Path, data: Path) -> None:
    run(tmp_path / "e", settings_of(data, limit=3), Counting())
    with pytest.raises(UserError, match="model has changed"):
        run(tmp_path / "e", settings_of(data), Counting(weights="w1"))
    data.write_text(data.read_text().replace('"answer": "2"', '"answer": "3"'))
    with pytest.raises(UserError, match="data of sums have changed"):
        run(tmp_path / "e", settings_of(data), Counting())


def test_two_processes_cannot_add_to_one_folder(tmp_path: Path, data: Path) -> None:
    store = Store(tmp_path / "e")
    with store.held(), pytest.raises(UserError, match="another process"):
        run(store.folder, settings_of(data), Counting())


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, data: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no evaluation"):
        run(tmp_path, settings_of(data), Counting())


def test_seeds_belong_to_the_sample_and_not_to_the_order(tmp_path: Path, data: Path) -> None:
    few, many = Counting(), Counting()
    run(tmp_path / "few", settings_of(data, samples=1, limit=2), few)
    run(tmp_path / "many", settings_of(data, samples=3), many)
    assert set(few.asked) < set(many.asked)
    assert len({seed for _, _, seed in many.asked}) == 18


def test_numbers_of_a_known_case(tmp_path: Path, data: Path) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting(right=lambda r: r.sample == 0 or r.problem.answer == "4"))
    row = summarise(store).tasks[0]
    assert row.avg is not None and row.majority is not None
    assert row.avg.value == pytest.approx((5 / 3 + 1) / 6)
    assert row.passed[3].value == 1.0 and row.passed[1].value == pytest.approx(row.avg.value)
    assert row.majority.value == pytest.approx(1 / 6)
    assert (row.right, row.wrong, row.unknown, row.mean_tokens) == (8, 10, 0, 7)


def test_an_unfinished_evaluation_counts_complete_problems_only_and_says_so(tmp_path: Path, data: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e", settings_of(data), Counting(stop_after=8))
    regrade(tmp_path / "e")
    result = summarise(Store(tmp_path / "e"))
    assert len(result.tasks[0].shares) == 2 and result.tasks[0].expected == 6
    assert result.missing == 10


def test_regrading_needs_no_model_and_keeps_both_grades(tmp_path: Path, data: Path) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting())
    before = (store.folder / "samples" / "sums.jsonl").read_bytes()
    own = tmp_path / "never.py"
    own.write_text("def reward(prompt, response, answer):\n    return 0.0 if '+0' in prompt else 1.0\n")
    regrade(store.folder, f"{own}:reward")
    assert (store.folder / "samples" / "sums.jsonl").read_bytes() == before
    row = summarise(store, f"{own}:reward").tasks[0]
    assert row.right == 15 and row.versions[0].startswith("sha256 ")
    assert summarise(store).tasks[0].right == 18
    with pytest.raises(UserError, match="graded by math"):
        summarise(store, "math")


def test_degrees_of_a_grader_are_a_mean_reward_everywhere_and_no_share_of_right_answers(
    tmp_path: Path, data: Path
) -> None:
    from rich.console import Console

    from thence.evaluate.export import write_exports
    from thence.pages.evaluation.page import write_page
    from thence.pages.evaluation.tables import results_table
    from thence.pages.terminal import with_notes

    own = tmp_path / "degrees.py"
    own.write_text("def reward(prompt, response, answer):\n    return 2.5 if '+0' in prompt else None\n")
    store = run(tmp_path / "e", settings_of(data, grader=f"{own}:reward"), Counting())
    result = summarise(store)
    (row,) = result.tasks
    assert (row.avg, row.passed, row.majority) == (None, {}, None)
    assert (row.right, row.wrong, row.graded, row.unknown) == (0, 0, 3, 15)
    assert row.reward is not None and (row.reward.value, row.reward.problems) == (2.5, 1)
    console = Console(width=200, record=True)
    console.print(with_notes(results_table(result)))
    table = console.export_text()
    assert "Mean reward" in table and "2.5" in table and "Right answers" not in table
    write_exports(store, result)
    found = json.loads((store.folder / "results.json").read_text())
    assert found["results"]["sums"]["mean_reward,none"] == 2.5
    assert not any("exact_match" in key for key in found["results"]["sums"])
    assert "mean reward" in write_page(store, result).read_text()
    again = run(tmp_path / "f", settings_of(data, "other", grader=f"{own}:reward"), Counting())
    with pytest.raises(UserError, match=r"no shares of right answers[\s\S]*right_from"):
        compare_evaluations(store, again)


def test_a_new_version_of_the_grader_replaces_old_grades(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting())
    monkeypatch.setattr("thence.evaluate.run.grader_version", lambda grader: "newer")
    run(tmp_path / "e", settings_of(data), Counting())
    assert summarise(store).tasks[0].versions == ("newer",)


def test_paired_differences_of_two_models(tmp_path: Path, data: Path) -> None:
    a = run(tmp_path / "a", settings_of(data, "a"), Counting(right=lambda r: r.sample == 0))
    b = run(tmp_path / "b", settings_of(data, "b"), Counting(right=lambda r: r.sample <= int(r.problem.answer) % 3))
    row = compare_evaluations(a, b).rows[0]
    expected = [sum(s <= (2 * i) % 3 for s in range(3)) / 3 - 1 / 3 for i in range(6)]
    assert row.paired.difference == pytest.approx(sum(expected) / 6)
    assert row.paired.low < row.paired.difference < row.paired.high and row.paired.problems == 6
    assert compare_evaluations(a, b).unlike == ()


def test_comparing_names_what_else_differs_and_refuses_other_problems(tmp_path: Path, data: Path) -> None:
    a = run(tmp_path / "a", settings_of(data, "a"), Counting())
    b = run(tmp_path / "b", settings_of(data, "b", temperature=1.0, template="boxed"), Counting())
    assert {name for name, _, _ in compare_evaluations(a, b).unlike} == {
        "sums: temperature",
        "sums: template",
        "sums: prompts",
    }
    few = run(tmp_path / "few", settings_of(data, "c", limit=3), Counting())
    with pytest.raises(UserError, match="different problems"):
        compare_evaluations(a, few)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", settings_of(data, "d"), Counting(stop_after=3))
    with pytest.raises(UserError, match="not finished"):
        compare_evaluations(a, Store(tmp_path / "half"))


def test_multiple_choice_has_a_lenient_column(tmp_path: Path) -> None:
    file = tmp_path / "letters.jsonl"
    rows = [{"question": f"Which, {i}?\n\nA) this\nB) that", "answer": "A"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Careless(Counting):
        def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
            yield from ((request, Generation("ANSWER: A", 3, "stop")) for request in requests)

    row = summarise(run(tmp_path / "e", settings_of(file, samples=1, choices=True), Careless())).tasks[0]
    assert row.avg is not None and row.lenient is not None
    assert (row.avg.value, row.lenient.value) == (0.0, 1.0)


def test_exports_hold_the_same_numbers_in_the_harness_layout(tmp_path: Path, data: Path) -> None:
    from thence.evaluate.export import write_exports

    store = run(tmp_path / "e", settings_of(data), Counting(right=lambda r: r.sample < 2))
    result = summarise(store)
    written = write_exports(store, result)
    avg = result.tasks[0].avg
    assert avg is not None

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((store.folder / "results.json").read_text(), parse_constant=no_constants)
    top = {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date", "git_hash"}
    assert top <= set(found)
    assert found["results"]["sums"]["exact_match,none"] == avg.value == pytest.approx(2 / 3)
    assert found["results"]["sums"]["exact_match_stderr,none"] == avg.standard_error
    assert found["n-samples"]["sums"] == {"original": 6, "effective": 6}
    assert found["configs"]["sums"]["repeats"] == 3
    lines = [json.loads(line) for path in written if path.suffix == ".jsonl" for line in path.read_text().splitlines()]
    assert len(lines) == 6 and {len(line["resps"][0]) for line in lines} == {3}
    assert lines[0]["exact_match"] == pytest.approx(2 / 3) and lines[0]["target"] == "0"
    with (store.folder / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["avg"]) == avg.value and row["task"] == "sums" and row["seed"] == "0"


def test_the_page_needs_nothing_else_and_escapes_what_models_say(tmp_path: Path, data: Path) -> None:
    from thence.pages.evaluation.page import write_page

    class Hostile(Counting):
        def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
            yield from ((request, Generation("<script>alert(1)</script>\x1b[2J", 3, "length")) for request in requests)

    store = run(tmp_path / "e", settings_of(data), Hostile())
    text = write_page(store, summarise(store)).read_text()
    assert "<script" not in text and "\x1b" not in text and "&lt;script&gt;" in text
    assert "src=" not in text and "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


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
