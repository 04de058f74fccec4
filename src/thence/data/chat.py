"""Render examples to token ids: the prompt through the chat template, the demonstration as the response to train on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from thence.data.example import Example, Message
from thence.data.problems import BadRow, RowProblem, refuse_mostly_bad
from thence.data.template import ChatFormat, chat_format, encode, end_token_ids, render_text, token_id
from thence.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatFormat",
    "Rendered",
    "RenderedSet",
    "chat_format",
    "end_token_ids",
    "render",
    "render_all",
    "trained_share",
]

_THINK = "<think>"
_SHOWN = 40


class PromptTooLong(RowProblem):
    """A rendered prompt is longer than allowed. Prompts are never cut: a cut problem is another problem."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as token ids.

    Attributes:
        prompt_ids: the prompt, up to where the model takes over; never empty.
        response_ids: the demonstration and its end-of-turn token, never empty; None where there is no demonstration.
        truncated: the response was cut to the limit, and so has no end token: a cut must not teach to stop there.
        opening: the think tag that the prompt ends with ("<think>\\n"), which a grader has to put back before the
            response; else "".
    """

    prompt_ids: list[int]
    response_ids: list[int] | None
    truncated: bool = False
    opening: str = ""


@dataclass(frozen=True, slots=True)
class RenderedSet:
    """A rendered data set.

    Attributes:
        examples: the examples kept.
        rows: their renderings, in the same order.
        too_long: the examples left out because their prompt is too long.
        bad: the examples left out because they cannot be rendered (only with `skip_bad`).
    """

    examples: list[Example]
    rows: list[Rendered]
    too_long: list[BadRow]
    bad: list[BadRow]

    @property
    def truncated(self) -> int:
        """How many responses were cut to the limit."""
        return sum(row.truncated for row in self.rows)


def render(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    template: str | ChatFormat = "own",
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
) -> Rendered:
    """Render one example.

    The prompt is the chat template with the generation prompt; a raw prompt text is encoded as it is. The response is
    the demonstration, tokenised by itself, and the end-of-turn token. A think tag that the prompt already opens is
    taken off the demonstration. Where the template renders whole conversations, prompt and response together are what
    it renders for this one up to the end-of-turn token; blanks around the demonstration follow the template.

    Args:
        example: what to render.
        tokenizer: a Hugging Face tokenizer.
        system: put before prompts that have no system turn; "" removes the system turn; None leaves prompts alone.
        template: see `chat_format`; pass its result where many examples are rendered.
        max_prompt_tokens: longest prompt allowed.
        max_response_tokens: longest response, end token counted; a longer one is cut and keeps no end token.

    Raises:
        DataError: the prompt is too long; a system text for a raw prompt; the template refuses the row or changes the
            demonstration (strips its thinking, say); a turn or the demonstration contains a token that ends turns.
        UserError: as `chat_format`.
    """
    chat = template if isinstance(template, ChatFormat) else chat_format(tokenizer, template)
    try:
        return _render(example, tokenizer, chat, system, max_prompt_tokens, max_response_tokens)
    except RowProblem as problem:
        raise problem.error(example.source) from problem.__cause__


def render_all(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    template: str | ChatFormat = "own",
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    skip_bad: bool = False,
) -> RenderedSet:
    """Render a data set: as `render`, but prompts that are too long are left out and listed, and with `skip_bad` all
    other rows that cannot be rendered too.

    Raises:
        DataError: as `render`; also when nothing is left, or more than half of the rows are bad.
        UserError: as `chat_format`.
    """
    chat = template if isinstance(template, ChatFormat) else chat_format(tokenizer, template)
    done = RenderedSet([], [], [], [])
    for example in examples:
        try:
            row = _render(example, tokenizer, chat, system, max_prompt_tokens, max_response_tokens)
        except PromptTooLong as problem:
            done.too_long.append(problem.bad_row(example.source))
        except RowProblem as problem:
            if not skip_bad:
                raise problem.error(example.source) from problem.__cause__
            done.bad.append(problem.bad_row(example.source))
        else:
            done.examples.append(example)
            done.rows.append(row)
    if done.bad:
        good = len(done.rows) + len(done.too_long)
        refuse_mostly_bad("rendering the data set", good, done.bad, "choose another --data.template or mend the rows")
    if not done.rows and done.too_long:
        raise DataError(
            f"all {len(done.too_long)} prompts are too long; the first is {done.too_long[0]}",
            remedy="raise --data.max-prompt-tokens",
            field="data.max_prompt_tokens",
        )
    return done


def trained_share(rendered_rows: Sequence[Rendered], train_on: Literal["response", "all"] = "response") -> float:
    """The share of the tokens that would be trained: trained tokens / tokens of rows with a response, in (0, 1].

    Rows without a response are not trained on. A lone first token (bos) is not a prompt and is not counted.

    Args:
        rendered_rows: the data set.
        train_on: "response": responses with their end tokens; "all": prompts too.

    Raises:
        DataError: no token would be trained; or every token would, which nobody asked for by `train_on="all"`.
    """
    answered = [row for row in rendered_rows if row.response_ids]
    response = sum(len(row.response_ids or ()) for row in answered)
    prompt = sum(len(row.prompt_ids) for row in answered if len(row.prompt_ids) > 1)
    if response == 0:
        raise DataError(
            f"none of the {len(rendered_rows)} rows has a demonstration, so no token would be trained",
            remedy="give a data set with demonstrations, or name their column with --data.columns completion=COLUMN",
        )
    if train_on == "all":
        return 1.0
    if prompt == 0:
        raise DataError(
            "no row has a prompt, so every token of the data set would be trained",
            remedy='set train_on = "all" if that is meant; otherwise give prompts (messages, or prompt + completion)',
        )
    return response / (response + prompt)


def _render(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatFormat,
    system: str | None,
    max_prompt_tokens: int | None,
    max_response_tokens: int | None,
) -> Rendered:
    messages = _with_system(example, system)
    templated = chat.template is not None and bool(messages)
    if templated:
        _check_turns(tokenizer, chat, messages)
    prompt = _prompt_text(tokenizer, chat, example, messages)
    prompt_ids = _prompt_ids(tokenizer, chat, prompt, templated)
    if max_prompt_tokens is not None and len(prompt_ids) > max_prompt_tokens:
        raise PromptTooLong(
            "prompt",
            f"the prompt has {len(prompt_ids)} tokens, {max_prompt_tokens} are allowed",
            "raise --data.max-prompt-tokens or shorten the row",
        )
    opening = _opening(prompt)
    if example.demonstration is None:
        return Rendered(prompt_ids, None, opening=opening)
    response = _without_opening(example.demonstration, opening)
    if not response.strip():
        raise RowProblem("demonstration", "nothing is left of it after the think tag", "give the whole response")
    if templated and chat.template is not None and chat.tail is not None:
        turn = Message("assistant", opening + response)
        whole = render_text(tokenizer, chat.template, (*messages, turn))
        response = _as_rendered(tokenizer, prompt, response, whole, chat.tail)
    body = encode(tokenizer, response)
    _check_body(tokenizer, chat, body)
    if max_response_tokens is not None and len(body) + 1 > max_response_tokens:
        return Rendered(prompt_ids, body[:max_response_tokens], truncated=True, opening=opening)
    return Rendered(prompt_ids, [*body, chat.end_id], opening=opening)


def _with_system(example: Example, system: str | None) -> tuple[Message, ...]:
    messages = example.messages
    if system is None:
        return messages
    if system == "":
        return messages[1:] if messages and messages[0].role == "system" else messages
    if not messages:
        raise RowProblem(
            "prompt",
            "a system text is set, but this prompt is raw text without turns",
            "leave --data.system out, or give the prompt as a list of messages",
        )
    return messages if messages[0].role == "system" else (Message("system", system), *messages)


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, example: Example, messages: Sequence[Message]
) -> str:
    if example.prompt is not None:
        return example.prompt
    if chat.template is None:
        return "\n\n".join(message.content for message in messages)
    return render_text(tokenizer, chat.template, messages, generate=True)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, prompt: str, templated: bool) -> list[int]:
    ids = encode(tokenizer, prompt)
    if chat.bos_id is not None and ids[:1] != [chat.bos_id] and not (templated and chat.writes_bos):
        ids = [chat.bos_id, *ids]
    if not ids:
        # The first response token needs something to be predicted from.
        start = token_id(tokenizer.bos_token_id)
        ids = [chat.end_id if start is None else start]
    return ids


def _opening(prompt: str) -> str:
    bare = prompt.rstrip("\n")
    return _THINK + prompt[len(bare) :] if bare.endswith(_THINK) else ""


def _without_opening(demonstration: str, opening: str) -> str:
    if not opening or not demonstration.startswith(_THINK):
        return demonstration
    if demonstration.startswith(opening):
        return demonstration[len(opening) :]
    return demonstration.removeprefix(_THINK).lstrip("\n")


def _as_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, whole: str, tail: str) -> str:
    """The response as the template writes it into the whole conversation; it may differ from ours in outer blanks only.

    Raises:
        RowProblem: the template does not continue the prompt by the response.
    """
    written = whole[len(prompt) :].removesuffix(tail) if whole.startswith(prompt) else None
    if written == response:
        return response
    if written is None or written.strip() != response.strip():
        raise RowProblem(
            "demonstration",
            f"the chat template changes the response: {_difference(prompt + response, whole)}",
            "give a template that keeps responses as they are (--data.template FILE), or write the demonstrations "
            "in the template's form",
        )
    # Some tokenizers put a blank before any text; then the bare response already gives the conversation's tokens.
    bare = response.strip()
    ours = encode(tokenizer, prompt) + encode(tokenizer, bare)
    return bare if ours == encode(tokenizer, prompt + written) else written


def _difference(ours: str, theirs: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"expected {ours[start : start + _SHOWN]!r}, the template writes {theirs[start : start + _SHOWN]!r}"


def _check_turns(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, messages: Sequence[Message]) -> None:
    """Refuse turns whose text would end them early: what follows would read as a turn that nobody wrote."""
    for token in tokenizer.convert_ids_to_tokens(list(end_token_ids(tokenizer, chat))):
        for message in messages:
            if token in message.content:
                raise RowProblem(
                    "prompt",
                    f"a turn of role {message.role} contains {token!r}, a token that ends turns",
                    "remove it from the text: the chat template adds it after the turn",
                )


def _check_body(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, body: list[int]) -> None:
    if not body:
        raise RowProblem("demonstration", "the tokenizer makes no token of it", "give a response in the model's text")
    ends = set(end_token_ids(tokenizer, chat)) & set(body)
    if ends:
        token = str(tokenizer.convert_ids_to_tokens(min(ends)))
        raise RowProblem(
            "demonstration",
            f"the response contains {token!r}, a token that ends responses",
            "remove it from the text: the end-of-turn token is added after the response",
        )
