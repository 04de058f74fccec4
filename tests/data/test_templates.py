"""The templates of common families against the forms of conversations; end tokens; what is shown of an example."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from tests import ROOT
from tests.data.chatml import CHATML, CHATML_THINK, INST, ask, decode, make_tokenizer
from thence.data.chat import chat_format, end_token_ids, render
from thence.data.example import Example, Message
from thence.data.show import Check, checks, segments, terminal_text

FILE = ROOT / "benchmarks" / "chat_templates.py"
SPEC = importlib.util.spec_from_file_location("chat_templates", FILE)
assert SPEC is not None and SPEC.loader is not None
matrix = importlib.util.module_from_spec(SPEC)
sys.modules["chat_templates"] = matrix
SPEC.loader.exec_module(matrix)
FAMILIES = matrix.families()


def texts_in(value: Any) -> list[str]:
    """Every text of a row that a model should see, found without thence."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() if key not in ("role", "type", "id") for text in texts_in(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) and value.strip() else []


def words_of(row: dict[str, Any]) -> set[str]:
    """The words of a row but for names that link turns, tags, and turns after the one that is trained."""
    turns = [dict(turn) for turn in row["messages"]]
    weighed = [place for place, turn in enumerate(turns) if turn.get("weight") == 1]
    found = set()
    for turn in turns[: weighed[0] + 1] if weighed else turns:
        turn = {key: value for key, value in turn.items() if key not in ("tool_call_id", "name")}
        for text in texts_in(turn):
            found |= set(json.dumps(text).replace("<think>", " ").replace("</think>", " ").replace("\\n", " ").split())
    for tool in row.get("tools", ()):
        found |= {tool["function"]["name"], *tool["function"]["description"].split()}
    return {bare for word in found if (bare := word.strip('"\\{}:,'))}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_no_word_of_a_row_is_missing_without_a_word(family: Any) -> None:
    tokenizer = matrix.tokenizer_of(family)
    kept = 0
    for name, _, cell in matrix.cells(family):
        row = matrix.FORMS[name if name in matrix.FORMS else "one turn"]
        if cell.row is None:
            assert cell.refusal, name
            continue
        kept += 1
        text = decode(tokenizer, [*cell.row.prompt_ids, *cell.row.response_ids])
        missing = {word for word in words_of(row) if word not in text}
        thinking = set(row["messages"][1].get("reasoning_content", "").split())
        if any("leaves out the thinking" in note for note in cell.row.notes):
            missing -= thinking
        assert not missing, (name, missing)
        assert cell.row.response_ids[-1] in end_token_ids(tokenizer, "own", matrix.model_of(family, tokenizer)), name
    assert kept >= 2, "a family of which every row is refused tests nothing"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_prompt_and_response_are_what_transformers_renders_for_the_whole_conversation(family: Any) -> None:
    tokenizer = matrix.tokenizer_of(family)
    for name in ("one turn", "several turns", "reasoning"):
        row = matrix.FORMS[name]
        chat = chat_format(tokenizer, "own", family.variables)
        cell = matrix.cell(row, tokenizer, chat)
        if cell.row is None or family.key == "deepseek-r1":  # its whole conversations show no thinking
            continue
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False, **chat.variables)
        ours = [*cell.row.prompt_ids, *cell.row.response_ids]
        assert list(whole)[: len(ours)] == ours, (family.key, name)


def test_the_page_says_what_the_code_does() -> None:
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page()


def test_a_template_that_drops_thinking_trains_it_where_its_prompt_opens_it() -> None:
    family = next(family for family in FAMILIES if family.key == "deepseek-r1")
    tokenizer = matrix.tokenizer_of(family)
    tight = ask("2+2?", "<think>hm</think>4")
    row = render(tight, tokenizer)
    assert decode(tokenizer, row.prompt_ids).endswith("<｜Assistant｜><think>\n")
    assert decode(tokenizer, row.response_ids) == "hm</think>4<｜end▁of▁sentence｜>"


def model_with(generation: Any = None, config: Any = None) -> SimpleNamespace:
    def holder(value: Any) -> SimpleNamespace | None:
        return None if value is None else SimpleNamespace(eos_token_id=value)

    return SimpleNamespace(generation_config=holder(generation), config=holder(config))


def test_every_end_token_stops_sampling_wherever_it_is_named() -> None:
    tokenizer = make_tokenizer()
    end, eos, start = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>", "<|im_start|>"))
    newline = tokenizer.convert_tokens_to_ids("\n")
    assert end_token_ids(tokenizer) == (end, eos)
    assert end_token_ids(tokenizer, "own", model_with()) == (end, eos)
    assert end_token_ids(tokenizer, "own", model_with([eos, start])) == (end, eos, start)
    assert end_token_ids(tokenizer, "own", model_with(start)) == (end, eos, start)
    assert end_token_ids(tokenizer, "own", model_with(config=start)) == (end, eos, start)
    # A model's own generation config is taken at its word; a default of the architecture is not.
    assert end_token_ids(tokenizer, "own", model_with(newline)) == (end, eos, newline)
    assert end_token_ids(tokenizer, "own", model_with(config=newline)) == (end, eos)
    made_up = SimpleNamespace(eos_token_id=newline, _from_model_config=True)
    assert end_token_ids(tokenizer, "own", SimpleNamespace(generation_config=made_up)) == (end, eos)
    assert GenerationConfig(eos_token_id=[1, 2]).eos_token_id == [1, 2]


def test_end_tokens_outside_of_the_vocabulary_are_said_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    assert end_token_ids(tokenizer, "own", model_with([9999, -1])) == end_token_ids(tokenizer)
    assert "9999" in caplog.text


def test_a_padding_token_that_ends_responses_still_does() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    assert tokenizer.pad_token_id in end_token_ids(tokenizer, "own", model_with([tokenizer.pad_token_id]))


def found(example: Example, tokenizer: Any, template: str = "own", **more: Any) -> dict[str, Check]:
    chat = chat_format(tokenizer, template)
    row = render(example, tokenizer, template=chat, system=more.get("system"))
    return {check.name: check for check in checks(example, row, tokenizer, chat, **more)}


def test_segments_are_the_tokens_with_special_ones_by_themselves() -> None:
    tokenizer = make_tokenizer()
    row = render(ask(), tokenizer)
    parts = segments(row, tokenizer)
    assert "".join(part.text for part in parts) == decode(tokenizer, [*row.prompt_ids, *(row.response_ids or ())])
    assert [part.text for part in parts if part.trained] == ["It is 2.", "<|im_end|>"]
    assert [part.text for part in parts if part.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    text = terminal_text(parts)
    assert text.plain.endswith("It is 2.<|im_end|>")
    assert {str(span.style) for span in text.spans} == {"dim", "dim reverse", "bold green", "bold green reverse"}


def test_a_good_example_passes_every_check() -> None:
    tokenizer = make_tokenizer(INST, bos=True)
    stops = end_token_ids(tokenizer)
    looked = found(ask(), tokenizer, stop_ids=stops)
    assert len(looked) == 7 and all(check.ok and not check.remedy for check in looked.values()), looked
    with_system = found(ask(), make_tokenizer(), system="Be brief.")
    assert all(check.ok for check in with_system.values()), with_system


def test_beginning_tokens_are_counted() -> None:
    name = "one beginning token"
    assert found(ask(), make_tokenizer(INST, bos=True))[name].ok
    twice = found(ask(), make_tokenizer("{{ bos_token }}" + INST, bos=True))[name]
    assert twice.ok is False and "2 of '<s>'" in twice.reason and twice.remedy
    apart = found(ask(), make_tokenizer(CHATML, bos=True), "\n{{ bos_token }}" + CHATML)[name]
    assert apart.ok is False and "2 of" in apart.reason
    none = found(ask(), make_tokenizer(CHATML, bos=True))[name]
    assert none.ok is False and "0 of '<s>'" in none.reason
    assert found(ask(), make_tokenizer(CHATML, bos=True), CHATML)[name].ok


def test_an_end_that_is_cut_or_does_not_stop_is_said() -> None:
    tokenizer = make_tokenizer()
    chat = chat_format(tokenizer)
    cut = render(ask(), tokenizer, max_response_tokens=3)
    looked = {check.name: check for check in checks(ask(), cut, tokenizer, chat)}
    assert looked["end of turn is trained"].ok is None
    other = found(ask(), tokenizer, stop_ids=(tokenizer.eos_token_id,))["end of turn stops sampling"]
    assert other.ok is False and "generation_config.json" in other.remedy


def test_tokens_that_merge_across_the_border_are_found() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["1", "+", "?", "2", "?2", "<e>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("?", "2")])), eos_token="<e>"
    )
    looked = found(ask("1+1?", "2"), tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    check = looked["same tokens as the whole conversation"]
    assert check.ok is False and "the response begins at 4" in check.reason


def test_thinking_and_dates_are_looked_at() -> None:
    tokenizer = make_tokenizer(CHATML_THINK)
    assert found(ask("1+1?", "hm</think>2"), tokenizer)["thinking is closed"].ok
    dated = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert found(ask(), dated)["same text every day"].ok is False
    fixed = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}" + CHATML
    chat = chat_format(make_tokenizer(fixed), "own", {"date_string": "1"})
    row = render(ask(), make_tokenizer(fixed), template=chat)
    assert all(check.ok for check in checks(ask(), row, make_tokenizer(fixed), chat))


def test_a_prompt_alone_is_looked_at_too() -> None:
    tokenizer = make_tokenizer()
    example = Example((Message("user", "2+2?"),), answer="4")
    assert set(found(example, tokenizer)) == {
        "one beginning token",
        "same text every day",
        "nothing is left out or added",
    }
