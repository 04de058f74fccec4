"""What generates the responses of an evaluation; how prompts become tokens and tokens text, for all of them alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from thence.data.chat import chat_format, end_token_ids, render
from thence.data.example import Example, Message

if TYPE_CHECKING:
    from thence.evaluate.problems import Problem
    from thence.evaluate.suites import Task

ROOM_STEP = 64


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be generated: the sample of that number (from 0) of a problem, by its own seed (63 bits)."""

    problem: Problem
    sample: int
    seed: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated response.

    Attributes:
        text: as it was generated, without the token that ended it; other special tokens are kept.
        tokens: its length with the end token; None where a server does not tell.
        finish: "stop": it ended by itself; "length": it was cut; servers have other words for other ends.
        room: most tokens that the model's context left for it, where that was fewer than the task's `max_tokens`.
    """

    text: str
    tokens: int | None
    finish: str
    room: int | None = None


class Backend(Protocol):
    """Generates responses. `close` ends whatever it holds and may be called twice."""

    @property
    def name(self) -> str:
        """native, endpoint or vllm."""
        ...

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
        """Every request with its response, in the order in which they end. Raises UserError when it cannot go on."""
        ...

    def facts(self) -> dict[str, Any]:
        """Plain values that a number depends on: model, weights, versions, dtype, chat template."""
        ...

    def close(self) -> None:
        """End what it holds."""
        ...


class Prompts:
    """Turns problems into tokens and says where their responses end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: "own", "none" or a Jinja file, see `thence.data.template.chat_format`.

    Raises:
        UserError: as `chat_format`.
    """

    def __init__(self, tokenizer: Any, chat_template: str = "own"):
        self.tokenizer = tokenizer
        self.chat, self.plain = chat_format(tokenizer, chat_template), chat_format(tokenizer, "none")

    def ids(self, problem: Problem) -> list[int]:
        """The problem's messages with the header of the assistant's turn, or its plain text. Raises DataError."""
        messages = tuple(Message(role, content) for role, content in problem.messages)
        example = Example(messages=messages, answer=problem.answer, source=problem.source or problem.key)
        return render(example, self.tokenizer, template=self.plain if problem.plain else self.chat).prompt_ids

    def stop_ids(self, problem: Problem) -> tuple[int, ...]:
        """The tokens that end a response to it."""
        return end_token_ids(self.tokenizer, self.plain if problem.plain else self.chat)


def response_text(tokenizer: Any, token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of a response without its end token.

    Special tokens inside are kept: where a think tag is one, the rules that look for it need it.
    """
    ids = list(token_ids)
    if ids and ids[-1] in stop_ids:
        ids.pop()
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def room_for(prompt_tokens: int, max_tokens: int, context: int | None) -> int:
    """Most tokens that a response may have: `max_tokens`, or what the model's context leaves after the prompt.

    What is left is rounded down to a multiple of 64, so that prompts of nearly one length can be sampled side by
    side, and a response still does not depend on what is sampled beside it. 0: the prompt does not fit.
    """
    left = max_tokens if context is None else context - prompt_tokens
    if left >= max_tokens:
        return max_tokens
    return max(0, left - left % ROOM_STEP if left > ROOM_STEP else left)
