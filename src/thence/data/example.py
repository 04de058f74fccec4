"""One row of a data set after reading: a prompt, perhaps a demonstration, perhaps a reference answer."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with what is known about good responses to it.

    Attributes:
        messages: the prompt as turns (system, user, earlier assistant turns), the last one the user's; empty where
            the data set gives the prompt as text.
        prompt: the prompt as text, used as it is, without a chat template; None where `messages` is set; empty in
            the layout `text`.
        demonstration: the expert response, or None.
        answer: the reference answer that a verifier compares with, or None.
        source: where the row stands, as "file:line" (lines and rows count from 1).
        group: the data set it is reported under: the column `data_source`, else the file's stem.

    Raises:
        ValueError: both or neither of `messages` and `prompt` are set.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    demonstration: str | None = None
    answer: str | None = None
    source: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("an Example needs either messages or a prompt text")

    @property
    def question(self) -> str:
        """The last user turn, or the prompt text: with `group`, the key under which copies of a problem belong."""
        return self.messages[-1].content if self.prompt is None else self.prompt
