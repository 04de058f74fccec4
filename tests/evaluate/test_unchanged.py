"""An evaluation is of one model, one template and one set of problems, however often its command is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.answering_server import Server, said
from tests.evaluate.counting import Counting, settings_of
from thence.cli import main
from thence.errors import RecipeError, UserError
from thence.evaluate.export import write_exports
from thence.evaluate.origin import files_digest
from thence.evaluate.pass_rates import rated_rows
from thence.evaluate.problems import load_problems
from thence.evaluate.run import evaluate
from thence.evaluate.store import Settings, Store
from thence.evaluate.suites import load_suite
from thence.evaluate.summary import compare_evaluations, summarise
from thence.recipe import Model
from thence.train.model_files import resolve


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


SUMS = [{"question": f"{i}+1?", "answer": f"{i + 1:02d}"} for i in range(3)]


def test_a_model_that_was_trained_again_is_noticed_where_no_sample_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(resolve("world:chain/rich"), tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink(missing_ok=True)
    data = write_rows(tmp_path / "sums.jsonl", SUMS)
    ask = ["eval", str(tmp_path / "model"), "--suite", str(data), "--grader", "exact", "--max-tokens", "4"]
    ask += ["--folder", str(tmp_path / "e")]
    assert main(ask) == 0
    capsys.readouterr()
    assert main(ask) == 0
    assert "every sample is here already: nothing is asked" in capsys.readouterr().out
    weights = next((tmp_path / "model").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-100:] = bytes(100)
    weights.write_bytes(content)
    assert main(ask) != 0
    assert "the model has changed since the samples here were made" in " ".join(capsys.readouterr().err.split())


def test_the_digest_of_a_models_files_follows_from_their_content(tmp_path: Path) -> None:
    shutil.copytree(resolve("world:chain/rich"), tmp_path / "copy")
    first = files_digest(Model(path=str(tmp_path / "copy")))
    assert first is not None and first == files_digest(Model(path="world:chain/rich"))
    assert files_digest(Model(path=str(tmp_path / "absent" / "model"))) is None


def test_another_model_behind_the_same_address_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, server = write_rows(tmp_path / "sums.jsonl", SUMS), Server()
    server.answer = lambda count, path, body: said("#02")
    address = f"http://127.0.0.1:{server.http.server_address[1]}/v1"
    ask = ["eval", "--endpoint", address, "--suite", str(data), "--grader", "exact", "--folder", str(tmp_path / "e")]
    try:
        server.models = ["first"]
        assert main([*ask, "--samples", "1"]) == 0
        server.models = ["second"]
        assert main([*ask, "--samples", "2"]) != 0
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert "the served model has changed since" in " ".join(capsys.readouterr().err.split())


class Templated(Counting):
    """Has a chat template with a text."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "chat_template": self.text}


def run(folder: Path, settings: Settings, backend: Counting) -> Store:
    problems = {name: load_problems(task, None, settings.limit) for name, task in settings.tasks.items()}
    return evaluate(settings, problems, folder, lambda: backend)


def test_another_text_of_the_template_is_refused_and_other_ways_are_listed(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "sums.jsonl", SUMS)
    settings = settings_of(data, limit=2)
    store = run(tmp_path / "e", settings, Templated("{{ a }}"))
    with pytest.raises(UserError, match="the text of the chat template has changed"):
        run(tmp_path / "e", settings.model_copy(update={"limit": None}), Templated("{{ b }}"))
    other = settings.model_copy(update={"backend": "vllm", "template_variables": {"enable_thinking": False}})
    unlike = compare_evaluations(store, run(tmp_path / "f", other, Templated("{{ a }}"))).unlike
    assert ("backend", "native", "vllm") in unlike
    assert ("template_variables", {}, {"enable_thinking": False}) in unlike


def test_a_template_variable_that_is_called_as_a_free_field_is_not_free(tmp_path: Path) -> None:
    settings = settings_of(write_rows(tmp_path / "sums.jsonl", SUMS))
    run(tmp_path / "e", settings.model_copy(update={"template_variables": {"title": "a"}}), Counting())
    with pytest.raises(UserError, match="holds an evaluation with 'a', not 'b'"):
        run(tmp_path / "e", settings.model_copy(update={"template_variables": {"title": "b"}}), Counting())


@pytest.mark.parametrize(("function", "problems"), [("plain", 1), ("columned", 3)])
def test_copies_are_problems_of_their_own_only_for_a_function_that_is_told_the_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, problems: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def plain(prompt, response, answer):\n    return 1.0\n\n\n"
        "def columned(prompt, response, answer, columns):\n    return float(columns['id'] == 1)\n"
    )
    rows: list[dict[str, Any]] = [{"question": "1+1?", "answer": "2", "id": i, "more": i} for i in range(3)]
    rows.append({"question": "1+1?", "answer": "2", "more": 2, "id": 2})  # the columns of the third, in another order
    data = write_rows(tmp_path / "sums.jsonl", rows)
    settings = settings_of(data, grader=f"own.py:{function}")
    store = run(tmp_path / "e", settings, Counting())
    assert len(store.problems()["sums"]) == problems
    rates = [row["pass_rate"] for row in rated_rows(store, data)]
    assert rates == ([1.0] * 4 if function == "plain" else [0.0, 1.0, 0.0, 0.0])
    write_rows(data, [*rows, {"question": "1+1?", "answer": "3", "id": 1, "more": 1}])
    with pytest.raises(UserError, match="the same problem as"):
        load_problems(settings.tasks["sums"])


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        ({"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, 1, "A"),  # a label comes before a place
        (["5", "1", "7"], 1, "B"),  # without labels a number is a place, as in MMLU
        (["a", "b", "c"], 2, "C"),
    ],
)
def test_a_number_as_the_answer_names_a_label_or_else_a_place(
    tmp_path: Path, options: Any, answer: int, right: str
) -> None:
    data = write_rows(tmp_path / "q.jsonl", [{"question": "which?", "options": options, "answer": answer}])
    assert load_problems(load_suite(str(data)).tasks[0])[0].answer == right


def test_true_is_no_place_of_an_answer(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "q.jsonl", [{"question": "which?", "options": ["a", "b"], "answer_index": True}])
    with pytest.raises(UserError, match="names none of the options"):
        load_problems(load_suite(str(data)).tasks[0])


def test_results_are_written_where_no_problem_of_a_task_is_complete(tmp_path: Path) -> None:
    from thence.evaluate.backends import Refused

    class Refusing(Counting):
        def generate(self, requests: Any, task: Any) -> Any:
            for request, found in super().generate(requests, task):
                refused = task.name == "b" and request.sample == 0
                yield request, Refused("too long", "the prompt is too long") if refused else found

    data = write_rows(tmp_path / "sums.jsonl", SUMS)
    suite = tmp_path / "two.toml"
    suite.write_text(
        f'[defaults]\nfiles = ["{data}"]\ngrader = "exact"\nsamples = 2\n[[tasks]]\nname = "a"\n[[tasks]]\nname = "b"\n'
    )
    loaded = load_suite(str(suite))
    settings = Settings(model="m", suite=loaded.name, tasks={task.name: task for task in loaded.tasks})
    store = run(tmp_path / "e", settings, Refusing())
    write_exports(store, summarise(store))
    written = json.loads((store.folder / "results.json").read_text())
    assert written["results"]["a"]["exact_match,none"] == 1.0
    assert "exact_match,none" not in written["results"].get("b", {})


def test_a_suite_says_environment_settings_of_one_task_after_those_of_all(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "tasks.jsonl", SUMS)
    given = {"tasks.environment": "shop.py:Shop", "environment.max_turns": "3"}
    (task,) = load_suite(str(data), given).tasks
    assert task.environment is not None and task.environment.max_turns == 3
    with pytest.raises(RecipeError, match="path"):
        load_suite(str(data), {"environment.max_turns": "3"})
