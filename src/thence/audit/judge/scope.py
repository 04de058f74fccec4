"""What an audit has verified and what it has not, one line each: an acquittal holds for the former alone."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from thence.audit.result import CaseResult

NEVER = ("GPU kernels, real data, long runs",)
"""No case of any matrix looks at these."""
BEYOND: Mapping[str, str] = {
    "resume": "resuming from a checkpoint",
    "saved": "what is saved",
    "evaluation": "the trainer's own evaluation",
}
"""In words, by ``Case.beyond``."""


def verified(cases: Sequence[CaseResult]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lines on what was verified and on what was not, from the cases whose weights are as asked."""
    sound = [case for case in cases if case.status == "judged" and case.steps and not case.faults]
    yes: list[str] = []
    no: list[str] = []
    past, unseen = _beyond(cases)
    if not sound:
        told = past or any(case.written is not None for case in cases)
        return (tuple(past), tuple(unseen)) if told else ((), ())
    yes.append(f"token weights of the first step: {_cases(sound)}")
    yes.append("every parameter with a gradient moved")
    agree = [case for case in sound if case.cut is not None]
    if agree:
        measures = {case.cut.measure: max(c.cut.share for c in agree if c.cut) for case in agree if case.cut}
        far = ", ".join(f"{share:.2g} of the {_MEASURES[name]}" for name, share in measures.items())
        yes.append(f"the same update for other cuts of the same rows: {_cases(agree)}, apart by at most {far}")
    else:
        no.append(
            "whether the update depends on the cut: no right case could be compared with another cut of the same rows"
        )
    _sort(yes, no, "data-parallel ranks", [c for c in sound if c.case.ranks > 1], "no case with two ranks was judged")
    unfilled = [c for c in sound if c.case.examples % c.case.window and not c.case.packing]
    _sort(yes, no, "windows that are not full", unfilled, "no such case was judged")
    later = [c for c in sound if len(c.steps) > 1]
    _sort(
        yes, no, "later steps: gradients are cleared between steps", later,
        "only first steps were judged, so optimizer state, momentum and leaks were not seen",
    )  # fmt: skip
    known = [c for c in sound if all(step.scale is not None for step in c.steps)]
    _sort(
        yes, no, "the size of the update", known,
        "learning rate or optimizer are not known, or the step clips: a constant factor would not show",
    )  # fmt: skip
    _sort(yes, no, "packed rows", [c for c in sound if c.case.packing], "no case with packing was judged")
    no += dict.fromkeys(line for case in sound for step in case.steps for line in step.unseen)
    narrow = [c for c in sound if c.case.precision != "float32"]
    _sort(yes, no, "bfloat16", narrow, "no case in bfloat16 was judged")
    policy_yes, policy_no = _policy(sound)
    return (*yes, *policy_yes, *past), (*no, *policy_no, *unseen, *NEVER)


def _beyond(cases: Sequence[CaseResult]) -> tuple[list[str], list[str]]:
    """A line each on resuming, saving and evaluating."""
    yes: list[str] = []
    no: list[str] = []
    for kind, words in BEYOND.items():
        tried = [case for case in cases if case.case.beyond == kind and case.status != "skipped"]
        sound = [case for case in tried if case.status == "judged" and not case.faults]
        if kind == "saved" and any(case.written is not None for case in cases):
            _written(words, [case for case in cases if case.written is not None], yes, no)
        elif not tried:
            no.append(f"{words}: no case looked at it")
        elif len(sound) < len(tried):
            no.append(f"{words}: {'a fault was found' if any(case.faults for case in tried) else tried[0].reason}")
        else:
            yes.append(f"{words}: {sound[0].said}" + (f"; {_cases(sound)}" if len(sound) > 1 else ""))
            no += dict.fromkeys(f"{words}, {clause}" for case in sound for clause in case.unseen)
    return yes, no


def _written(words: str, cases: Sequence[CaseResult], yes: list[str], no: list[str]) -> None:
    """Lines on the sets of weights that a program wrote, from the case with most of them."""
    told = [case.written for case in cases if case.written is not None]
    most = max(told, key=lambda sets: (len(sets.same), len(sets.left)))
    wrong = [case for case in cases if any(finding.id.startswith("saved-") for finding in case.faults)]
    head = f"judged was {most.judged}"
    if wrong:
        no.append(f"{words}: a fault was found ({len(wrong)} of {_cases(cases)}); {head}")
    elif most.same:
        same = f"the same weights are in {', '.join(most.same)}"
        yes.append(f"{words}: {head}; {same}, up to rounding; {_cases([c for c in cases if c.written == most])}")
    else:
        no.append(f"{words}: {head}; no other set claims to be the trained model, so nothing could be compared")
    no += dict.fromkeys(f"{words}, {clause}" for sets in told for clause in sets.left)


def _policy(cases: Sequence[CaseResult]) -> tuple[list[str], list[str]]:
    """Parts of a policy objective: verified where, in some case, any other setting would have shown."""
    checks = [case.policy for case in cases if case.policy is not None]
    seen = collections.Counter(part for check in checks for part in check.verified)
    unseen: dict[str, str] = {}
    for check in checks:
        unseen = {part: reason for part, reason in check.open.items() if part not in seen} | unseen
    by_count: dict[int, list[str]] = {}
    for part, number in seen.items():
        by_count.setdefault(number, []).append(part)
    by_reason: dict[str, list[str]] = {}
    for part, reason in unseen.items():
        by_reason.setdefault(reason, []).append(part)
    yes = [
        f"policy objective, {number} case{'s' * (number > 1)}: {', '.join(parts)}"
        for number, parts in sorted(by_count.items(), reverse=True)
    ]
    no = [f"policy objective, {', '.join(parts)}: {reason}" for reason, parts in by_reason.items()]
    return yes, no


_MEASURES = {"signs": "signs", "norm": "norm"}


def _sort(yes: list[str], no: list[str], what: str, cases: Sequence[CaseResult], why: str) -> None:
    if cases:
        yes.append(f"{what}: {_cases(cases)}")
    else:
        no.append(f"{what}: {why}")


def _cases(cases: Sequence[CaseResult]) -> str:
    return f"{len(cases)} case{'s' * (len(cases) > 1)}"
