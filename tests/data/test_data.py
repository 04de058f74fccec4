"""Reading data sets, and rendering them to the tokens that are trained."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from thence.data.chat import Rendered, chat_format, end_token_ids, render, render_all, trained_share
from thence.data.example import Example, Message
from thence.data.layouts import parse_row
from thence.data.problems import RowProblem
from thence.data.readers import read_examples
from thence.errors import DataError, UserError
from thence.pipeline.prompts import RenderedPrompts, load_prompts
from thence.recipe import Data, Model
from thence.train.model import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_THINK = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CHATML_TRIM = CHATML.replace("m.content }}", "m.content | trim }}")
CHATML_STRIPS_THINKING = CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LETTERS = "".join(chr(code) for code in range(32, 127)) + "\n"


def make_tokenizer(template: str | None = CHATML, *, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, and special tokens."""
    vocabulary = {char: number for number, char in enumerate(["?unk", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?unk"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names = {"eos_token": "<|endoftext|>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>" if bos else None, **names)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def ask(question: str = "1+1?", demonstration: str | None = "It is 2.", *earlier: Message) -> Example:
    return Example((*earlier, Message("user", question)), None, demonstration, "2", "train.jsonl:7", "train")


def decode(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int] | None) -> str:
    return str(tokenizer.decode(list(ids or ()), skip_special_tokens=False))


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


GOOD = {"question": "How many?", "answer": "Two and <<2+2=4>>two.\n#### 1,234"}


# --- layouts -------------------------------------------------------------------------------------------------------


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


# --- bad rows ------------------------------------------------------------------------------------------------------

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


# --- files ---------------------------------------------------------------------------------------------------------


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


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_clean_text_comes_through_unchanged(text: str):
    row = json.loads(json.dumps({"prompt": text, "completion": text}))
    example = parse_row("prompt-completion", row, source="f:1", group="f")
    assert (example.prompt, example.demonstration) == (text, text)


# --- rendering -----------------------------------------------------------------------------------------------------


def test_prompt_is_the_template_and_response_ends_with_the_end_of_turn_token(chatml: PreTrainedTokenizerFast):
    row = render(ask(), chatml)
    assert decode(chatml, row.prompt_ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(chatml, row.response_ids) == "It is 2.<|im_end|>"
    assert row.response_ids and row.response_ids[-1] == chatml.convert_tokens_to_ids("<|im_end|>")
    assert end_token_ids(chatml) == (row.response_ids[-1], chatml.eos_token_id)


@given(question=st.text(LETTERS), answer=st.text(LETTERS, min_size=1).filter(str.strip), trim=st.booleans())
def test_prompt_and_response_are_what_the_template_renders(question: str, answer: str, trim: bool):
    tokenizer = make_tokenizer(CHATML_TRIM if trim else CHATML)
    example = ask(question, answer, Message("user", "x"), Message("assistant", "y"))
    row = render(example, tokenizer)
    turns = [{"role": m.role, "content": m.content} for m in (*example.messages, Message("assistant", answer))]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert [*row.prompt_ids, *(row.response_ids or ())] == list(whole)[:-1]  # all but the newline after the turn


def test_template_without_a_special_end_falls_back_to_eos():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ")
    assert end_token_ids(tokenizer) == (tokenizer.eos_token_id,)
    with pytest.raises(UserError, match="ends a response"):
        end_token_ids(make_tokenizer(None, eos=False))


def test_blanks_that_the_template_puts_around_the_response_are_followed():
    tokenizer = make_tokenizer(INST, bos=True)
    row = render(ask(), tokenizer)
    assert decode(tokenizer, row.prompt_ids) == "<s>[INST] 1+1? [/INST]"
    assert decode(tokenizer, row.response_ids) == " It is 2.<|endoftext|>"


def test_raw_prompts_are_encoded_as_they_are_with_one_bos(chatml: PreTrainedTokenizerFast):
    example = Example(prompt="2+2=", demonstration="4", source="f:1")
    assert decode(chatml, render(example, chatml).prompt_ids) == "2+2="
    for template in (INST, None):
        tokenizer = make_tokenizer(template, bos=True)
        row = render(example, tokenizer)
        assert decode(tokenizer, row.prompt_ids) == "<s>2+2="
        assert decode(tokenizer, row.response_ids) == "4<|endoftext|>"
        again = render(Example(prompt="<s>2+2=", answer="4"), tokenizer)
        assert again.prompt_ids == row.prompt_ids and again.response_ids is None


def test_the_tokenizers_own_template_decides_about_bos_and_others_get_it():
    tokenizer = make_tokenizer(CHATML, bos=True)
    assert decode(tokenizer, render(ask(), tokenizer).prompt_ids).startswith("<|im_start|>user")
    assert decode(tokenizer, render(ask(), tokenizer, template=CHATML).prompt_ids).startswith("<s><|im_start|>user")


def test_without_a_template_turns_are_used_as_they_are():
    tokenizer = make_tokenizer(None)
    row = render(ask("b", "c", Message("system", "a")), tokenizer)
    assert (decode(tokenizer, row.prompt_ids), decode(tokenizer, row.response_ids)) == ("a\n\nb", "c<|endoftext|>")
    assert render(ask("b", "c", Message("system", "a")), make_tokenizer(), template="none").prompt_ids == row.prompt_ids


def test_own_templates_inline_and_from_a_file(tmp_path: Path):
    tokenizer = make_tokenizer(None, bos=True)
    inline = "Question: {{ messages[-1]['content'] }}\nAnswer:"
    (tmp_path / "question.jinja").write_text(inline)
    for template in (inline, str(tmp_path / "question.jinja")):
        row = render(ask(), tokenizer, template=template)
        assert decode(tokenizer, row.prompt_ids) == "<s>Question: 1+1?\nAnswer:"
        assert decode(tokenizer, row.response_ids) == "It is 2.<|endoftext|>"
    for wrong, problem in ((str(tmp_path / "absent.jinja"), "cannot be read"), ("{{ messages", "not valid Jinja")):
        with pytest.raises(UserError, match=problem) as caught:
            chat_format(tokenizer, wrong)
        assert caught.value.field == "data.template"


def test_system_text_is_added_where_there_is_none_or_removed(chatml: PreTrainedTokenizerFast):
    with_system, without = ask("b", "c", Message("system", "a")), ask("b", "c")
    added = render(without, chatml, system="a")
    assert added.prompt_ids == render(with_system, chatml).prompt_ids
    assert render(with_system, chatml, system="z").prompt_ids == added.prompt_ids
    assert render(with_system, chatml, system="").prompt_ids == render(without, chatml).prompt_ids
    with pytest.raises(DataError, match="raw text"):
        render(Example(prompt="b", answer="c", source="f:1"), chatml, system="a")


@pytest.mark.parametrize("written", ["<think>\nhm</think>2", "<think>hm</think>2", "hm</think>2"])
def test_a_think_tag_that_the_prompt_opens_is_not_doubled(written: str):
    tokenizer = make_tokenizer(CHATML_THINK)
    row = render(ask("1+1?", written), tokenizer)
    assert decode(tokenizer, row.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert decode(tokenizer, row.response_ids) == "hm</think>2<|im_end|>"
    assert row.opening == "<think>\n"


def test_a_think_tag_stays_where_the_prompt_does_not_open_it(chatml: PreTrainedTokenizerFast):
    row = render(ask("1+1?", "<think>\nhm</think>2"), chatml)
    assert decode(chatml, row.response_ids) == "<think>\nhm</think>2<|im_end|>"
    assert row.opening == ""


def test_a_template_that_strips_thinking_is_refused():
    tokenizer = make_tokenizer(CHATML_STRIPS_THINKING)
    with pytest.raises(DataError, match="changes the response: expected '<think>hm") as caught:
        render(ask("1+1?", "<think>hm</think>2"), tokenizer)
    assert (caught.value.file, caught.value.line) == ("train.jsonl", 7)
    assert "--data.template" in caught.value.remedy
    assert render(ask("1+1?", "2"), tokenizer).response_ids  # nothing stripped, nothing to refuse
    assert render(ask("1+1?", "<think>hm</think>2"), tokenizer, template=CHATML).response_ids


def test_a_template_that_refuses_the_row_is_an_error_with_its_place():
    tokenizer = make_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    with pytest.raises(DataError, match=r"train\.jsonl:7: the chat template refuses the row: no system"):
        render(ask("b", "c", Message("system", "a")), tokenizer)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_an_end_token_inside_the_response_is_refused(chatml: PreTrainedTokenizerFast, token: str):
    with pytest.raises(DataError, match="token that ends responses"):
        render(ask("a", f"b{token}c"), chatml)


def test_an_end_token_inside_a_turn_of_the_prompt_is_refused(chatml: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match="role user contains '<|im_end|>'".replace("|", r"\|")):
        render(ask("a<|im_end|>b"), chatml)
    assert render(
        Example(prompt="a<|im_end|>b", answer="c"), chatml
    ).prompt_ids  # raw prompts may write their own turns


def test_cut_responses_have_no_end_token_and_are_counted(chatml: PreTrainedTokenizerFast):
    examples = [ask("a", "12345"), ask("a", "1234"), ask("a", "123456")]
    done = render_all(examples, chatml, max_response_tokens=5)
    assert [decode(chatml, row.response_ids) for row in done.rows] == ["12345", "1234<|im_end|>", "12345"]
    assert [row.truncated for row in done.rows] == [True, False, True]
    assert done.truncated == 2


def test_long_prompts_are_left_out_and_listed_and_never_cut(chatml: PreTrainedTokenizerFast):
    limit = len(render(ask("ab"), chatml).prompt_ids)
    done = render_all([ask("ab"), ask("abc")], chatml, max_prompt_tokens=limit)
    assert [example.question for example in done.examples] == ["ab"]
    assert len(done.rows) == 1 and [row.source for row in done.too_long] == ["train.jsonl:7"]
    with pytest.raises(DataError, match=f"{limit + 1} tokens, {limit} are allowed"):
        render(ask("abc"), chatml, max_prompt_tokens=limit)
    with pytest.raises(DataError, match="all 1 prompts are too long"):
        render_all([ask("abc")], chatml, max_prompt_tokens=limit)


def test_rows_that_cannot_be_rendered_are_listed_when_asked(chatml: PreTrainedTokenizerFast):
    rows = [ask(), ask("a", "b<|im_end|>")]
    with pytest.raises(DataError):
        render_all(rows, chatml)
    done = render_all(rows, chatml, skip_bad=True)
    assert len(done.rows) == 1 and [row.field for row in done.bad] == ["demonstration"]
    with pytest.raises(DataError, match="2 of 3 rows are bad"):
        render_all([*rows, rows[1]], chatml, skip_bad=True)


# --- what is trained -----------------------------------------------------------------------------------------------


def test_trained_share_counts_tokens():
    rows = [Rendered([1, 2, 3], [4]), Rendered([1, 2], [4, 5, 6, 7]), Rendered([1, 2, 3], None)]
    assert trained_share(rows) == 5 / 10
    assert trained_share(rows, "all") == 1.0


def test_training_on_nothing_is_refused(chatml: PreTrainedTokenizerFast):
    rows = render_all([ask("a", None)], chatml).rows
    for train_on in ("response", "all"):
        with pytest.raises(DataError, match="no token would be trained"):
            trained_share(rows, train_on)


@pytest.mark.parametrize("bos", [False, True])
def test_training_on_everything_is_refused_unless_asked(bos: bool):
    rows = render_all([Example(prompt="", demonstration="All of it.")], make_tokenizer(None, bos=bos)).rows
    assert len(rows[0].prompt_ids) == 1  # something to predict the first token from
    with pytest.raises(DataError, match="every token") as caught:
        trained_share(rows)
    assert 'train_on = "all"' in caught.value.remedy
    assert trained_share(rows, "all") == 1.0


def test_an_example_has_messages_or_a_prompt_text():
    for wrong in ({}, {"messages": (Message("user", "a"),), "prompt": "a"}):
        with pytest.raises(ValueError, match="either"):
            Example(**wrong)


def test_rendered_prompts_are_the_same_until_their_file_changes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Model(path="world:chain/rich"))
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "47a+8?", "completion": "a=55#55"}\n')
    data, kept = Data(source=[str(file)]), RenderedPrompts(tables=2)
    first = kept.load(data, tokenizer)
    again = kept.load(data, load_tokenizer(Model(path="world:chain/poor")))
    assert first == again == load_prompts(data, tokenizer) and first[0] is again[0]
    assert kept.load(data.model_copy(update={"max_response_tokens": 3}), tokenizer) != first
    file.write_text('{"prompt": "47a+9?", "completion": "a=56#56"}\n')
    os.utime(file, ns=(1, 1))
    assert kept.load(data, tokenizer)[0].text == "47a+9?"
