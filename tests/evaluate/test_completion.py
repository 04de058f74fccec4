"""Completions in every form that servers give them: a response is read, trouble is no wrong answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.evaluate.asking import short
from thence.errors import UserError
from thence.evaluate.backends import Generation, Refused
from thence.evaluate.completion import request_outcome
from thence.http_client import Answer as HttpAnswer


def read(value: Any, status: int = 200, **headers: str) -> Generation | Refused:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    answer = HttpAnswer(status, headers, body)
    return request_outcome(answer, hide=str, remedy=lambda status: "remedy", file="url")


def completion(content: Any, finish: Any = "stop", usage: Any = None, **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish}], "usage": usage}


PARTS = [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2"}]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (completion("4", None), Generation("4", None, "not told")),
        (completion("4", 7), Generation("4", None, "not told")),
        ({"choices": [{"message": {"content": "4"}}]}, Generation("4", None, "not told")),
        (completion("4", "MAX_TOKENS"), Generation("4", None, "length")),
        (completion("4", "eos"), Generation("4", None, "stop")),
        (completion("", "length", {"completion_tokens": 64}), Generation("", 64, "length")),
        (completion(None, "length"), Generation("", None, "length")),
        (completion("", "stop", {"completion_tokens": 1}), Generation("", 1, "stop")),
        (completion(None, "tool_calls", tool_calls=[{"id": 1}]), Generation("", None, "tool_calls")),
        (completion(None, "stop", tool_calls=[{"id": 1}]), Generation("", None, "tool_calls")),
        (completion(None, "stop", refusal="I cannot"), Generation("I cannot", None, "refusal")),
        (completion([{"type": "refusal", "refusal": "No."}]), Generation("No.", None, "stop")),
        (completion(PARTS), Generation("four", None, "stop")),
        (completion(["fo", "ur"]), Generation("four", None, "stop")),
        (completion([THOUGHT, *PARTS]), Generation("<think>\n2 and 2\n</think>\nfour", None, "stop")),
        (completion("", "length", reasoning="2 and"), Generation("<think>\n2 and", None, "length")),
        (completion("x\ud800y"), Generation("x\ufffdy", None, "stop")),
        *(
            (completion("4", "stop", usage), Generation("4", None, "stop"))
            for usage in (None, [], "5", {}, {"completion_tokens": None}, {"completion_tokens": "5"})
        ),
        *(
            (completion("4", "stop", {"completion_tokens": tokens}), Generation("4", None, "stop"))
            for tokens in (-1, 10**30, True, 1.5, float("nan"), float("inf"))
        ),
        (
            {
                "choices": [
                    {"index": 1, "message": {"content": "5"}, "finish_reason": "stop"},
                    {"index": 0, "message": {"content": "4"}, "finish_reason": "stop"},
                ],
                "usage": {"completion_tokens": 9},
            },
            Generation("4", None, "stop"),
        ),
    ],
    ids=short,
)
def test_a_response_is_read_from_every_form_of_it(value: Any, expected: Generation) -> None:
    assert read(value) == expected


@pytest.mark.parametrize("word", ["content_filter", "SAFETY", "recitation"])
def test_what_a_filter_cut_is_not_the_models_answer(word: str) -> None:
    found = read(completion("half an ans", word))
    assert isinstance(found, Refused) and found.kind == "filtered" and word in found.reason


@pytest.mark.parametrize(
    "value",
    [
        *({"choices": choices} for choices in ([], None, {}, "x", [None], [3], [{}], [{"message": None}])),
        *(completion(content) for content in (4, {"text": "4"}, [3], [{"type": "image_url"}], [None])),
        completion(None, None),
        completion("", None),
        completion(None, "stop"),
        completion("partial", "error"),
        {"choices": [{"error": {"code": 502}, "message": {"content": ""}, "finish_reason": "stop"}]},
        {"error": {"message": "overloaded", "code": 503}},
        {"error": "overloaded"},
        *([], 3, None, "text", {}),
        *(b"", b"{", b"\xff\xfe{}", b"<html>", b"[" * 100_000, b"1" * 9000),
    ],
    ids=short,
)
def test_what_holds_no_response_is_trouble_and_never_a_wrong_answer(value: Any) -> None:
    from thence.evaluate.completion import Trouble

    with pytest.raises(Trouble):
        read(value)


@pytest.mark.parametrize(("code", "stops"), [(401, True), ("404", True), (400, False)])
def test_an_error_with_status_200_means_what_it_says(code: Any, stops: bool) -> None:
    value = {"error": {"code": code, "message": "no"}}
    if stops:
        with pytest.raises(UserError, match=str(code)):
            read(value)
    else:
        assert isinstance(read(value), Refused)
