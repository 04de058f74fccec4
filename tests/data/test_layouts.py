"""The layouts of rows that are understood, and columns of other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.chatml import GOOD, write_jsonl
from thence.data.example import Message
from thence.data.readers import read_examples
from thence.errors import DataError, UserError


def test_gsm8k_rows_give_working_and_number(tmp_path: Path):
    rows = [GOOD, {"question": "Less?", "answer": "Minus.\n#### -1,000,000.5"}]
    (first, second), bad = read_examples(write_jsonl(tmp_path / "gsm.jsonl", rows))
    assert first.messages == (Message("user", "How many?"),)
    assert first.demonstration == "Two and two.\n#### 1,234"
    assert (first.answer, second.answer) == ("1234", "-1000000.5")
    assert (first.group, bad) == ("gsm", [])
    kept, _ = read_examples(str(tmp_path / "gsm.jsonl"), strip_calculator=False)
    assert kept[0].demonstration == GOOD["answer"]


def test_question_answer_without_marks_is_a_reference_answer_only(tmp_path: Path):
    path = write_jsonl(tmp_path / "qa.jsonl", [{"problem": "Half of 1?", "answer": 0.5, "solution": "Divide."}])
    plain, _ = read_examples(path, columns={"question": "problem"})
    assert (plain[0].answer, plain[0].demonstration) == ("0.5", None)
    worked, _ = read_examples(path, columns={"question": "problem", "demonstration": "solution"})
    assert (worked[0].answer, worked[0].demonstration) == ("0.5", "Divide.")


def test_messages_rows_end_in_the_demonstration(tmp_path: Path):
    turns = [("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "answer": "d"}
    (example,), _ = read_examples(write_jsonl(tmp_path / "chat.jsonl", [row]))
    assert [(m.role, m.content) for m in example.messages] == turns[:-1]
    assert (example.demonstration, example.answer, example.question) == ("d", "d", "c")


def test_prompt_completion_rows_as_text_and_as_messages(tmp_path: Path):
    rows = [
        {"prompt": "2+2=", "completion": "4"},
        {
            "prompt": [{"role": "user", "content": "2+2?"}],
            "completion": [{"role": "assistant", "content": "4"}],
            "data_source": "sums",
        },
    ]
    (text, chat), _ = read_examples(write_jsonl(tmp_path / "pc.jsonl", rows))
    assert (text.prompt, text.messages, text.demonstration, text.group) == ("2+2=", (), "4", "pc")
    assert (chat.prompt, chat.messages, chat.demonstration, chat.group) == (
        None,
        (Message("user", "2+2?"),),
        "4",
        "sums",
    )


def test_verl_layout_in_parquet_with_any_field_order_and_targets_that_are_null(tmp_path: Path):
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    reward = pa.struct([("ground_truth", pa.string()), ("style", pa.string())])
    prompt = [{"content": "Think.", "role": "system"}, {"content": "1+1?", "role": "user"}]
    table = pa.table(
        {
            "data_source": ["", "amc"],
            "prompt": pa.array([prompt, prompt], pa.list_(message)),
            "target": pa.array([[{"role": "assistant", "content": "<think>\nhm</think>2"}], None], pa.list_(message)),
            "reward_model": pa.array([{"ground_truth": "2", "style": "rule"}] * 2, reward),
            "__index_level_0__": [240, 7],
        }
    )
    pq.write_table(table, tmp_path / "openr1.parquet")
    (first, second), _ = read_examples([str(tmp_path / "openr1.parquet")])
    assert first.messages == second.messages == (Message("system", "Think."), Message("user", "1+1?"))
    assert (first.demonstration, second.demonstration) == ("<think>\nhm</think>2", None)
    assert (first.answer, first.group, second.group) == ("2", "openr1", "amc")
    assert second.source == f"{tmp_path}/openr1.parquet:2"


def test_text_rows_have_no_prompt(tmp_path: Path):
    (example,), _ = read_examples(write_jsonl(tmp_path / "t.jsonl", [{"text": "All of it."}]))
    assert (example.prompt, example.demonstration) == ("", "All of it.")


def test_unknown_columns_are_listed(tmp_path: Path):
    path = write_jsonl(tmp_path / "odd.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match="instruction, output") as caught:
        read_examples(path)
    assert "--data.columns" in caught.value.remedy
    with pytest.raises(DataError, match="no column nothing; found instruction, output"):
        read_examples(path, columns={"prompt": "instruction", "completion": "nothing"})
    (example,), _ = read_examples(path, columns={"prompt": "instruction", "completion": "output"})
    assert (example.prompt, example.demonstration) == ("a", "b")


def test_renames_may_swap_columns(tmp_path: Path):
    path = write_jsonl(tmp_path / "s.jsonl", [{"question": "4", "answer": "2+2?"}])
    (example,), _ = read_examples(path, columns={"question": "answer", "answer": "question"})
    assert (example.question, example.answer) == ("2+2?", "4")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"layout": "alpaca"}, "data.layout"),
        ({"columns": {"input": "x"}}, "data.columns"),
        ({"limit": 0}, "data.limit"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, Any], field: str):
    with pytest.raises(UserError) as caught:
        read_examples("unread.jsonl", **settings)
    assert caught.value.field == field
