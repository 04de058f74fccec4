"""Rows with their pass rates, from an evaluation of their file: `thence data FILE --pass-rates EVALUATION`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import write_rows
from thence.cli import main
from thence.data.worlds.chain import problems
from thence.errors import DataError, UserError
from thence.evaluate.pass_rates import rated_rows
from thence.evaluate.store import GradeLine, Store
from thence.jsonl import read_jsonl

K = 4


def rows_of_world(n: int = 6) -> list[dict[str, Any]]:
    made = problems("test", n, 0)
    return [{"prompt": p.prompt, "completion": p.demonstration, "answer": p.answer, "kind": "x"} for p in made]


def measured(folder: Path, rows: list[dict[str, Any]], *more: str) -> tuple[Path, Path]:
    """A file of rows and an evaluation of it, K samples each."""
    file = Path(write_rows(folder / "rows.jsonl", rows))
    flags = ["--samples", str(K), "--temperature", "1", "--max-tokens", "8", "--grader", "exact", "--quiet", *more]
    assert main(["eval", "world:chain/rich", "--suite", str(file), "--folder", str(folder / "eval"), *flags]) == 0
    return file, folder / "eval"


def decide(store: Store, right: list[int], verdict: str = "wrong") -> list[str]:
    """Grade again, so that of problem i the first right[i] samples are right. Returns the problems' keys."""
    (task,) = store.settings().tasks
    keys = store.problems()[task]
    version = store.grades(task)[0].version
    with store.write_grades(task) as lines:
        for key, count in zip(keys, right, strict=True):
            for i in range(K):
                what: Any = "right" if i < count else verdict
                lines.add(GradeLine(key, i, "exact", version, what, float(what == "right")))
    return keys


def test_rows_get_the_share_of_right_responses_and_a_recipe_uses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of_world()
    _, evaluation = measured(tmp_path, rows)
    decide(Store(evaluation), [0, 1, 2, 3, 4, 0])
    # the rows in another order, and one of them twice: they are known by their text
    moved = write_rows(tmp_path / "moved.jsonl", [rows[4], rows[1], rows[2], rows[3], rows[0], rows[5], rows[2]])
    out = tmp_path / "rated.jsonl"
    capsys.readouterr()
    assert main(["data", moved, "--pass-rates", str(evaluation), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "7 rows: 2 never right, 1 always, 4 in between" in said and f"--data.source {out}" in said
    rated = read_jsonl(out)
    assert [row.pop("pass_rate") for row in rated] == [1.0, 0.25, 0.5, 0.75, 0.0, 0.0, 0.5]
    assert rated == read_jsonl(Path(moved))
    recipe = tmp_path / "r.toml"
    table = {"source": [str(out)], "pass_rate": [0.01, 0.99], "order": "hard-first"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    recipe.write_text('name = "r"\nstages = ["sft"]\n[model]\npath = "world:chain/rich"\n[data]\n' + "\n".join(lines))
    assert main(["data", str(recipe), "--n", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 rows" in said and f"answer {rows[1]['answer']}" in said
    assert (
        main(["data", moved, "--model", "world:chain/rich", "--data.source", str(out), "--data.pass-rate", "0,0"]) == 0
    )
    assert "2 rows" in capsys.readouterr().out


def test_an_unknown_verdict_is_not_right_and_a_degree_is_refused(tmp_path: Path) -> None:
    file, evaluation = measured(tmp_path, rows_of_world(3))
    decide(Store(evaluation), [0, 2, 4], "unknown")
    assert [row["pass_rate"] for row in rated_rows(Store(evaluation), file)] == [0.0, 0.5, 1.0]
    decide(Store(evaluation), [0, 2, 4], "graded")
    with pytest.raises(UserError, match="6 scores of the evaluation are degrees"):
        rated_rows(Store(evaluation), file)


def test_rows_that_are_not_those_measured_are_refused(tmp_path: Path) -> None:
    rows = rows_of_world(4)
    _, evaluation = measured(tmp_path, rows[:3])
    more = Path(write_rows(tmp_path / "more.jsonl", rows))
    with pytest.raises(DataError, match="the row's problem is not in") as told:
        rated_rows(Store(evaluation), more)
    assert told.value.line == 4
    other = Path(write_rows(tmp_path / "other.jsonl", [*rows[:2], {**rows[2], "answer": "no"}]))
    with pytest.raises(DataError, match=r"the answer is 'no', and .* graded with") as told:
        rated_rows(Store(evaluation), other)
    assert (told.value.line, told.value.field) == (3, "answer")


def test_an_evaluation_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    file, evaluation = measured(tmp_path, rows_of_world(3))
    samples = evaluation / "samples" / "rows.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="1 of 3 problems of the evaluation lack samples or grades") as told:
        rated_rows(Store(evaluation), file)
    assert "run its `thence eval` command again" in (told.value.remedy or "")


def test_a_row_that_the_filter_left_out_is_refused(tmp_path: Path) -> None:
    rows = rows_of_world(3)
    rows[1]["kind"] = "y"
    file, evaluation = measured(tmp_path, rows, "--set", 'filter={kind = "x"}')
    with pytest.raises(DataError, match="not one of those measured: their filter is kind = 'x'") as told:
        rated_rows(Store(evaluation), file)
    assert told.value.line == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "x.jsonl"], "add --pass-rates EVALUATION"),
        (["--pass-rates", "e"], "add --out rated.jsonl"),
        (["--pass-rates", "e", "--out", "x.jsonl", "--model", "m"], "--model: pass rates need the file"),
        (["--pass-rates", "e", "--out", "rows.jsonl"], "the file exists"),
        (["--pass-rates", "e", "--out", "none/x.jsonl"], "there is no folder none"),
        (["--pass-rates", "none", "--out", "x.jsonl"], "none: no evaluation here"),
    ],
)
def test_a_command_that_lacks_a_part_says_which(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows_of_world(1))
    assert main(["data", "rows.jsonl", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()
