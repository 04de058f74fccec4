"""Chat templates: which one is used, how it renders, and which token ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thence.data.example import Message
from thence.data.problems import RowProblem
from thence.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words no template writes by itself; plain letters, so that no template strips or escapes them.
_USER_PROBE, _ASSISTANT_PROBE = "quxquestion", "quxresponse"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A chat template together with what probing it has told.

    Attributes:
        template: the Jinja text; None: no template, the turns' texts are used as they are.
        end_id: the token trained after every response: the template's end of turn, else the tokenizer's eos.
        tail: the text the template writes after an assistant turn ("<|im_end|>\\n"); None where the template only
            writes prompts, so that there is no rendered conversation to compare with.
        bos_id: the bos token if the tokenizer puts it before plain text, else None.
        writes_bos: the template is trusted to write the bos token itself; otherwise it is put before the prompt.
    """

    template: str | None
    end_id: int
    tail: str | None
    bos_id: int | None
    writes_bos: bool = False


def chat_format(tokenizer: PreTrainedTokenizerBase, template: str = "own") -> ChatFormat:
    """Find and probe a chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: "own" (the tokenizer's; "none" if it has none), "none", the path of a Jinja file, or Jinja text.
            The tokenizer's own template is trusted to write the bos token; with any other, the tokenizer's bos is
            added once if the tokenizer adds it to plain text.

    Raises:
        UserError: the template cannot be read or is broken, or no token could end a response.
    """
    if template == "own" and tokenizer.chat_template is None:
        template = "none"
    bos_id = _bos_added_to_text(tokenizer)
    if template == "none":
        return ChatFormat(None, _eos(tokenizer), None, bos_id)
    jinja = tokenizer.get_chat_template() if template == "own" else _template_text(template)
    tail = _tail(tokenizer, jinja)
    end_id = None if tail is None else _end_of_turn(tokenizer, tail)
    return ChatFormat(jinja, _eos(tokenizer) if end_id is None else end_id, tail, bos_id, writes_bos=template == "own")


def end_token_ids(tokenizer: PreTrainedTokenizerBase, template: str | ChatFormat = "own") -> tuple[int, ...]:
    """All tokens that stop sampling: the trained end-of-turn token first, then the tokenizer's eos if it is another.

    Raises:
        UserError: as `chat_format`.
    """
    chat = template if isinstance(template, ChatFormat) else chat_format(tokenizer, template)
    eos = token_id(tokenizer.eos_token_id)
    return (chat.end_id,) if eos is None or eos == chat.end_id else (chat.end_id, eos)


def render_text(
    tokenizer: PreTrainedTokenizerBase, jinja: str, messages: Sequence[Message], *, generate: bool = False
) -> str:
    """The text a chat template makes of `messages`; `generate` adds the header of the assistant's turn.

    Raises:
        RowProblem: the template refuses these messages, e.g. because it knows no system turn.
        UserError: the template is not valid Jinja.
    """
    import jinja2

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=jinja, tokenize=False, add_generation_prompt=generate, continue_final_message=False
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja: {error.message} (line {error.lineno})",
            remedy="correct the template, or use own or none",
            field="data.template",
        ) from error
    except jinja2.TemplateError as error:
        raise RowProblem(
            None,
            f"the chat template refuses the row: {error}",
            "change the row's turns, the system text (--data.system '' removes it) or --data.template",
        ) from error
    return str(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text`, with nothing added; no limit on the length."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def token_id(value: object) -> int | None:
    """A tokenizer's named token as an id; None where it has no such token."""
    return value if isinstance(value, int) else None


def _template_text(template: str) -> str:
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the chat template cannot be read: {error}",
            remedy="give own, none, the path of a Jinja file, or Jinja text with {{ ... }}",
            file=path,
            field="data.template",
        ) from error


def _tail(tokenizer: PreTrainedTokenizerBase, jinja: str) -> str | None:
    turns = (Message("user", _USER_PROBE), Message("assistant", _ASSISTANT_PROBE))
    try:
        text = render_text(tokenizer, jinja, turns)
    except RowProblem:
        return None
    before, found, tail = text.rpartition(_ASSISTANT_PROBE)
    return tail if found and _USER_PROBE in before else None


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    """The special token that `tail` starts with, blanks aside; None if other text comes first."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in encode(tokenizer, tail):
        if token in special:
            return token
        if str(tokenizer.decode([token])).strip():
            return None
    return None


def _bos_added_to_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos = token_id(tokenizer.bos_token_id)
    return bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = token_id(tokenizer.eos_token_id)
    if eos is None:
        raise UserError(
            "neither the chat template nor the tokenizer has a token that ends a response",
            remedy="set the tokenizer's eos_token, or give a chat template that ends turns with a special token",
            field="data.template",
        )
    return eos
