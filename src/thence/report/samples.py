"""A few responses of every kind of verdict. What a model wrote is hostile text until proven otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.foreign_text import clean
from thence.jsonl import stream_lines

VERDICTS = ("right", "wrong", "graded", "unknown")
_HEAD, _TAIL = 2500, 1000
"""Characters shown of a long text: its beginning and its end."""
_FINISH = {"stop": "stopped by itself", "length": "cut off at the limit"}
_SEARCHED = 20_000
"""Lines of a file that are searched for examples."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response, made safe to show; escaping is left to the page."""

    verdict: str
    prompt: str
    response: str
    answer: str
    extracted: str
    reason: str
    where: str
    tokens: str
    score: str = ""


def pick_samples(folder: Path, stages: tuple[str, ...], each: int = 3) -> dict[str, list[Sample]]:
    """The first few responses of each verdict, by stage. Stages without samples are left out."""
    picked = {}
    for stage in stages:
        kept: dict[str, list[Sample]] = {verdict: [] for verdict in VERDICTS}
        for count, line in enumerate(stream_lines(folder / "stages" / stage / "samples.jsonl")):
            if count >= _SEARCHED or all(len(samples) >= each for samples in kept.values()):
                break
            row = line[1] if isinstance(line, tuple) else {}
            verdict = row.get("verdict")
            if isinstance(verdict, str) and verdict in kept and len(kept[verdict]) < each:
                kept[verdict].append(_sample(row, verdict))
        samples = [sample for verdict in VERDICTS for sample in kept[verdict]]
        if samples:
            picked[stage] = samples
    return picked


def visible(text: str) -> str:
    """Text without characters that a page cannot hold or that change how it is read.

    Control characters become their pictures (U+2400 and up), marks of writing direction and all else that has no glyph
    their code points in brackets, and lone surrogates the replacement character.
    """
    shown = []
    for char in text:
        code = ord(char)
        if char in "\n\t":
            shown.append(char)
        elif code < 0x20:
            shown.append(chr(0x2400 + code))
        elif code == 0x7F:
            shown.append("\u2421")
        elif 0xD800 <= code <= 0xDFFF or 0x80 <= code < 0xA0:
            shown.append("\ufffd")
        elif code > 0x9F and clean(char) != char:
            shown.append(f"[U+{code:04X}]")
        else:
            shown.append(char)
    return "".join(shown)


def _sample(row: Mapping[str, Any], verdict: str) -> Sample:
    where = [str(row["split"])] if row.get("split") is not None else []
    where += [f"T = {row['temperature']:g}"] if isinstance(row.get("temperature"), (int, float)) else []
    where += [f"problem {row['index']}"] if row.get("index") is not None else []
    where += [f"step {row['step']}"] if row.get("step") else []
    finish = f", {_FINISH.get(str(row['finish']), row['finish'])}" if row.get("finish") else ""
    return Sample(
        verdict=verdict,
        prompt=shown(row.get("prompt")),
        response=shown(row.get("response")),
        answer=shown(row.get("answer")),
        extracted=shown(row.get("extracted")),
        reason=shown(row.get("reason")),
        where=visible(", ".join(where)),
        score=f"{row['score']:.4g}" if verdict == "graded" and isinstance(row.get("score"), (int, float)) else "",
        tokens=visible(f"{row['tokens']} tokens{finish}") if row.get("tokens") is not None else "",
    )


def shown(value: Any) -> str:
    """A value made harmless for a page, the middle of a long text left out."""
    text = visible("" if value is None else value if isinstance(value, str) else str(value))
    if len(text) <= _HEAD + _TAIL:
        return text
    left_out = len(text) - _HEAD - _TAIL
    return f"{text[:_HEAD]}\n[... {left_out:,} characters left out ...]\n{text[-_TAIL:]}"
