"""How an observation stands between two turns of the policy, in tokens.

What the policy sampled is never tokenised again: the tokens of an observation are put behind it. With a chat template
they are the rest of what closes the policy's turn, the observation as a message, and what opens the next turn. The text
of an observation is always plain text: the name of a control token in it does not become that token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from thence.data import think
from thence.data.example import Message
from thence.data.problems import RowProblem
from thence.data.template import ChatFormat, encode, is_marked, render_text, token_id
from thence.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["tool", "user"]
# Words no template writes by itself; plain letters, so that no template strips or escapes them.
_QUESTION, _TURN, _OBSERVATION = "quxquestion", "quxturn", "quxobservation"
_FIELD = "environment.role"


@dataclass(frozen=True)
class ObservationForm:
    """What stands around an observation.

    Attributes:
        tokenizer: of the policy.
        before: text between the policy's last word and the observation; empty without a chat template.
        after: text behind the observation, up to where the policy takes over.
        header: what opens a turn of the policy, as a prompt ends with it; empty without a chat template.
        first: text between a prompt without its header and a first observation; None: the template refuses one there.
        opening: the think tag that `after` ends with, else "".
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    before: str = ""
    after: str = ""
    header: str = ""
    first: str | None = ""
    opening: str = ""

    def between(self, text: str, ended_with: int) -> list[int]:
        """The tokens between two turns.

        Args:
            text: of the observation.
            ended_with: the token that ended the turn before; what the template writes up to it stands already.

        Raises:
            UserError: the tokenizer cannot write the text without control tokens.
        """
        ids = self._around(self.before, text)
        lead = next((i for i, token in enumerate(ids) if is_marked(self.tokenizer, token)), None)
        written = lead is not None and ids[lead] == ended_with and bool(self.before)
        return ids[lead + 1 :] if written and lead is not None else ids

    def begun(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """A prompt with a first observation behind it.

        Raises:
            UserError: as :meth:`between`; or the template has no place for one behind this prompt.
        """
        header = encode(self.tokenizer, self.header)
        if self.first is None or list(prompt_ids[len(prompt_ids) - len(header) :]) != header:
            raise UserError(
                "the chat template has no place for an observation between the prompt and the first turn",
                remedy="let reset return None, and put what the policy is to know into the prompt"
                + ('; or set environment.role = "user"' if self.first is None else ""),
                field=_FIELD,
            )
        return [*prompt_ids[: len(prompt_ids) - len(header)], *self._around(self.first, text)]

    def opens(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends as the template opens a turn of the policy."""
        if not self.header:
            return True
        most = len(encode(self.tokenizer, self.header)) + 8
        return str(self.tokenizer.decode(list(prompt_ids[-most:]))).endswith(self.header)

    def _around(self, before: str, text: str) -> list[int]:
        lead, tail = encode(self.tokenizer, before), encode(self.tokenizer, self.after)
        own = plain_ids(self.tokenizer, text)
        if not any(mark in text for mark in _marks(self.tokenizer)):
            # as one text, which is how a chat program renders it; the template's control tokens must stay the same
            whole = encode(self.tokenizer, before + text + self.after)
            if self._marked(whole) == self._marked([*lead, *tail]):
                return whole
        return [*lead, *own, *tail]

    def _marked(self, ids: Iterable[int]) -> list[int]:
        return [token for token in ids if is_marked(self.tokenizer, token)]


def observation_form(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, role: Role) -> ObservationForm:
    """How observations are written with a chat template, or without one.

    Raises:
        UserError: the template knows no such turn behind a turn of the policy, or does not write its text.
    """
    if chat.template is None:
        return ObservationForm(tokenizer)
    jinja, variables = chat.template, chat.variables
    question, turn = Message("user", _QUESTION), Message("assistant", _TURN)
    observation = Message(role, _OBSERVATION)

    def text(*messages: Message, generate: bool = True) -> str:
        return render_text(tokenizer, jinja, messages, generate=generate, variables=variables)

    try:
        whole = text(question, turn, observation)
        asked, plain = text(question), text(question, generate=False)
    except RowProblem as problem:
        raise _unwritten(f"it {problem.problem.removeprefix('the chat template ')}", role) from problem
    between, found, after = whole.rpartition(_TURN)[2].partition(_OBSERVATION)
    if not found or _OBSERVATION in after or (role == "tool" and role not in jinja):
        raise _unwritten(f"it does not write a message of role {role} as it stands", role)
    header = asked.removeprefix(plain) if asked.startswith(plain) else ""
    return ObservationForm(
        tokenizer, between, after, header, _first(tokenizer, chat, role, plain, after), think.opening_of(after)
    )


def _first(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, role: Role, plain: str, after: str) -> str | None:
    """The text before an observation that follows a question at once; None where the template has no place for it."""
    messages = (Message("user", _QUESTION), Message(role, _OBSERVATION))
    try:
        text = render_text(tokenizer, chat.template or "", messages, generate=True, variables=chat.variables)
    except RowProblem:
        return None
    before, found, rest = text.partition(_OBSERVATION)
    return before.removeprefix(plain) if found and before.startswith(plain) and rest == after else None


def _unwritten(why: str, role: Role) -> UserError:
    other = "user" if role == "tool" else "tool"
    return UserError(
        f"the chat template cannot write an observation: {why}",
        remedy=f'set environment.role = "{other}", or give another template with data.template',
        field=_FIELD,
    )


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text in which no token is a control token.

    A name of a special or added token in the text is cut behind its first character, so that no part is that name.

    Raises:
        UserError: the tokenizer has no other way to write it, or does not know a character.
    """
    cuts = {at.start() + 1 for mark in _marks(tokenizer) for at in re.finditer(f"(?={re.escape(mark)})", text)}
    ends = sorted({end for end in cuts if end < len(text)} | {len(text)})
    ids = [token for start, end in zip([0, *ends], ends, strict=False) for token in encode(tokenizer, text[start:end])]
    marked = next((token for token in ids if is_marked(tokenizer, token)), None)
    if marked is None:
        return ids
    name = str(tokenizer.convert_ids_to_tokens(marked))
    if marked == token_id(tokenizer.unk_token_id):
        raise UserError(
            f"the tokenizer does not know a character of the observation {text[:60]!r}",
            remedy="let the environment say it in characters that the model's tokenizer knows",
        )
    raise UserError(
        f"the tokenizer can write {name!r} in the observation {text[:60]!r} as a control token only",
        remedy="let the environment say it in other characters",
    )


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names of all special and added tokens."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return {str(name) for name in (*tokenizer.all_special_tokens, *added) if name}
