"""Render examples to token ids: the prompt through the chat template, the demonstration as the response to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from thence.data import think
from thence.data.ends import end_token_ids
from thence.data.example import FIRST_ROLES, Example, Message
from thence.data.parts import message_parts
from thence.data.problems import BadRow, RowProblem, refuse_mostly_bad
from thence.data.template import ChatFormat, chat_format, encode, render_text, token_id
from thence.data.written import Place, Written, left_out, written
from thence.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        notes: what the template adds or leaves out without an error, in words.
    """

    prompt_ids: list[int]
    response_ids: list[int] | None
    truncated: bool = False
    opening: str = ""
    notes: tuple[str, ...] = ()


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

    @property
    def notes(self) -> Counter[str]:
        """What the template adds or leaves out, and in how many rows."""
        return Counter(note for row in self.rows for note in row.notes)


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
    the demonstration with its reasoning and its tool calls in the template's form, tokenised by itself, and the
    end-of-turn token. A think tag that the prompt already opens is taken off the demonstration. Where the template
    renders whole conversations, prompt and response together are what it renders for this one up to the end-of-turn
    token; blanks around the demonstration follow the template. Every text of the row is in the prompt or in the
    response, except thinking of earlier turns that the template leaves out; a note says so.

    Args:
        example: what to render.
        tokenizer: a Hugging Face tokenizer.
        system: put before prompts that have no system turn; "" removes the system turn; None leaves prompts alone.
        template: see `chat_format`; pass its result where many examples are rendered.
        max_prompt_tokens: longest prompt allowed.
        max_response_tokens: longest response, end token counted; a longer one is cut and keeps no end token.

    Raises:
        DataError: the prompt is too long; a system text for a raw prompt; the template refuses the row, leaves a part
            of it out or changes it; thinking that is opened and never closed; a turn or the demonstration contains a
            token that ends turns.
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
        refuse_mostly_bad("rendering the data set", good, done.bad, "choose another --data.template or fix the rows")
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
    place = place_of(example, tokenizer, chat, system)
    notes = _prompt_notes(place) if place.templated else ()
    prompt_ids = _prompt_ids(tokenizer, chat, place.prompt, place.templated)
    if max_prompt_tokens is not None and len(prompt_ids) > max_prompt_tokens:
        raise PromptTooLong(
            "prompt",
            f"the prompt has {len(prompt_ids)} tokens, {max_prompt_tokens} are allowed",
            "raise --data.max-prompt-tokens or shorten the row",
        )
    if example.demonstration is None:
        return Rendered(prompt_ids, None, opening=place.opening, notes=notes)
    found = response_of(place, example)
    if found.note:
        notes = (*notes, found.note)
    body = encode(tokenizer, found.text)
    end_id = body.pop() if found.ends and body else chat.end_id
    _check_body(tokenizer, chat, body)
    if max_response_tokens is not None and len(body) + 1 > max_response_tokens:
        return Rendered(prompt_ids, body[:max_response_tokens], truncated=True, opening=place.opening, notes=notes)
    return Rendered(prompt_ids, [*body, end_id], opening=place.opening, notes=notes)


def place_of(
    example: Example, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, system: str | None = None
) -> Place:
    """Where the response to an example goes. Raises RowProblem."""
    messages = _with_system(example, system)
    templated = chat.template is not None and bool(messages)
    _check_known(example, chat, messages, templated)
    if templated:
        _check_turns(tokenizer, chat, messages)
    prompt = _prompt_text(tokenizer, chat, example, messages)
    return Place(tokenizer, chat, messages, example.tools, prompt, think.opening_of(prompt))


def response_of(place: Place, example: Example) -> Written:
    """The response of an example as text. Raises RowProblem."""
    turn = Message("assistant", example.demonstration or "", example.reasoning, example.tool_calls)
    literal = think.without_opening(turn.content, place.opening)
    if not (literal.strip() or turn.reasoning or turn.tool_calls):
        raise RowProblem("demonstration", "nothing is left of it after the think tag", "give the whole response")
    tags = None if turn.reasoning else think.unclosed(turn.content, place.opening)
    if tags is not None:
        where = "the prompt" if place.opening else "it"
        raise RowProblem(
            "demonstration",
            f"{where} opens {tags.opens!r}, and the demonstration never closes it",
            f"give the thinking and {tags.closes!r} before the answer, or a template that opens no thinking "
            "(often data.template_variables = { enable_thinking = false })",
        )
    if not place.templated or place.chat.tail is None:
        if turn.reasoning or turn.tool_calls:
            what = "tool_calls" if turn.tool_calls else "reasoning_content"
            raise RowProblem(
                what,
                "nothing says how to write it: there is no chat template that renders whole conversations",
                "write it into the demonstration's text, or give prompts as messages and a template",
            )
        return Written(literal)
    found = written(place, turn)
    if found.text == literal or found.ends:
        return found
    # Some tokenizers put a blank before any text; then the bare response already gives the conversation's tokens.
    bare = found.text.strip()
    before = encode(place.tokenizer, place.prompt)
    same = before + encode(place.tokenizer, bare) == encode(place.tokenizer, place.prompt + found.text)
    return Written(bare, found.note) if same else found


def _prompt_notes(place: Place) -> tuple[str, ...]:
    """Refuse a prompt that the template writes without a part of the row; say where it leaves thinking out."""
    on_purpose, lost = left_out(place)
    if lost:
        raise RowProblem(
            lost[0],
            "the chat template leaves it out or changes it",
            "give a template that writes every part of the row (--data.template FILE), or remove the part"
            + (" (--data.system '' removes a system turn)" if lost[0].startswith("messages[0]") else ""),
        )
    return ("the template leaves out the thinking of earlier assistant turns",) if on_purpose else ()


def _check_known(example: Example, chat: ChatFormat, messages: Sequence[Message], templated: bool) -> None:
    """Refuse what a template cannot know: tools without a template, roles that it does not name."""
    rich = next((m for m in messages if m.reasoning or m.tool_calls), None)
    if not templated and (example.tools or rich is not None):
        what = "tools" if example.tools else "reasoning or tool calls of a turn"
        raise RowProblem(
            "tools" if example.tools else "messages",
            f"no chat template writes the {what}",
            "give a chat template (--data.template FILE) and prompts as messages, or write them into the text",
        )
    for place, message in enumerate(messages):
        if message.role in ("developer", "tool") and message.role not in (chat.template or ""):
            raise RowProblem(
                f"messages[{place}].role",
                f"the chat template knows no role {message.role}",
                "use role system" if message.role == "developer" else "give a template that writes tool turns",
            )


def _with_system(example: Example, system: str | None) -> tuple[Message, ...]:
    messages = example.messages
    if system is None:
        return messages
    if system == "":
        return messages[1:] if messages and messages[0].role in FIRST_ROLES else messages
    if not messages:
        raise RowProblem(
            "prompt",
            "a system text is set, but this prompt is raw text without turns",
            "leave --data.system out, or give the prompt as a list of messages",
        )
    return messages if messages[0].role in FIRST_ROLES else (Message("system", system), *messages)


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, example: Example, messages: Sequence[Message]
) -> str:
    if example.prompt is not None:
        return example.prompt
    if chat.template is None:
        return "\n\n".join(message.content for message in messages)
    return render_text(tokenizer, chat.template, messages, generate=True, tools=example.tools, variables=chat.variables)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, prompt: str, templated: bool) -> list[int]:
    ids = encode(tokenizer, prompt)
    if chat.bos_id is not None and ids[:1] != [chat.bos_id] and not (templated and chat.writes_bos):
        ids = [chat.bos_id, *ids]
    if not ids:
        # The first response token needs something to be predicted from.
        start = token_id(tokenizer.bos_token_id)
        ids = [chat.end_id if start is None else start]
    return ids


def _check_turns(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, messages: Sequence[Message]) -> None:
    """Refuse turns whose text would end them early: what follows would read as a turn that nobody wrote."""
    for token in tokenizer.convert_ids_to_tokens(list(end_token_ids(tokenizer, chat))):
        for place, message in enumerate(messages):
            if any(token in part.text for part in message_parts(message, place)):
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
