"""Tags around a model's thinking, in the forms that public chat templates use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands before and after thinking."""

    opens: str
    closes: str


THINK_TAGS = (
    Tags("<think>", "</think>"),
    Tags("<thinking>", "</thinking>"),
    Tags("<thought>", "</thought>"),
    Tags("<reasoning>", "</reasoning>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("◁think▷", "◁/think▷"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    Tags("<|begin_of_thought|>", "<|end_of_thought|>"),
    Tags("<|channel|>analysis<|message|>", "<|end|>"),
)


def opening_of(prompt: str) -> str:
    """The think tag that a prompt ends with, with the blanks after it ("<think>\\n"); else ""."""
    bare = prompt.rstrip()
    tags = next((tags for tags in THINK_TAGS if bare.endswith(tags.opens)), None)
    return "" if tags is None else tags.opens + prompt[len(bare) :]


def tags_at(text: str) -> Tags | None:
    """The tags whose opening `text` begins with, blanks aside."""
    bare = text.lstrip()
    return next((tags for tags in THINK_TAGS if bare.startswith(tags.opens)), None)


def without_opening(text: str, opening: str) -> str:
    """The text without a think tag that the prompt has opened already."""
    tags = tags_at(opening)
    if tags is None or not text.lstrip().startswith(tags.opens):
        return text
    if text.startswith(opening):
        return text[len(opening) :]
    return text.lstrip().removeprefix(tags.opens).lstrip("\n")


def split(text: str, opening: str = "") -> tuple[str, str] | None:
    """Thinking and the rest of a response, without tags and the blanks around them; None where it has no such parts.

    Args:
        opening: the tag that the prompt has opened, if one.
    """
    tags = tags_at(opening) or tags_at(text)
    if tags is None or tags.closes not in text:
        return None
    thinking, _, rest = without_opening(text, opening).lstrip().removeprefix(tags.opens).partition(tags.closes)
    return thinking.strip(), rest.strip()


def with_thinking(thinking: str, rest: str, opening: str) -> str:
    """The response after a tag that the prompt has opened, with the blanks of the common templates.

    Raises:
        ValueError: ``opening`` opens no thinking.
    """
    tags = tags_at(opening)
    if tags is None:
        raise ValueError(f"{opening!r} opens no thinking")
    blank = opening[len(tags.opens) :]
    return f"{thinking.strip()}{blank}{tags.closes}{blank * 2}{rest.strip()}"


def unclosed(text: str, opening: str = "") -> Tags | None:
    """The tags of thinking that `text` (after a prompt that ends with `opening`) begins and never ends."""
    tags = tags_at(opening) or tags_at(text)
    return tags if tags is not None and tags.closes not in text else None


def put_back(text: str) -> str:
    """A response whose opening tag was left out (a server's template has opened it) with the tag before it."""
    for tags in THINK_TAGS[:-1]:
        before, closed, _ = text.partition(tags.closes)
        if closed and tags.opens not in before:
            return f"{tags.opens}\n{text}"
    return text
