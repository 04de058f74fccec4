"""Responses on a page: all of them where there is room. What a model wrote is hostile text until proven otherwise."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from thence.files import finite
from thence.foreign_text import visible

VERDICTS = ("right", "wrong", "graded", "unknown")
SPEAKERS = ("policy", "environment")
ENDS = {
    "turns": "ended by the limit of turns",
    "context": "ended where no more fitted",
    "timeout": "its environment took too long",
    "error": "its environment failed",
}
"""How rollouts end, besides by themselves and by the limit of tokens."""
EACH = 3
ROOM = 2_400_000
"""Bytes of a page that its samples may take, as base64. A page has 4 MB at most; Vega takes 0.9 of them."""
_IN_MEMORY = 60_000_000
"""Characters of samples that are held while a page is written."""
_FEW_FIGURES = 40
"""Samples with figures of their tokens that are kept in any case; more of them go before whole samples do."""
_HEAD, _TAIL = 2500, 1000
"""Characters shown of a long text: its beginning and its end."""


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One response as a page shows it.

    Args:
        group: what it can be told by in a list: stage and test set, or task.
        reward, length, step: what it can be filtered and sorted by; None where it is not known.
        components: what the reward is made of, by name; empty where that is not known.
        weighed: of each of its tokens the text and what training made of it, where the run kept that
            (:mod:`thence.pipeline.token_figures`).
        turns: who (policy or environment) said what, in order; empty where the response is one turn.
    """

    verdict: str
    prompt: str
    response: str
    answer: str
    extracted: str
    reason: str
    where: str
    tokens: str
    score: str = ""
    group: str = ""
    reward: float | None = None
    length: int | None = None
    step: int | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    weighed: Mapping[str, Any] | None = None
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class HeldSamples:
    """The samples that a page carries.

    Args:
        data: JSON, compressed with gzip, as base64.
        held, total: how many the page has, and how many there are.
    """

    data: str
    held: int
    total: int


@dataclass
class _Source:
    """Samples of one file, thinned evenly while they are too many: every ``stride``-th is kept."""

    name: str
    stride: int = 1
    total: int = 0
    characters: int = 0
    kept: list[tuple[int, ShownSample]] = field(default_factory=list)

    def add(self, make: Callable[[], ShownSample]) -> None:
        self.total += 1
        if (self.total - 1) % self.stride == 0:
            sample = make()
            self.kept.append((self.total, sample))
            self.characters += _size(sample)

    def thin(self) -> None:
        self.stride *= 2
        self.kept = [one for one in self.kept if (one[0] - 1) % self.stride == 0]
        self.characters = sum(_size(sample) for _, sample in self.kept)


def hold(sources: Iterable[tuple[str, Iterable[Callable[[], ShownSample]]]], room: int = ROOM) -> HeldSamples:
    """All samples of these sources, or evenly spaced ones of the largest where there is no room for all.

    Args:
        sources: name (of the file's stage or task, for links) and its samples in order, made only if they are kept.
        room: bytes for them in the page.
    """
    found: list[_Source] = []
    for name, samples in sources:
        found.append(source := _Source(name))
        for make in samples:
            source.add(make)
            while sum(s.characters for s in found) > _IN_MEMORY and _thinnable(found):
                _largest(found).thin()
    while len(data := _packed(found)) > room and _thinnable(found):
        if not _half_of_the_figures(found):
            _largest(found).thin()
    return HeldSamples(data, sum(len(s.kept) for s in found), sum(s.total for s in found))


def _thinnable(found: list[_Source]) -> bool:
    return any(len(source.kept) > 1 for source in found)


def _largest(found: list[_Source]) -> _Source:
    return max((s for s in found if len(s.kept) > 1), key=lambda source: source.characters)


def _half_of_the_figures(found: list[_Source]) -> bool:
    """Leave every second sample's figures of tokens away, while there are many; whether there were."""
    places = [(s, i) for s in found for i, (_, sample) in enumerate(s.kept) if sample.weighed is not None]
    if len(places) < _FEW_FIGURES:
        return False
    for source, index in places[1::2]:
        number, sample = source.kept[index]
        source.kept[index] = (number, replace(sample, weighed=None))
    return True


def _size(sample: ShownSample) -> int:
    texts = (sample.prompt, sample.response, sample.answer, *(text for _, text in sample.turns))
    return sum(map(len, texts)) + (400 if sample.weighed else 50)


def _packed(found: list[_Source]) -> str:
    """Texts that repeat (prompts, groups) once, and a list a sample, in the order that samples.js reads."""
    texts: dict[str, int] = {}

    def place(text: str) -> int:
        return texts.setdefault(visible(text), len(texts))

    rows = [
        [
            f"sample-{slug(source.name)}-{number}",
            place(sample.group or source.name),
            sample.verdict,
            sample.reward,
            sample.length,
            sample.step,
            place(sample.prompt),
            sample.response,
            place(sample.answer),
            sample.extracted,
            sample.reason,
            place(sample.where),
            visible(sample.tokens),
            sample.score,
            {visible(name): value for name, value in sample.components.items()},
            sample.turns,
            sample.weighed,
        ]
        for source in found
        for number, sample in source.kept
    ]
    content = json.dumps(finite({"texts": list(texts), "samples": rows}), ensure_ascii=False, separators=(",", ":"))
    packed = gzip.compress(content.encode("utf-8", "replace"), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode()


def slug(name: str) -> str:
    """A name as part of an address within the page."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "s"


def first_of_each(samples: Iterable[tuple[Any, Callable[[], ShownSample]]]) -> list[ShownSample]:
    """The first few samples of every verdict: not chosen by hand.

    Args:
        samples: verdict and sample, in order. Reading stops where there are enough of each.
    """
    kept: dict[str, list[ShownSample]] = {verdict: [] for verdict in VERDICTS}
    for verdict, sample in samples:
        if isinstance(verdict, str) and verdict in kept and len(kept[verdict]) < EACH:
            kept[verdict].append(sample())
        if all(len(samples) >= EACH for samples in kept.values()):
            break
    return [sample for verdict in VERDICTS for sample in kept[verdict]]


def judged_only(samples: Iterable[tuple[Any, Callable[[], ShownSample]]]) -> Iterator[Callable[[], ShownSample]]:
    """Those with a verdict that a page knows; the others are damaged."""
    return (sample for verdict, sample in samples if isinstance(verdict, str) and verdict in VERDICTS)


def weighed_tokens(value: Any) -> dict[str, Any] | None:
    """Figures of tokens as a run kept them, texts made visible; None where they are missing or do not fit together."""
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), list):
        return None
    texts = [visible(str(text)) for text in value["text"]]
    found: dict[str, Any] = {"text": texts}
    for name, figures in value.items():
        if name == "text":
            continue
        fitting = isinstance(figures, list) and len(figures) == len(texts) and all(map(_plain_number, figures))
        if fitting and texts:
            found[visible(str(name))] = figures
    return found if len(found) > 1 else None


def shown_turns(value: Any) -> tuple[tuple[str, str], ...]:
    """Who said what as a file holds it, texts made visible; empty where it is anything else."""
    found = []
    for said in value if isinstance(value, list | tuple) else ():
        who, text = (said.get("who"), said.get("text")) if isinstance(said, Mapping) else said
        if who not in SPEAKERS or not isinstance(text, str):
            return ()
        found.append((who, excerpt(text)))
    return tuple(found)


def reward_components(value: Any) -> dict[str, float]:
    """What a reward is made of as a file holds it; entries that are no finite numbers are left out."""
    found = value.items() if isinstance(value, Mapping) else ()
    return {str(name): number for name, number in found if _plain_number(number)}


def components_text(components: Mapping[str, float]) -> str:
    """The components of a reward in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in components.items())


def _plain_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def excerpt(value: Any) -> str:
    """A value as text for a page, the middle of a long one left out."""
    text = visible("" if value is None else str(value))
    if len(text) <= _HEAD + _TAIL:
        return text
    left_out = len(text) - _HEAD - _TAIL
    return f"{text[:_HEAD]}\n[... {left_out:,} characters left out ...]\n{text[-_TAIL:]}"
