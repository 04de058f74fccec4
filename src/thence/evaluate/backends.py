"""What generates the responses of an evaluation; how prompts become tokens and tokens text, for all of them alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from thence.data.chat import Rendered, chat_format, end_token_ids, render
from thence.data.example import Example, Message
from thence.data.response import response_text
from thence.data.trajectory import Said

if TYPE_CHECKING:
    from thence.evaluate.problems import Problem
    from thence.evaluate.suites import Task
    from thence.rollout.native import Response

log = logging.getLogger(__name__)
ROOM_STEP = 64


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be generated: the sample of that number (from 0) of a problem, by its own seed (63 bits).

    `refused_before`: an earlier start of the evaluation got no response to it.
    """

    problem: Problem
    sample: int
    seed: int
    refused_before: bool = False


@dataclass(frozen=True, slots=True)
class GivenScore:
    """What an environment gave a response while it was sampled: no grader can give it again.

    Attributes:
        version: of the environment's file, see `thence.evaluate.versions`; empty in samples of older versions.
    """

    verdict: Literal["right", "wrong", "graded", "unknown"]
    score: float
    reason: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated response.

    Attributes:
        text: as it was generated, without the token that ended it, after the think tag that the prompt had opened;
            other special tokens are kept.
        tokens: its length with the end token; None where a server does not tell.
        finish: "stop": it ended by itself; "length": it was cut; servers have other words for other ends, and some do
            not tell.
        room: most tokens that the model's context left for it, where that was fewer than the task's `max_tokens`.
        score: what the environment gave it, where one did.
        turns: who said what, in order, where there were several turns.
    """

    text: str
    tokens: int | None
    finish: str
    room: int | None = None
    score: GivenScore | None = None
    turns: tuple[Said, ...] = ()


RefusedKind = Literal["too long", "filtered", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Refused:
    """No response to one request, where the fault is the request's and not everybody's: others may be answered.

    Attributes:
        kind: "too long" for the model's context; "filtered" by a content filter; "refused" for another reason;
            "failed": the server tried and failed, several times.
        reason: what the server said, one line.
    """

    kind: RefusedKind
    reason: str


class Backend(Protocol):
    """Generates responses. `close` ends its processes and may be called twice."""

    @property
    def name(self) -> str:
        """native, endpoint or vllm."""
        ...

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation | Refused]]:
        """Every request with its response, in the order in which they end. Raises UserError when it cannot go on."""
        ...

    def facts(self) -> dict[str, Any]:
        """Plain values that a number depends on: model, weights, versions, dtype, chat template."""
        ...

    def close(self) -> None:
        """End what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """A request as a sampler reads it.

    Attributes:
        token_ids: of its prompt.
        stop_ids: tokens that end a response.
        room: most tokens of a response.
        cut: `room`, where that is fewer than the task's `max_tokens`; else None.
        opening: the think tag that the prompt has opened, or nothing.
    """

    request: Request
    token_ids: Sequence[int]
    stop_ids: tuple[int, ...]
    room: int
    cut: int | None
    opening: str


class Prompts:
    """Turns problems into tokens and says where their responses end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: "own", "none" or a Jinja file, see `thence.data.template.chat_format`.
        variables: of the chat template.
        model: what names end tokens besides: has a `generation_config` and a `config`.

    Raises:
        UserError: as `chat_format`.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str = "own",
        variables: Mapping[str, Any] | None = None,
        model: Any = None,
    ):
        self.tokenizer = tokenizer
        self.chat, self.plain = chat_format(tokenizer, chat_template, variables), chat_format(tokenizer, "none")
        self._stop_ids = {chat.template: end_token_ids(tokenizer, chat, model) for chat in (self.plain, self.chat)}

    def rendered(self, problem: Problem) -> Rendered:
        """The problem's messages with the header of the assistant's turn, or its plain text. Raises DataError."""
        messages = tuple(Message(role, content) for role, content in problem.messages)
        example = Example(messages=messages, answer=problem.answer, source=problem.source or problem.key)
        return render(example, self.tokenizer, template=self.plain if problem.plain else self.chat)

    def prepare(
        self, requests: Sequence[Request], task: Task, context: int | None
    ) -> tuple[list[Ready], list[tuple[Request, Refused]]]:
        """The requests that can be sampled, longest prompts first and the samples of a problem side by side; and those
        whose prompt leaves nothing of the model's context: no response is made up for them.

        Prompts that leave less than `max_tokens` of the context are counted in the log.
        """
        rendered = {r.problem.key: self.rendered(r.problem) for r in requests}
        rooms = {key: room_for(len(row.prompt_ids), task.max_tokens, context) for key, row in rendered.items()}
        short = [room for room in rooms.values() if 0 < room < task.max_tokens]
        if short:
            log.warning(
                "%s: %d of %d prompts leave fewer than max_tokens = %d of the model's context of %s; their responses "
                "are cut earlier, the shortest at %d tokens",
                *(task.name, len(short), len(rooms), task.max_tokens, context, min(short)),
            )
        ready, refused = [], []
        for request in requests:
            row, room = rendered[request.problem.key], rooms[request.problem.key]
            if room == 0:
                reason = f"the prompt has {len(row.prompt_ids):,} tokens, the model's context {context:,}"
                refused.append((request, Refused("too long", reason)))
                continue
            stop_ids = self._stop_ids[(self.plain if request.problem.plain else self.chat).template]
            cut = room if room < task.max_tokens else None
            ready.append(Ready(request, row.prompt_ids, stop_ids, room, cut, row.opening))
        ready.sort(key=lambda one: (-len(one.token_ids), one.request.problem.key, one.request.sample))
        return ready, refused

    def generation(self, ready: Ready, response: Response) -> Generation:
        """What a sampler answered, as text."""
        text = response_text(self.tokenizer, response.token_ids, ready.stop_ids, ready.opening)
        return Generation(text, len(response.token_ids), response.finish, ready.cut)


def room_for(prompt_tokens: int, max_tokens: int, context: int | None) -> int:
    """Most tokens that a response may have: `max_tokens`, or what the model's context leaves after the prompt.

    What is left is rounded down to a multiple of 64, so that prompts of nearly one length can be sampled side by
    side, and a response still does not depend on what is sampled beside it. 0: the prompt does not fit.
    """
    left = max_tokens if context is None else context - prompt_tokens
    if left >= max_tokens:
        return max_tokens
    return max(0, left - left % ROOM_STEP if left > ROOM_STEP else left)
