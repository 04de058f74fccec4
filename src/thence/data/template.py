"""Chat templates: which one is used, how it renders, and which token ends a turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thence.data.bounded import TookTooLong, bounded
from thence.data.example import Message
from thence.data.problems import RowProblem
from thence.errors import RecipeError, UserError
from thence.given_files import read_given

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words no template writes by itself; plain letters, so that no template strips or escapes them.
_USER_PROBE, _ASSISTANT_PROBE = "quxquestion", "quxresponse"
LONGEST_RENDERING = 10.0
"""Seconds that a template may take for one row; real ones take milliseconds."""
MOST_MEMORY = 2 * 2**30
"""Bytes that rendering one row may add."""
MOST_CHARACTERS = 50_000_000
"""Of one rendered row; the longest contexts hold a tenth of it."""
MOST_BYTES = 4 * 2**20
"""Of a file with a template."""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now")
"""Names that a template gets from elsewhere, so that no recipe may set them."""


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
        variables: values of the template's own variables, for example `enable_thinking`.
    """

    template: str | None
    end_id: int
    tail: str | None
    bos_id: int | None
    writes_bos: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


def chat_format(
    tokenizer: PreTrainedTokenizerBase, template: str = "own", variables: Mapping[str, Any] | None = None
) -> ChatFormat:
    """Find and probe a chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: "own" (the tokenizer's; "none" if it has none), "none", the path of a Jinja file, or Jinja text.
            The tokenizer's own template is trusted to write the bos token; with any other, the tokenizer's bos is
            added once if the tokenizer adds it to plain text.
        variables: values of the template's own variables.

    Raises:
        UserError: the template cannot be read or is broken, no token could end a response, or a variable that the
            template does not know.
    """
    if template == "own" and not tokenizer.chat_template:
        template = "none"
    bos_id = _bos_added_to_text(tokenizer)
    given = dict(variables or {})
    if template == "none":
        _check_variables(given, None)
        return ChatFormat(None, _eos(tokenizer), None, bos_id)
    jinja = _own_template(tokenizer) if template == "own" else _template_text(template)
    _check_variables(given, jinja)
    tail = _tail(tokenizer, jinja, given)
    end_id = None if tail is None else _end_of_turn(tokenizer, tail)
    end_id = _eos(tokenizer) if end_id is None else end_id
    return ChatFormat(jinja, end_id, tail, bos_id, writes_bos=template == "own", variables=given)


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    jinja: str,
    messages: Sequence[Message],
    *,
    generate: bool = False,
    tools: Sequence[str] = (),
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text a chat template makes of `messages`; `generate` adds the header of the assistant's turn.

    Raises:
        RowProblem: the template refuses these messages (it knows no system turn, say) or fails on them.
        UserError: the template is not valid Jinja, or takes more time or memory than any row needs.
    """
    import jinja2

    try:
        with bounded(LONGEST_RENDERING, MOST_MEMORY):
            text = tokenizer.apply_chat_template(
                [message.plain() for message in messages],
                tools=[json.loads(tool) for tool in tools] or None,
                chat_template=jinja,
                tokenize=False,
                add_generation_prompt=generate,
                continue_final_message=False,
                **(variables or {}),
            )
    except TookTooLong:
        raise _endless(f"did not end within {LONGEST_RENDERING:g} s on one row") from None
    except MemoryError:
        raise _endless(f"asked for more than {MOST_MEMORY / 2**30:g} GiB of memory for one row") from None
    except jinja2.TemplateSyntaxError as error:
        raise _not_jinja(error) from error
    except Exception as error:  # a template may do anything: add text to a number, look for a key that is not there
        refused = type(error) is jinja2.TemplateError  # what raise_exception raises
        problem = f"refuses the row: {error}" if refused else f"fails on the row: {type(error).__name__}: {error}"
        raise RowProblem(
            None,
            f"the chat template {problem}",
            "change the row's turns, the system text (--data.system '' removes it) or --data.template",
        ) from error
    if len(text) > MOST_CHARACTERS:
        raise _endless(f"made {len(text):,} characters of one row")
    return str(text)


def _endless(problem: str) -> UserError:
    return UserError(
        f"the chat template {problem}",
        remedy="correct its loops, or give another one with data.template",
        field="data.template",
    )


@lru_cache(maxsize=64)
def template_names(jinja: str) -> frozenset[str]:
    """The names that a template reads and does not set itself. Raises UserError where it is not valid Jinja."""
    import jinja2
    import jinja2.meta
    from jinja2 import nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %} marks what a model writes; here it is only read through."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, LoopControlExtension]
    )
    try:
        tree = environment.parse(jinja)
    except jinja2.TemplateSyntaxError as error:
        raise _not_jinja(error) from error
    return frozenset(jinja2.meta.find_undeclared_variables(tree))


def changes_by_day(chat: ChatFormat) -> bool:
    """Whether the template writes today's date, so that the same row gives other tokens tomorrow."""
    if chat.template is None or "strftime_now" not in template_names(chat.template):
        return False
    return "date_string" not in chat.variables


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text`, with nothing added; no limit on the length."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def token_id(value: object) -> int | None:
    """A tokenizer's named token as an id; None where it has no such token."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_marked(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is special or was added to the vocabulary, and so is no ordinary text."""
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


def _not_jinja(error: Any) -> UserError:
    return UserError(
        f"the chat template is not valid Jinja: {error.message} (line {error.lineno})",
        remedy="correct the template, or use own or none",
        field="data.template",
    )


def _check_variables(given: Mapping[str, Any], jinja: str | None) -> None:
    """Refuse variables that could have no effect, or take the place of what a template gets anyway."""
    if not given:
        return
    where = "data.template_variables"
    if jinja is None:
        raise UserError(
            f"there is no chat template that could read {', '.join(given)}",
            remedy="leave the variables out, or give a template with data.template",
            field=where,
        )
    known = {name for name in template_names(jinja) if not _is_reserved(name)}
    unknown = sorted(set(given) - known)
    if unknown:
        listed = f"it reads {', '.join(sorted(known))}" if known else "it reads none"
        raise UserError(
            f"the chat template does not read {', '.join(unknown)}", remedy=f"{listed}; remove the others", field=where
        )


def _is_reserved(name: str) -> bool:
    """Names set by the caller: rows, special tokens, and the functions that transformers gives to templates."""
    functions = ("raise_exception", "namespace", "range", "dict", "lipsum", "cycler", "joiner")
    return name in RESERVED or name in functions or name.endswith(("_token", "_tokens"))


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, KeyError) as error:
        named = ", ".join(sorted(tokenizer.chat_template)) if isinstance(tokenizer.chat_template, dict) else "none"
        raise UserError(
            f"the tokenizer has several chat templates and none is the default: {named}",
            remedy="write one of them to a file and give it with data.template",
            field="data.template",
        ) from error


def _template_text(template: str) -> str:
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    try:
        return read_given(path, "a chat template", most=MOST_BYTES, field="data.template")
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"the chat template cannot be read: {error}",
            remedy="give own, none, the path of a Jinja file, or Jinja text with {{ ... }}",
            file=path,
            field="data.template",
        ) from error


def _tail(tokenizer: PreTrainedTokenizerBase, jinja: str, variables: Mapping[str, Any]) -> str | None:
    turns = (Message("user", _USER_PROBE), Message("assistant", _ASSISTANT_PROBE))
    try:
        text = render_text(tokenizer, jinja, turns, variables=variables)
    except RowProblem:
        return None
    before, found, tail = text.rpartition(_ASSISTANT_PROBE)
    return tail if found and _USER_PROBE in before else None


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    """The special token that `tail` starts with, blanks aside; None if other text comes first."""
    for token in encode(tokenizer, tail):
        if is_marked(tokenizer, token):
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
