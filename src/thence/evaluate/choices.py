r"""The lenient letter rule for multiple choice: a second column beside the official score, never the headline.

The official rule (math-verify) wants the letter alone in a box. It turns down a right letter that is written as
`ANSWER: C`, `\boxed{C) Planetary days}` or "the answer is C)". This rule takes them, so that the distance between the
two columns shows how much of a score is form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from thence.evaluate.problems import LETTERS, Problem
from thence.verify.boxed import last_boxed, normal_form
from thence.verify.verdict import Grade, right, wrong

TAIL_CHARS = 20_000
_LISTED = re.compile(r"^\s{0,8}\(?([A-Z]|\d)[).]\s+(\S.*)$", re.MULTILINE)
_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed|mbox)\b ?|[*_`${}\\]|\\[()\[\]]")


def choices_of(problem: Problem) -> dict[str, str]:
    """Label to text of a problem's options, in the order shown; of the last list `A) ...` where they stand in the text.

    Labels are letters or, as in 22 ARC problems, digits. Empty where no options are found.
    """
    if problem.options:
        return dict(zip(LETTERS, problem.options, strict=False))
    found: dict[str, str] = {}
    for match in _LISTED.finditer(problem.text):
        label, text = match[1], match[2].strip()
        if label in ("A", "1"):
            found = {}
        expected = str(len(found) + 1) if (found and "1" in found) or label == "1" else LETTERS[len(found) % 26]
        if label == expected:
            found[label] = text
    return found if len(found) > 1 else {}


def grade_letter(problem: Problem, response: str) -> Grade:
    """Whether the label that a response settles on is the gold one.

    Returns:
        A grade whose `extracted` is the label; WRONG with a reason where none is found or the problem has no options.
    """
    choices = choices_of(problem)
    if not choices:
        return wrong(None, "no options found in the problem")
    label = find_letter(response, choices)
    if label is None:
        return wrong(None, "no letter found")
    return right(label) if label == (problem.answer or "").strip() else wrong(label)


def find_letter(response: str, choices: Mapping[str, str]) -> str | None:
    r"""The label that a response settles on, or None.

    Looked at is what follows the last `</think>`. First the last box: its label (`C`, `(C)`, `C) text`) or an option's
    text. Then the last statement like `answer: C` or "the correct option is C". Then the last line, if it is a label,
    or the only line that begins like an option.

    Args:
        choices: label to text of the options.
    """
    answer = response.rpartition("</think>")[2][-TAIL_CHARS:]
    boxed = last_boxed(answer)
    if boxed is not None and (label := _label_or_text(boxed, choices)):
        return label
    plain = _MARKUP.sub("", answer)
    stated = _stated(plain, tuple(choices))
    return stated if stated else _last_line(plain, choices)


def _label_or_text(text: str, choices: Mapping[str, str]) -> str | None:
    bare = _MARKUP.sub("", text).strip()
    match = re.match(r"\(?([A-Z]|\d)(?:[).:](?!\S)|\)?$)", bare)
    if match and match[1] in choices:
        return match[1]
    written = {label: normal_form(_MARKUP.sub("", option)) for label, option in choices.items()}
    # Letter case last: of the genotypes Rr and RR, each is the other one without it.
    for wanted, texts in (
        (normal_form(bare), written),
        (normal_form(bare).casefold(), {label: option.casefold() for label, option in written.items()}),
    ):
        same = [label for label, option in texts.items() if option == wanted]
        if len(same) == 1:
            return same[0]
    return None


def _stated(text: str, labels: Sequence[str]) -> str | None:
    label = "|".join(map(re.escape, labels))
    words = r"(?i:\banswer|\b(?:correct|right|best) (?:option|choice))"
    link = r"(?i:[ \t]{0,4}\b(?:is|would be|should be|must be)\b)?(?i:[ \t]{1,4}(?:option|choice))?"
    found = re.findall(rf"{words}{link}[\s:=]{{0,8}}(?i:option |choice )?\(?({label})(?![\w'’])", text)
    return found[-1] if found else None


def _last_line(text: str, choices: Mapping[str, str]) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if match := re.fullmatch(r"\(?([A-Z]|\d)[).]?", lines[-1]):
        return match[1] if match[1] in choices else None
    beginnings = [match[1] for line in lines if (match := re.match(r"\(?([A-Z]|\d)[).]\s", line))]
    begins_last = re.match(r"\(?([A-Z]|\d)[).]\s", lines[-1])
    if begins_last and len(beginnings) == 1 and begins_last[1] in choices:
        return begins_last[1]
    return None
