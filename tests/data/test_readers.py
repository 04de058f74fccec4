"""Reading files of data, packed, damaged or of the hub, and what is refused of them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.chatml import GOOD, write_jsonl
from thence.data.layouts import parse_row
from thence.data.problems import RowProblem
from thence.data.readers import read_examples
from thence.errors import DataError, UserError

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "ho"}
BAD_ROWS = [
    ('{"question": ', None, "not JSON"),
    ("[1, 2]", None, "JSON array"),
    ("[" * 100_000, None, "not"),
    ('"text"', None, "found text"),
    ({"question": "a"}, "answer", "missing"),
    ({"question": "", "answer": "x\n#### 1"}, "question", "empty"),
    ({"question": 3, "answer": "x\n#### 1"}, "question", "found a whole number"),
    ({"question": "a", "answer": "working only"}, "answer", "####"),
    ({"question": "a", "answer": "x\n#### "}, "answer", "####"),
    ({"question": "a\0b", "answer": "x\n#### 1"}, "question", "NUL"),
    ('{"question": "\\ud800", "answer": "x\\n#### 1"}', "question", "surrogate"),
]
BAD_CHATS = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hi"}, "messages", "found text"),
    ({"messages": [SAID]}, "messages", "no user turn|role assistant"),
    ({"messages": [USER, SAID, SAID]}, "messages", "ends with a turn of role assistant"),
    ({"messages": [USER, {"role": "system", "content": "x"}, USER, SAID]}, "messages", "system turn"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1].content", "empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content", "null"),
    ({"messages": [{"role": "human", "content": "x"}, SAID]}, "messages[0].role", "'human'"),
    ({"messages": [USER, "x"]}, "messages[1]", "found text"),
]
CASES = [(GOOD, *case) for case in BAD_ROWS] + [({"messages": [USER, SAID]}, *case) for case in BAD_CHATS]


@pytest.mark.parametrize(("good", "row", "field", "problem"), CASES)
def test_a_bad_row_is_an_error_with_its_place_or_is_listed(
    tmp_path: Path, good: dict[str, Any], row: Any, field: str | None, problem: str
):
    path = write_jsonl(tmp_path / "rows.jsonl", [good, "", row, good])
    with pytest.raises(DataError, match=problem) as caught:
        read_examples(path)
    error = caught.value
    assert (error.file, error.line, error.field) == (path, 3, field)
    assert str(error).startswith(f"{path}:3: ")
    assert "--data.skip-bad" in error.remedy
    examples, bad = read_examples(path, skip_bad=True)
    assert [example.source for example in examples] == [f"{path}:1", f"{path}:4"]
    assert [(entry.source, entry.field) for entry in bad] == [(f"{path}:3", field)]
    assert str(bad[0]).startswith(f"{path}:3: ")


def test_errors_name_the_users_own_column(tmp_path: Path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"problem": "a", "answer": "1"}, {"problem": "", "answer": "1"}])
    with pytest.raises(DataError) as caught:
        read_examples(path, columns={"question": "problem"})
    assert (caught.value.line, caught.value.field) == (2, "problem")


def test_parquet_errors_name_the_row_also_where_text_is_not_utf8(tmp_path: Path):
    answers = pa.array([b"1", b"2", b"\xff\xfe", b"4"]).cast(pa.binary())
    answers = pa.Array.from_buffers(pa.string(), 4, answers.buffers())
    pq.write_table(pa.table({"question": ["a", "b", "c", " "], "answer": answers}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="UTF-8") as caught:
        read_examples([str(tmp_path / "p.parquet")])
    assert (caught.value.line, caught.value.field) == (3, "answer")
    examples, bad = read_examples([str(tmp_path / "p.parquet")], skip_bad=True)
    assert [example.answer for example in examples] == ["1", "2"]
    assert [(row.source.rpartition(":")[2], row.field) for row in bad] == [("3", "answer"), ("4", "question")]


def test_more_than_half_bad_is_an_error_even_with_skip_bad(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {"question": "a"}, {"question": "b"}])
    with pytest.raises(DataError, match="2 of 3 rows are bad") as caught:
        read_examples(path, skip_bad=True)
    assert f"{path}:2: answer" in str(caught.value)


def test_a_row_of_verl_needs_a_text_or_number_as_truth():
    row = {"prompt": [USER], "reward_model": {"ground_truth": {"target": 24}}}
    with pytest.raises(RowProblem) as caught:
        parse_row("verl", row, source="f:1", group="f")
    assert caught.value.field == "reward_model.ground_truth"


def test_gzip_and_byte_order_mark(tmp_path: Path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    (example,), _ = read_examples([str(tmp_path / "rows.jsonl.gz")])
    assert (example.answer, example.group) == ("1234", "rows")


def test_invalid_utf8_is_named_by_line(tmp_path: Path):
    good = json.dumps(GOOD).encode() + b"\n"
    (tmp_path / "rows.jsonl").write_bytes(good + b'{"question": "\xff"}\n' + good)
    with pytest.raises(DataError, match="not UTF-8") as caught:
        read_examples([str(tmp_path / "rows.jsonl")])
    assert caught.value.line == 2


def test_damaged_missing_and_empty_files(tmp_path: Path):
    whole = gzip.compress((json.dumps(GOOD) + "\n").encode() * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, problem in {
        "cut.jsonl.gz": "damaged here",
        "bad.parquet": "not a readable Parquet file",
        "empty.jsonl": "no rows",
        "empty.parquet": "no rows",
        "table.csv": "unknown kind",
        "absent.jsonl": "no such file",
    }.items():
        with pytest.raises(UserError, match=problem) as caught:
            read_examples([str(tmp_path / name)])
        assert caught.value.file == str(tmp_path / name)


def test_a_json_array_says_how_to_convert_it(tmp_path: Path):
    (tmp_path / "rows.json").write_text(json.dumps([GOOD], indent=2))
    with pytest.raises(DataError, match="JSON array") as caught:
        read_examples([str(tmp_path / "rows.json")])
    assert "jq" in caught.value.remedy


def test_limit_counts_good_examples_over_all_files(tmp_path: Path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [GOOD, GOOD]) for name in "ab"]
    examples, _ = read_examples(paths, limit=3)
    assert [example.group for example in examples] == ["a", "a", "b"]


def test_hub_names_without_the_package_say_both_remedies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as caught:
        read_examples(["someone/sums:main"])
    assert "thence[datasets]" in caught.value.remedy
    assert "local" in caught.value.remedy


def test_hub_names_split_and_config_reach_the_package(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Rows(list):
        column_names = ("question", "answer", "pages")

        def select_columns(self, names: list[str]) -> Rows:
            assert names == ["question", "answer"]
            return self

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        asked.append((name, config, split))
        if name == "someone/gone":
            raise ConnectionError("offline\nlong trace")
        return Rows([GOOD, {"question": "a"}])

    fake = type(sys)("datasets")
    monkeypatch.setattr(fake, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    examples, bad = read_examples(["someone/sums:main"], split="test", skip_bad=True)
    assert asked == [("someone/sums", "main", "test")]
    assert (examples[0].group, examples[0].source) == ("sums", "someone/sums:main[test]:1")
    assert bad[0].source == "someone/sums:main[test]:2"
    with pytest.raises(UserError, match=r"someone/gone: split train: the data set cannot be loaded: offline\n"):
        read_examples(["someone/gone"])


@pytest.mark.slow
def test_folders_saved_by_datasets(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([GOOD])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "many")
    assert read_examples([str(tmp_path / "one")])[0][0].answer == "1234"
    assert read_examples([str(tmp_path / "many")], split="test")[0][0].group == "many"
    with pytest.raises(UserError) as caught:
        read_examples([str(tmp_path / "many")], split="train")
    assert caught.value.field == "split train"


def test_reading_imports_neither_torch_nor_transformers():
    code = "import sys, thence.data.readers; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
