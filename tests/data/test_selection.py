"""Sources with weights, rows by pass rate, a curriculum: which rows are used, how often and in which order."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import changed, file_recipe, write_rows
from thence.data.order import batch_at, drawn_from
from thence.data.readers import read_examples
from thence.errors import UserError
from thence.pipeline.prompts import read_only
from thence.pipeline.run import run
from thence.recipe import Data


def rows(folder: Path, name: str, rates: list[float | None]) -> str:
    """A file whose answers say where a row stands: name and number."""
    found: list[dict[str, Any]] = [
        {"prompt": f"{name}{i}?", "completion": "1", "answer": f"{name}{i}", **({} if r is None else {"pass_rate": r})}
        for i, r in enumerate(rates)
    ]
    return write_rows(folder / f"{name}.jsonl", found)


def answers(data: Data) -> list[str | None]:
    return [example.answer for example in read_only(data)]


def test_weights_are_shares_and_every_row_is_used(tmp_path: Path) -> None:
    sources = [rows(tmp_path, "a", [None] * 6), rows(tmp_path, "b", [None] * 2)]
    found = Counter(str(answer)[0] for answer in answers(Data(source=sources, weights=[1.0, 1.0])))
    assert found == {"a": 6, "b": 6}
    assert answers(Data(source=sources, weights=[3.0, 1.0])) == answers(Data(source=sources))
    few = answers(Data(source=sources, weights=[1.0, 3.0], limit=4))
    assert few == ["a0", "b0", "b1", "b0"]
    with pytest.raises(UserError, match="1 weights for 2 sources"):
        answers(Data(source=sources, weights=[1.0]))


def test_rows_are_kept_by_their_pass_rate(tmp_path: Path) -> None:
    data = {"source": [rows(tmp_path, "a", [0.0, 0.1, 0.5, 0.9, 1.0])]}
    assert answers(Data(**data, pass_rate=(0.1, 0.9))) == ["a1", "a2", "a3"]
    assert answers(Data(**data, pass_rate=(0.1, 0.9), limit=2)) == ["a1", "a2"], "the limit counts what is left"
    with pytest.raises(UserError, match=r"none of 5 rows has a pass_rate from 0\.2 to 0\.3"):
        answers(Data(**data, pass_rate=(0.2, 0.3)))


@pytest.mark.parametrize(("rate", "says"), [(None, "no pass_rate"), (1.5, r"1\.5, which is no share")])
def test_a_row_without_a_pass_rate_is_named(rate: float | None, says: str, tmp_path: Path) -> None:
    data = Data(source=[rows(tmp_path, "a", [0.5, rate])], pass_rate=(0.0, 1.0))
    with pytest.raises(UserError, match=says) as refused:
        answers(data)
    assert refused.value.line == 2 and refused.value.file == str(tmp_path / "a.jsonl") and refused.value.remedy


def test_a_curriculum_sorts_by_pass_rate_and_is_not_shuffled(tmp_path: Path) -> None:
    data = {"source": [rows(tmp_path, "a", [0.5, 0.9, 0.1, 0.5])]}
    assert answers(Data(**data, order="easy-first")) == ["a1", "a0", "a3", "a2"]
    assert answers(Data(**data, order="hard-first")) == ["a2", "a0", "a3", "a1"]
    assert [batch_at(5, 2, None, step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert drawn_from(3, 2, 4, None) == [2, 0, 1, 2]
    assert batch_at(50, 10, 0, 0) != list(range(10))


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_stage_trains_in_that_order(stage: str, tmp_path: Path) -> None:
    tables = changed(file_recipe(tmp_path), {"stages": [stage], "rl.steps": 2, "rl.prompts": 2, "sft.batch": 2})
    rates = [0.5, 0.9, 0.1, 0.7]
    letters = [{"prompt": f"{i}?", "completion": "1", "answer": "1", "pass_rate": r} for i, r in enumerate(rates)]
    write_rows(tmp_path / "train.jsonl", letters)
    tables = changed(tables, {"data.order": "easy-first", "sft.steps": 2})
    if stage == "sft":
        from thence.pipeline import sft_stage

        seen: list[str] = []
        take = sft_stage.trajectories_of
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft_stage, "trajectories_of", lambda p, on: seen.extend(x.text for x in p) or take(p, on))
            run(tables)
    else:
        folder = run(tables)
        text = (folder / "stages" / "rl" / "samples.jsonl").read_text()
        seen = list(dict.fromkeys(json.loads(line)["prompt"] for line in text.splitlines()))
    assert seen == ["1?", "3?", "0?", "2?"]


def test_long_demonstrations_are_left_out_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = changed(file_recipe(tmp_path), {"stages": ["sft"], "data.max_response_tokens": 9})
    rows = [{"prompt": "1?", "completion": "1" * size, "answer": "1"} for size in (3, 8, 9, 20)]
    write_rows(tmp_path / "train.jsonl", rows)
    tables = changed(tables, {"sft.batch": 2, "data.leave_out_cut": True})
    with caplog.at_level(logging.WARNING):
        folder = run(tables)
    assert "2 examples left out: longer than data.max_response_tokens" in caplog.text
    assert json.loads((folder / "stages" / "sft" / "done.json").read_text())["examples"] == 2


def test_held_out_rows_are_not_repeated_in_training(tmp_path: Path) -> None:
    tables = changed(file_recipe(tmp_path), {"stages": ["sft"], "sft.held_out": 2, "data.weights": [1.0]})
    with pytest.raises(UserError, match="held out and trained too"):
        run(tables)


def test_other_columns_of_parquet_are_read_too_but_for_bytes(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"prompt": ["1?"], "answer": ["1"], "level": [3], "picture": [b"x"], "notes": [["a"]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    (example,), _ = read_examples(str(tmp_path / "rows.parquet"))
    assert json.loads(example.columns) == {"level": 3, "notes": ["a"]}
