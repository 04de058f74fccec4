"""Guided problems: the prefix, the guided question, and rows that read as they were written."""

from __future__ import annotations

import json

import pytest
import torch

from thence.data.example import Example, Message, ToolCall
from thence.data.guidance import FRACTIONS, guided, prefix_tokens, row_of, shortest
from thence.data.layouts import choose_layout, parse_row
from thence.data.problems import RowProblem
from thence.objective import group_advantages


def test_the_shortest_prefix_of_the_golden_vector() -> None:
    """A solution of 200 tokens, shares 5 to 25%, successes 0, 0, 0, 2, 5: the prefix has 40 tokens."""
    share = shortest(FRACTIONS, [0, 0, 0, 2, 5])
    assert share is not None and (share, prefix_tokens(share, 200)) == (0.20, 40)
    assert shortest(FRACTIONS, [0, 0, 0]) is None


def test_the_advantages_of_a_guided_group_of_the_golden_vector() -> None:
    rewards = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    found = group_advantages(rewards, torch.zeros(8, dtype=torch.int64))
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25, 0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize(
    ("share", "tokens", "expected"),
    [(0.15, 20, 3), (0.05, 200, 10), (0.05, 3, 1), (0.9, 2, 1), (0.5, 1, 0), (0.5, 0, 0)],
)
def test_a_prefix_has_a_token_at_least_and_never_the_whole_solution(share: float, tokens: int, expected: int) -> None:
    assert prefix_tokens(share, tokens) == expected


def test_plain_text_is_continued_and_a_conversation_is_told_to_continue() -> None:
    assert guided(Example(prompt="1+1?", demonstration="2"), "1+").prompt == "1+1?1+"
    chat = Example(
        messages=(Message("system", "Be brief."), Message("user", "Add {prefix} and {x}.")),
        demonstration="3",
        answer="3",
    )
    found = guided(chat, "First, {problem}")
    assert found.messages[0] == chat.messages[0] and found.demonstration is None and found.answer == "3"
    text = found.messages[1].content
    assert text.startswith(
        "Add {prefix} and {x}.\n\nHere is the beginning of a solution:\n\nFirst, {problem}\n\nContinue"
    )
    assert guided(chat, "A", "<{prefix}|{problem}>").messages[1].content == "<A|Add {prefix} and {x}.>"


def test_a_prompt_that_ends_with_a_tool_turn_has_no_place_for_a_prefix() -> None:
    example = Example(messages=(Message("user", "Ask."), Message("tool", "4", tool_call_id="a")))
    with pytest.raises(RowProblem, match="the last turn of the prompt is of role tool"):
        guided(example, "4")


@pytest.mark.parametrize(
    "example",
    [
        Example(prompt="1+1?", answer="2", group="sums", columns='{"level": 3}'),
        Example(prompt="no answer", group="sums"),
        Example(
            messages=(
                Message("system", "Be brief."),
                Message("user", "What is it?"),
                Message("assistant", "Let me ask.", "I do not know.", (ToolCall("ask", '{"it": 1}', "call-1"),)),
                Message("tool", "7", tool_call_id="call-1", name="ask"),
                Message("user", "So?"),
            ),
            answer="7",
            group="tools",
            tools=('{"type": "function", "function": {"name": "ask", "parameters": {}}}',),
        ),
    ],
)
def test_a_written_row_reads_as_the_same_example(example: Example) -> None:
    row = json.loads(json.dumps(row_of(example, {"pope": "plain"})))
    found = parse_row(choose_layout(row, "rows"), row, source="", group="file")
    columns = json.loads(found.columns)
    assert columns.pop("pope") == "plain" and columns == json.loads(example.columns or "{}")
    names = ("messages", "prompt", "answer", "group", "tools", "demonstration")
    assert {name: getattr(found, name) for name in names} == {name: getattr(example, name) for name in names}
