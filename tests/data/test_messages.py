"""What a turn of a conversation may hold: everything is rendered or honoured, or the row is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.chatml import CHATML, CHATML_THINK, decode, make_tokenizer, write_jsonl
from thence.data.chat import chat_format, render, render_all
from thence.data.example import Example, Message, ToolCall
from thence.data.layouts import parse_row
from thence.data.problems import RowProblem
from thence.data.readers import read_examples
from thence.errors import DataError, UserError
from thence.evaluate.problems import load_problems
from thence.evaluate.suites import load_suite

USER = {"role": "user", "content": "2+2?"}
SAID = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": "two"}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
THINKS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
)
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    + CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}",
    )
    + "{# tool #}"
)


def parse(*turns: Any, **more: Any) -> Example:
    return parse_row("messages", {"messages": list(turns), **more}, source="f:1", group="f")


def trained(example: Example, template: str) -> str:
    tokenizer = make_tokenizer(template)
    return decode(tokenizer, render(example, tokenizer).response_ids)


def prompt_of(example: Example, template: str) -> str:
    tokenizer = make_tokenizer(template)
    return decode(tokenizer, render(example, tokenizer).prompt_ids)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_trained_in_the_templates_form_or_the_row_is_refused(key: str):
    example = parse(USER, {**SAID, key: "hm"})
    assert trained(example, THINKS) == "<think>hm</think>4<|im_end|>"
    assert trained(example, CHATML_THINK) == "hm\n</think>\n\n4<|im_end|>"  # the prompt shows how thinking begins
    with pytest.raises(DataError, match="does not write the reasoning") as caught:
        trained(example, CHATML)
    assert caught.value.field == "reasoning_content"
    with pytest.raises(DataError, match="no chat template"):
        render(example, make_tokenizer(None))


def test_reasoning_that_is_empty_or_null_is_none():
    assert parse(USER, {**SAID, "reasoning_content": "", "thinking": None}).reasoning == ""


def test_reasoning_of_an_earlier_turn_is_in_the_prompt_or_noted_or_refused():
    example = parse(USER, {**SAID, "reasoning_content": "hm"}, USER, SAID)
    assert "<think>hm</think>4" in prompt_of(example, THINKS)
    last_only = THINKS.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
    tokenizer = make_tokenizer(last_only)
    done = render_all([example], tokenizer)
    assert done.notes == {"the template leaves out the thinking of earlier assistant turns": 1}
    with pytest.raises(DataError, match=r"messages\[1\]\.reasoning_content: .* leaves it out"):
        prompt_of(example, CHATML)


def test_tools_and_calls_go_through_the_template():
    example = parse(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, tools=[TOOL])
    assert '"name": "add"' in prompt_of(example, CALLS)
    # Arguments in JSON text, as the OpenAI form has them, are not escaped a second time.
    assert trained(example, CALLS) == '<call>{"name": "add", "arguments": {"a": "two"}}</call><|im_end|>'
    beside = parse(USER, {**SAID, "tool_calls": [CALL]}, tools=json.dumps([TOOL]))
    assert trained(beside, CALLS).startswith("4<call>")
    result = parse(USER, {**SAID, "tool_calls": [CALL]}, {"role": "tool", "content": "four"}, SAID, tools=[TOOL])
    assert "<|im_start|>tool\nfour<|im_end|>" in prompt_of(result, CALLS)
    assert result.question == "2+2?"


@pytest.mark.parametrize(
    ("turns", "more", "field"),
    [
        ((USER, SAID), {"tools": [TOOL]}, "tools[0].name"),
        ((USER, {**SAID, "tool_calls": [CALL]}), {}, "tool_calls"),
        ((USER, {**SAID, "tool_calls": [CALL]}, USER, SAID), {}, "messages[1].tool_calls[0].name"),
        ((USER, SAID, {"role": "tool", "content": "x"}, SAID), {}, "messages[2].role"),
        (({"role": "developer", "content": "x"}, USER, SAID), {}, "messages[0].role"),
    ],
)
def test_a_template_that_knows_no_tools_refuses_them(turns: Any, more: dict[str, Any], field: str):
    with pytest.raises(DataError) as caught:
        prompt_of(parse(*turns, **more), CHATML)
    assert caught.value.field == field


def test_a_template_that_drops_a_turn_is_refused_even_where_its_words_stand_elsewhere():
    example = parse({"role": "system", "content": "2"}, USER, SAID)
    with pytest.raises(DataError, match=r"messages\[0\]\.content: .*leaves it out"):
        prompt_of(example, CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"))


def test_a_template_that_fails_on_a_row_refuses_it_without_a_traceback():
    with pytest.raises(DataError, match="fails on the row: TypeError"):
        prompt_of(parse(USER, SAID), CHATML + "{{ 1 + messages[0].content }}")


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0}])
def test_a_turn_that_is_switched_off_is_not_trained(off: dict[str, Any]):
    assert parse(USER, {**SAID, **off}).demonstration is None
    assert parse(USER, {**SAID, **off}).messages == (Message("user", "2+2?"),)
    earlier = parse(USER, {**SAID, "content": "first"}, USER, {**SAID, **off})
    assert (earlier.demonstration, len(earlier.messages)) == ("first", 1)
    last = parse(USER, {**SAID, **off}, USER, {**SAID, "content": "last"})
    assert (last.demonstration, len(last.messages)) == ("last", 3)


def test_weights_that_a_row_cannot_honour_are_refused():
    for turns, problem in [
        ((USER, {**SAID, "weight": 1}, USER, SAID), "2 assistant turns are to be trained"),
        ((USER, {**SAID, "weight": 0.5}), "neither 0 nor 1"),
        (({**USER, "weight": 1}, SAID), "role user is marked"),
        ((USER, {**SAID, "weight": 1, "train": False}), "contradict"),
    ]:
        with pytest.raises(RowProblem, match=problem):
            parse(*turns)
    assert parse({**USER, "weight": 0}, {**SAID, "weight": 1}).demonstration == "4"
    with pytest.raises(RowProblem, match="marked to be trained"):
        row = {"prompt": [USER, {**SAID, "weight": 1}, USER], "completion": "4"}
        parse_row("prompt-completion", row, source="f:1", group="f")
    off = {"prompt": [USER], "completion": [{**SAID, "weight": 0}]}
    assert parse_row("prompt-completion", off, source="f:1", group="f").demonstration is None


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({**SAID, "function_call": {"name": "add"}}, "messages[1].function_call"),
        ({**SAID, "name": "bot"}, "messages[1].name"),
        ({**SAID, "images": ["a.png"]}, "messages[1].images"),
        ({**SAID, "wieght": 0}, "messages[1].wieght"),
        ({**SAID, "reasoning": "a", "thinking": "b"}, "messages[1].reasoning"),
        ({**SAID, "content": "<think>a</think>4", "reasoning": "b"}, "messages[1].content"),
        ({**SAID, "tool_calls": [{"type": "web", "x": 1}]}, "messages[1].tool_calls[0]"),
        (
            {**SAID, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[1].tool_calls[0].arguments",
        ),
        ({**SAID, "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}, None),
        ({**SAID, "content": [{"type": "image", "url": "x"}]}, "messages[1].content[0]"),
        ({**SAID, "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "messages[1].content"),
        ({"role": "function", "content": "4"}, "messages[1].role"),
    ],
)
def test_what_would_be_dropped_makes_a_bad_row_that_names_it(turn: dict[str, Any], field: str | None):
    with pytest.raises(RowProblem) as caught:
        parse(USER, turn)
    assert field is None or caught.value.field == field


def test_columns_that_change_what_a_row_says_are_refused(tmp_path: Path):
    for column, value in {"system": "Be brief.", "images": ["x"], "chat_template_kwargs": {"a": 1}}.items():
        with pytest.raises(DataError) as caught:
            read_examples(write_jsonl(tmp_path / "r.jsonl", [{"messages": [USER, SAID], column: value}]))
        assert caught.value.field == column
    assert read_examples(write_jsonl(tmp_path / "r.jsonl", [{"messages": [USER, SAID], "images": []}]))[0]


def test_text_parts_and_share_gpt_turns_are_read(tmp_path: Path):
    parts = {**SAID, "content": [{"type": "text", "text": "4", "image": None}]}
    assert parse(USER, parts).demonstration == "4"
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    (example,), _ = read_examples(write_jsonl(tmp_path / "share.jsonl", [{"conversations": turns, "id": 7}]))
    assert [m.role for m in example.messages] == ["system", "user"] and example.demonstration == "4"
    with pytest.raises(RowProblem, match="unknown speaker 'observation'"):
        parse({"from": "observation", "value": "x"}, SAID)


def test_nulls_that_parquet_adds_to_turns_say_nothing(tmp_path: Path):
    turns = [
        {"role": "user", "content": "2+2?"},
        {**SAID, "tool_calls": [CALL], "reasoning_content": "hm", "weight": 1},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "tools": [TOOL]}]), tmp_path / "r.parquet")
    (example,), _ = read_examples(str(tmp_path / "r.parquet"))
    assert example.messages == (Message("user", "2+2?"),)
    assert (example.reasoning, example.tool_calls) == ("hm", (ToolCall("add", '{"a": "two"}', "c1"),))


def test_evaluation_refuses_problems_that_it_would_render_in_part(tmp_path: Path):
    file = write_jsonl(tmp_path / "p.jsonl", [{"messages": [USER], "tools": [TOOL], "answer": "4"}])
    (task,) = load_suite(file, {}).tasks
    with pytest.raises(DataError, match="does not render"):
        load_problems(task, None, None)


@pytest.mark.parametrize(
    ("opens", "closes"), [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<reasoning>", "</reasoning>")]
)
def test_thinking_that_is_opened_and_never_closed_is_refused(opens: str, closes: str):
    opened = CHATML.replace("assistant\n{% endif %}", f"assistant\n{opens}\n{{% endif %}}")
    with pytest.raises(DataError, match=r"the prompt opens .* never closes it"):
        trained(parse(USER, SAID), opened)
    assert trained(parse(USER, {**SAID, "content": f"hm{closes}4"}), opened) == f"hm{closes}4<|im_end|>"
    with pytest.raises(DataError, match=r"it opens .* never closes it"):
        trained(parse(USER, {**SAID, "content": f"{opens}hm 4"}), CHATML)
    tokenizer = make_tokenizer(opened)
    assert render(parse(USER, answer="4"), tokenizer).opening == f"{opens}\n"


SWITCH = CHATML.replace("assistant\n{% endif %}", "assistant\n{% if think is false %}<no>{% endif %}{% endif %}")


def test_template_variables_reach_every_rendering_and_unknown_ones_are_refused():
    tokenizer = make_tokenizer(SWITCH)
    off = render(parse(USER, answer="4"), tokenizer, template=chat_format(tokenizer, "own", {"think": False}))
    assert decode(tokenizer, off.prompt_ids).endswith("assistant\n<no>")
    for given in ({"thnk": False}, {"messages": []}, {"eos_token": "x"}, {"add_generation_prompt": True}):
        with pytest.raises(UserError, match="does not read") as caught:
            chat_format(tokenizer, "own", given)
        assert caught.value.field == "data.template_variables" and "think" in caught.value.remedy
    with pytest.raises(UserError, match="no chat template"):
        chat_format(make_tokenizer(None), "own", {"think": False})


def test_variables_are_found_behind_generation_tags_and_defaults():
    jinja = "{% if not day is defined %}{% set day = 'x' %}{% endif %}" + CHATML.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    tokenizer = make_tokenizer(jinja)
    assert chat_format(tokenizer, "own", {"day": "Monday"}).variables == {"day": "Monday"}


def test_a_variable_decides_about_the_end_of_turn_too():
    jinja = CHATML.replace("<|im_end|>", "{{ '<|endoftext|>' if plain else '<|im_end|>' }}")
    tokenizer = make_tokenizer(jinja)
    assert chat_format(tokenizer, "own", {"plain": True}).end_id == tokenizer.eos_token_id
    assert chat_format(tokenizer).end_id != tokenizer.eos_token_id


def test_several_named_templates_without_a_default_are_an_error_and_not_a_traceback():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}  # type: ignore[assignment]
    with pytest.raises(UserError, match="rag, tool_use"):
        chat_format(tokenizer)
