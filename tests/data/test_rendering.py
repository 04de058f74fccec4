"""Rendering examples to the tokens that are trained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.data.chatml import (
    CHATML,
    CHATML_STRIPS_THINKING,
    CHATML_THINK,
    CHATML_TRIM,
    INST,
    LETTERS,
    ask,
    decode,
    make_tokenizer,
)
from thence.data.chat import Rendered, chat_format, end_token_ids, render, render_all, trained_share
from thence.data.example import Example, Message
from thence.data.layouts import parse_row
from thence.data.think import THINK_TAGS
from thence.errors import DataError, UserError
from thence.pipeline.prompts import RenderedPrompts, load_prompts
from thence.recipe import Data, Model
from thence.train.model import load_tokenizer


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_clean_text_comes_through_unchanged(text: str):
    row = json.loads(json.dumps({"prompt": text, "completion": text}))
    example = parse_row("prompt-completion", row, source="f:1", group="f")
    assert (example.prompt, example.demonstration) == (text, text)


def test_prompt_is_the_template_and_response_ends_with_the_end_of_turn_token(chatml: PreTrainedTokenizerFast):
    row = render(ask(), chatml)
    assert decode(chatml, row.prompt_ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(chatml, row.response_ids) == "It is 2.<|im_end|>"
    assert row.response_ids and row.response_ids[-1] == chatml.convert_tokens_to_ids("<|im_end|>")
    assert end_token_ids(chatml) == (row.response_ids[-1], chatml.eos_token_id)


# an answer that opens thinking and never closes it is refused: that is another test's matter
ANSWERS = st.text(LETTERS, min_size=1).filter(lambda a: a.strip() and not any(tags.opens in a for tags in THINK_TAGS))


@given(question=st.text(LETTERS), answer=ANSWERS, trim=st.booleans())
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
