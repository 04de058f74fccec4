"""From a recipe's data table to prompts in tokens."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from thence.data.chat import Rendered, chat_format, render_all, trained_share
from thence.data.example import Example
from thence.data.readers import read_examples
from thence.data.selection import between, by_difficulty, mixed
from thence.data.template import changes_by_day
from thence.data.trajectory import Prompt
from thence.data.worlds.named import is_of_world, world_examples
from thence.errors import DataError
from thence.recipe import Data
from thence.verify.reward import MATH_RULES

log = logging.getLogger(__name__)


class RenderedPrompts:
    """Rendered data tables, handed from the preflight to the stages and from run to run, so that each is rendered once.

    Prompts are immutable, so runs can share them. A table whose files have changed is rendered again.

    Args:
        tables: most tables that are held.
        tokens: most tokens of all that are held, but for the table that was asked for last.
    """

    def __init__(self, tables: int = 8, tokens: int = 20_000_000):
        self.tables, self.tokens = tables, tokens
        self._held: OrderedDict[str, list[Prompt]] = OrderedDict()

    def load(self, data: Data, tokenizer: Any) -> list[Prompt]:
        """As :func:`load_prompts`, from what is held where data and tokenizer are the same."""
        key = _fingerprint(data, tokenizer)
        if key not in self._held:
            self._held[key] = load_prompts(data, tokenizer)
        self._held.move_to_end(key)
        while len(self._held) > self.tables or (len(self._held) > 1 and self._size() > self.tokens):
            self._held.popitem(last=False)
        return list(self._held[key])

    def held(self, data: Data, tokenizer: Any) -> list[Prompt] | None:
        """What is held of a table already; None: it would have to be rendered."""
        found = self._held.get(_fingerprint(data, tokenizer))
        return None if found is None else list(found)

    def _size(self) -> int:
        held = (p for prompts in self._held.values() for p in prompts)
        return sum(len(p.token_ids) + len(p.demonstration_ids or ()) for p in held)


def load_prompts(data: Data, tokenizer: Any) -> list[Prompt]:
    """Read and render the examples of a data table, in order.

    What was left out (bad rows, prompts that are too long) or cut is counted in the log.

    Raises:
        DataError: nothing is left, or a row cannot be used.
    """
    return to_prompts(data, read_only(data), tokenizer)


def read_only(data: Data) -> list[Example]:
    """The examples of a data table, in order, not rendered. Raises DataError."""
    parts = [_read(data, name) for name in data.source]
    if data.pass_rate is not None:
        parts = [between(part, *data.pass_rate) for part in parts]
    if data.weights is not None:
        found = mixed(parts, data.weights, data.limit)
    else:
        found = [example for part in parts for example in part][: data.limit]
    if data.order in ("easy-first", "hard-first"):
        return by_difficulty(found, easy_first=data.order == "easy-first")
    return found


def first_example(data: Data) -> Example:
    """The first example of a data table, as it was read. Raises DataError."""
    return _read(data.model_copy(update={"limit": 1}), data.source[0])[0]


def to_prompts(data: Data, examples: Sequence[Example], tokenizer: Any) -> list[Prompt]:
    """Render examples by the template and limits of a data table. Raises DataError."""
    return [prompt for _, prompt in rendered_examples(data, examples, tokenizer)]


def examples_of(data: Data, tokenizer: Any) -> dict[int, Example]:
    """The example of every prompt that :func:`load_prompts` gives, by the prompt's index. Raises DataError.

    What is left out or cut was said when the prompts were loaded, and is not said again.
    """
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return {prompt.index: example for example, prompt in rendered_examples(data, read_only(data), tokenizer)}
    finally:
        log.setLevel(level)


def rendered_examples(data: Data, examples: Sequence[Example], tokenizer: Any) -> list[tuple[Example, Prompt]]:
    """As :func:`to_prompts`, each prompt with the example that it was made of. Raises DataError."""
    chat = chat_format(tokenizer, data.template, data.template_variables)
    if changes_by_day(chat):
        log.warning(
            "the chat template writes today's date: the same rows give other tokens tomorrow; "
            'set data.template_variables = { date_string = "26 Jul 2024" } if it reads that, or give another template'
        )
    rendered = render_all(
        examples,
        tokenizer,
        system=data.system,
        template=chat,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
        skip_bad=data.skip_bad,
    )
    for row in rendered.bad:
        log.warning("left out: %s", row)
    for note, count in rendered.notes.items():
        log.warning("%d of %d examples: %s", count, len(rendered.rows), note)
    if rendered.too_long:
        log.warning(
            "%d examples left out: their prompts are longer than data.max_prompt_tokens", len(rendered.too_long)
        )
    pairs = list(zip(rendered.examples, rendered.rows, strict=True))
    if data.leave_out_cut and rendered.truncated:
        pairs = [(example, row) for example, row in pairs if not row.truncated]
        log.warning("%d examples left out: longer than data.max_response_tokens", len(rendered.rows) - len(pairs))
    elif rendered.truncated:
        log.warning("%d demonstrations cut at data.max_response_tokens; they teach no end token", rendered.truncated)
    if not pairs:
        raise DataError("no example is left", remedy="look at data.source, data.split and data.limit", field="data")
    return [(example, _prompt(i, example, row)) for i, (example, row) in enumerate(pairs)]


def check_trained(prompts: list[Prompt], train_on: str, *, say: bool = True) -> None:
    """Refuse a data set that would train none of its tokens, or all of them unasked. Raises DataError."""
    rows = [
        Rendered(list(p.token_ids), None if p.demonstration_ids is None else list(p.demonstration_ids)) for p in prompts
    ]
    share = trained_share(rows, train_on)  # type: ignore[arg-type]
    log.log(logging.INFO if say else logging.DEBUG, "%.0f%% of the tokens are trained", 100 * share)


def check_answers(prompts: Sequence[Prompt] | Sequence[Example], rewards: Iterable[str]) -> None:
    """Refuse to grade by comparison where there is nothing to compare with. Raises DataError."""
    reward = next((spec for spec in rewards if spec in ("exact", *MATH_RULES)), None)
    if reward is not None and not any(prompt.answer for prompt in prompts):
        raise DataError(
            f"no example has an answer, and the reward {reward!r} compares with one",
            remedy="give a data set with answers, or your own reward function",
            field="reward",
        )


def _fingerprint(data: Data, tokenizer: Any) -> str:
    """Follows from all that prompts follow from: the table, the state of the files that it names, the tokenizer."""
    digest = hashlib.sha256(data.model_dump_json().encode())
    for name in (*data.source, data.template):
        with suppress(OSError, ValueError):  # a hub name, or a template's text
            path = Path(name).expanduser()
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                state = file.stat()
                digest.update(f"{file}{state.st_mtime_ns}{state.st_size}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    digest.update(f"{words}{tokenizer.chat_template}{tokenizer.special_tokens_map}".encode())
    return digest.hexdigest()


def _read(data: Data, name: str) -> list[Example]:
    if is_of_world(name):
        return world_examples(name, data.split, data.limit, data.seed)
    examples, bad = read_examples(
        [name],
        split=data.split,
        columns=data.columns,
        layout=data.layout,
        limit=data.limit if data.pass_rate is None else None,  # those that are left count
        skip_bad=data.skip_bad,
    )
    for row in bad:
        log.warning("left out: %s", row)
    return examples


def _prompt(index: int, example: Example, row: Rendered) -> Prompt:
    return Prompt(
        index=index,
        token_ids=tuple(row.prompt_ids),
        demonstration_ids=None if row.response_ids is None else tuple(row.response_ids),
        answer=example.answer,
        text=example.question,
        group=example.group,
        opening=row.opening,
        columns=example.columns,
    )
