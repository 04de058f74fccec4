"""What a server's answer to a completion request means: a response, a refusal of this one request, trouble, or an end.

Servers and proxies differ in how they say things. Nothing of it may be counted as a model's wrong answer that is not
one, and no answer may be thrown away for its form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thence.data.think import put_back
from thence.errors import UserError
from thence.evaluate.backends import Generation, Refused, RefusedKind
from thence.foreign_text import one_line
from thence.http_client import Answer, asked_wait

NOT_TOLD = "not told"
REFUSALS = (400, 413, 422, 451)  # the request is at fault, perhaps with all others
RETRIED = (408, 409, 425, 429)  # and every 5xx
LONGEST_MESSAGE = 300
LONGEST_SEEN = 3000  # characters of a message that are searched for secrets
MOST_TOKENS = 10**9
# Words for the same ends.
_FINISH = {
    **dict.fromkeys(("max_tokens", "max_length", "model_length", "max_output_tokens", "token_limit"), "length"),
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "completed", "end"), "stop"),
    **dict.fromkeys(("content_filter", "content-filter", "filtered", "safety", "recitation", "sensitive"), "filtered"),
    **dict.fromkeys(("tool_call", "tool_use", "function_call"), "tool_calls"),
}
_TOO_LONG = re.compile(
    r"(?i)context.{0,12}(length|window|size)|too (long|large|many tokens)|longer than|exceed"
    r"|maximum.{0,20}(length|token)|max_(model_len|seq_len|input|tokens|completion_tokens)"
    r"|reduce the length|string_above_max_length"
)
_FILTERED = re.compile(r"(?i)content[ _-]?(filter|policy|management)|responsible_?ai|moderation|flagged|safety system")
_SURROGATES = re.compile("[\ud800-\udfff]")


class Trouble(Exception):
    """A try that failed in a way that may pass.

    Attributes:
        wait: seconds that the server asks for.
        everywhere: it is the server's or the network's fault, for any question.
        dear: a further try would cost as much time or memory.
    """

    def __init__(self, problem: str, wait: float | None = None, *, everywhere: bool = False, dear: bool = False):
        super().__init__(problem)
        self.wait, self.everywhere, self.dear = wait, everywhere, dear


def request_outcome(
    answer: Answer, *, hide: Callable[[str], str], remedy: Callable[[int], str], file: str
) -> Generation | Refused:
    """What became of one request.

    Args:
        hide: takes secrets out of what a server says.
        remedy: by status.
        file: the server's address, as it may be shown.

    Raises:
        Trouble: no response, but there may be one next time.
        UserError: the server will refuse everything.
    """
    status, value = answer.status, None
    if 200 <= status < 300:
        try:
            value = answer.value()
        except ValueError:
            raise Trouble(f"no chat completion but {_what(answer, hide)}") from None
        if not (isinstance(value, dict) and value.get("error") and not value.get("choices")):
            return _generation(answer, value, hide)
        status = _status_of(value["error"])
    said = f"HTTP {status}: {message(answer, hide)}"
    if status in RETRIED or status >= 500:
        raise Trouble(said, asked_wait(answer.headers), everywhere=status == 429)
    if status in REFUSALS:
        return Refused(_kind(status, answer.text), said)
    if 300 <= status < 400:
        place = one_line(hide(answer.headers.get("location", "")[:LONGEST_SEEN]), LONGEST_MESSAGE)
        said = f"HTTP {status}: the server sends requests elsewhere, to {place or 'no address'}, and thence stays here"
    raise UserError(said, remedy=remedy(status), file=file)


def message(answer: Answer, hide: Callable[[str], str] = str) -> str:
    """What a server says is wrong, in one short line."""
    text = answer.text
    try:
        value = answer.value()
        for name in ("error", "message", "detail", "msg"):  # OpenAI; others inside or beside it; FastAPI
            if isinstance(value, dict) and value.get(name):
                value = value[name]
        text = _plain(value)
    except ValueError:
        if _is_page(answer):
            return _what(answer, hide)
    return one_line(hide(text[:LONGEST_SEEN]), LONGEST_MESSAGE) or "(nothing said)"


def refused_name(answer: Answer, body: Mapping[str, Any], droppable: Sequence[str]) -> str | None:
    """The name in a request that a server does not take, if what is meant can be said without it."""
    if answer.status not in (400, 422):
        return None
    text = answer.text[:100_000]
    if "max_tokens" in body and "max_completion_tokens" in text:
        return "max_tokens"
    for name in droppable:
        # A name of one letter is a word: it has to stand in quotes.
        pattern = rf"['\"`]{name}['\"`]" if len(name) == 1 else rf"\b{name}\b"
        if name in body and re.search(pattern, text):
            return name
    return None


def _generation(answer: Answer, value: Any, hide: Callable[[str], str]) -> Generation | Refused:
    """The response in a completion. Raises Trouble where it is not there."""
    try:
        choices = value["choices"]
        choice = next((c for c in choices if c.get("index", 0) == 0), choices[0])
        said = choice["message"] if "message" in choice else {"content": choice["text"]}
        finish = _finish(choice.get("finish_reason"))
        if finish == "filtered":
            return Refused("filtered", f"finish_reason {one_line(str(choice['finish_reason']), 40)}: a content filter")
        if choice.get("error") or finish == "error":
            raise Trouble(f"the server failed: {one_line(hide(_plain(choice.get('error'))), LONGEST_MESSAGE)}")
        content, thoughts = _parts(said.get("content"))
        more = said.get("reasoning_content") or said.get("reasoning") or ""
        thinking = _parts(more)[0] if more else thoughts
        refusal, calls = said.get("refusal"), said.get("tool_calls") or said.get("function_call")
        usage = value.get("usage") or {}
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) and len(choices) == 1 else None
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        shown = one_line(hide(answer.text[:2000]), 200)
        raise Trouble(f"no chat completion ({type(error).__name__}: {error}): {shown}") from None
    if not content and isinstance(refusal, str) and refusal:
        content, finish = _whole(refusal), "refusal"
    elif not content and calls:
        finish = "tool_calls"
    if not content and not thinking and (finish == NOT_TOLD or (said.get("content") is None and finish == "stop")):
        raise Trouble("a chat completion without any text")
    known = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens <= MOST_TOKENS
    return Generation(_with_thinking(content, thinking, finish), tokens if known else None, finish)


def _with_thinking(content: str, thinking: str, finish: str) -> str:
    """A server that takes the thinking out of the response is put right: graders look for the tags.

    So is one whose template has opened the thinking, which no response then repeats.
    """
    if not thinking:
        return put_back(content)
    if finish == "length" and not content:
        return f"<think>\n{thinking}"  # cut while it thought
    return f"<think>\n{thinking}\n</think>\n{content}"


def _parts(content: Any) -> tuple[str, str]:
    """Text and thinking of a content, which may be a list of parts. Raises TypeError."""
    if content is None or isinstance(content, str):
        return _whole(content or ""), ""
    if not isinstance(content, list):
        raise TypeError("content is no text")
    text, thinking = "", ""
    for part in content:
        if isinstance(part, str):
            text += part
        elif part.get("type") in ("thinking", "reasoning"):
            thinking += _parts(part.get("thinking") or part.get("reasoning") or part.get("text"))[0]
        elif isinstance(part.get("text"), str):
            text += part["text"]
        elif isinstance(part.get("refusal"), str):
            text += part["refusal"]
        else:
            raise TypeError(f"a part of the content is no text but {one_line(str(part.get('type')), 40)}")
    return _whole(text), _whole(thinking)


def _whole(text: str) -> str:
    """Lone surrogates, which no file can hold, become the sign for an unreadable character."""
    return _SURROGATES.sub("\ufffd", text)


def _finish(told: Any) -> str:
    if not isinstance(told, str) or not told.strip():
        return NOT_TOLD
    word: str = one_line(told.strip().lower(), 40)
    return _FINISH.get(word, word)


def _kind(status: int, text: str) -> RefusedKind:
    text = text[:100_000]
    if status == 451 or _FILTERED.search(text):
        return "filtered"
    return "too long" if status == 413 or _TOO_LONG.search(text) else "refused"


def _status_of(error: Any) -> int:
    """The status that an error in an answer with status 200 stands for; 500 where it does not say."""
    found = [error.get(name) for name in ("code", "status", "status_code")] if isinstance(error, dict) else []
    for code in found:
        if isinstance(code, str) and code.isascii() and code.isdecimal() and len(code) == 3:
            code = int(code)
        if isinstance(code, int) and 400 <= code < 600:
            return code
    return 400 if isinstance(error, dict) and _FILTERED.search(str(error.get("code"))) else 500


def _plain(value: Any) -> str:
    try:
        return (value if isinstance(value, str) else str(value))[:LONGEST_SEEN]
    except (RecursionError, ValueError):  # deep nesting; a number of thousands of digits
        return "(too deeply nested to show)"


def _is_page(answer: Answer) -> bool:
    return "html" in answer.headers.get("content-type", "").lower() or answer.body.lstrip()[:1] == b"<"


def _what(answer: Answer, hide: Callable[[str], str]) -> str:
    if not answer.body:
        return "an empty answer"
    if _is_page(answer):
        title = re.search(r"(?is)<title[^>]{0,200}>(.{0,500}?)</title>", answer.text[:100_000])
        return f"a web page{f' ({one_line(hide(title[1]), 100)})' if title else ''}: is a proxy in between?"
    return f"no JSON, or too deeply nested: {one_line(hide(answer.text[:2000]), 200)}"
