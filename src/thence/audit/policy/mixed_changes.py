"""Single changes of what was asked for of demonstrations, prefixes and replays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from thence.audit.policy.change import Hypothesis, on_step, overridden, setting, whole_tokens
from thence.audit.policy.facts import PolicyStep, Rollout
from thence.audit.policy.objective import PolicyObjective

_SURROGATES = {
    "likelihood": "log p",
    "probability": "p",
    "shape": "p / (p + gamma)",
    "uncertain": "log p times p (1 - p)",
    "raised": "the cross-entropy to the raised distribution (GIFT)",
}
_DIVISORS = {
    "all": "all tokens of the step",
    "own": "the tokens of demonstrations",
    "each": "tokens of their own, as those of the policy are",
}
_LEVELS = {
    "none": "is left out",
    "token": "is that of the token",
    "sequence": "is that of the response",
    "batch": "is that of the step",
}
_PREFIX = {
    "train": ("prefix-trained", "tokens of a prefix are trained as if the policy had written them"),
    "context": ("prefix-missing", "tokens of a prefix get no gradient"),
    "likelihood": ("prefix-trained", "tokens of a prefix get their likelihood as a term"),
}
_REPLAYS = {"shape": "r / (r + gamma)", "ratio": "the plain ratio", "likelihood": "log p"}


def mixed_changes(steps: Sequence[PolicyStep], asked: PolicyObjective) -> Iterator[Hypothesis]:
    """All that have no number to be solved for."""
    if any(step.demonstrated().any() for step in steps):
        yield from _demonstrations(asked)
    if asked.own == "correctness":
        detail = "responses are weighted by their advantage, not by whether they are right"
        yield setting("policy-weight", "weight of right and wrong", detail, own="advantage")
        yield from _confidence(asked)
    if asked.own == "teacher":
        detail = "responses are weighted by their advantage, not by what the teacher says of their tokens"
        yield setting("policy-weight", "weight by the teacher", detail, own="advantage")
    if asked.own == "teacher" and asked.divergence == "none":
        detail = "tokens are weighted by the policy's log-probability alone, without the teacher's"
        alone = lambda s: replace(s, rollouts=tuple(_without_teacher(r) for r in s.rollouts))  # noqa: E731
        yield on_step("policy-weight", "log-probabilities of the teacher", detail, alone)
    if any(step.begun().any() for step in steps):
        yield from _prefixes(asked)
    if any(step.replayed().any() for step in steps):
        for other, words in _REPLAYS.items():
            if other != asked.replay:
                detail = f"the surrogate of replays is {words}, where {_REPLAYS[asked.replay]} was asked for"
                yield setting("replay-ratio", "surrogate of replays", detail, replay=other)
        detail = "the ratio of replays is that to the old policy, not to the one that sampled them"
        yield on_step("replay-ratio", "ratio of replays", detail, lambda s: replace(s, sampler=s.old))


def _demonstrations(asked: PolicyObjective) -> Iterator[Hypothesis]:
    part = "coefficient of demonstrations"
    none: dict[str, Any] = {"demonstration_weight": 0.0, "demonstration_likelihood": 0.0}
    detail = "the term of demonstrations is missing"
    yield setting("demonstration-missing", part, detail, **none)
    alone = lambda v: {"trained": whole_tokens(v) & ~v.step.demonstrated()[v.step.row]}  # noqa: E731
    yield overridden("demonstration-missing", part, f"{detail}, and the normaliser does not count them", alone)
    if asked.demonstration_likelihood:
        for name, words in (
            ("demonstration_weight", "surrogate with advantages"),
            ("demonstration_likelihood", "likelihood"),
        ):
            detail = f"the {words} of demonstrations is missing"
            yield setting("demonstration-missing", part, detail, **{name: 0.0})
    part = "surrogate of demonstrations"
    for other, words in _SURROGATES.items():
        if other not in (asked.demonstration, "raised"):  # which needs gradients that no other surrogate has
            detail = (
                f"the surrogate of demonstrations is {words}, where {_SURROGATES[asked.demonstration]} was asked for"
            )
            yield setting("demonstration-surrogate", part, detail, demonstration=other)
    how = "is not" if asked.demonstration_advantage else "is"
    detail = f"the surrogate of demonstrations {how} multiplied by the advantage"
    toggled = not asked.demonstration_advantage
    yield setting("demonstration-surrogate", part, detail, demonstration_advantage=toggled)
    detail = "demonstrations are trained as if they had been sampled, with ratio and advantage"
    yield on_step("demonstration-surrogate", part, detail, _as_sampled)
    for other, words in _DIVISORS.items():
        if other != asked.demonstration_divisor:
            detail = f"demonstrations are divided by {words}, not by {_DIVISORS[asked.demonstration_divisor]}"
            part = "normaliser of demonstrations"
            yield setting("demonstration-normaliser", part, detail, demonstration_divisor=other)
    other = {"all": "own", "own": "all"}[asked.compared]
    words = {"all": "takes in the demonstration", "own": "leaves the demonstration out"}[other]
    detail = f"the baseline of a group {words}"
    yield setting("advantage-baseline", "baseline", detail, compared=other)


def _as_sampled(step: PolicyStep) -> PolicyStep:
    return replace(step, rollouts=tuple(replace(r, demonstration=False) for r in step.rollouts))


def _each_prefix(step: PolicyStep) -> PolicyStep:
    return replace(step, rollouts=tuple(replace(r, repeated=False) for r in step.rollouts))


def _confidence(asked: PolicyObjective) -> Iterator[Hypothesis]:
    part = "weight by entropy"
    for other, words in _LEVELS.items():
        if other != asked.confidence:
            detail = f"the entropy in the weights {words}; it {_LEVELS[asked.confidence]} as asked for"
            yield setting("entropy-weight", part, detail, confidence=other)
    if asked.confidence != "none" and asked.demonstration_likelihood:
        detail = f"the likelihood of demonstrations is weighted by exp({-asked.confidence_sign:+d} H)"
        yield setting("entropy-weight", part, detail, confidence_sign=-asked.confidence_sign)


def _prefixes(asked: PolicyObjective) -> Iterator[Hypothesis]:
    part = "prefixes"
    for other, (found, detail) in _PREFIX.items():
        if other != asked.prefix:
            yield setting(found, part, detail, prefix=other)
    if asked.prefix == "kept":
        detail = "of a prefix the tokens with the lowest entropy are trained, not those with the highest"
        yield on_step("prefix-trained", part, detail, lambda s: replace(s, entropy=-s.entropy))
    if asked.prefix == "bounded":
        detail = "the likelihood of a prefix is not scaled down where its tokens are improbable"
        yield setting("prefix-trained", part, detail, prefix_bound=0.0)
        detail = "a prefix that several responses begin with is trained in each of them"
        yield on_step("prefix-trained", part, detail, _each_prefix)
    detail = "tokens of a prefix are not counted by the normaliser"
    rest = lambda v: {"counted": whole_tokens(v) & ~v.step.begun()}  # noqa: E731
    yield overridden("normaliser-counted", "normaliser of prefixes", detail, rest)
    if asked.entropy:
        words = {"all": "all tokens", "own": "what follows a prefix", "own-mean": "a mean over what follows a prefix"}
        for other in get_args(get_type_hints(PolicyObjective)["entropy_on"]):
            if other != asked.entropy_on:
                detail = f"the entropy bonus is on {words[other]}, where {words[asked.entropy_on]} was asked for"
                yield setting("entropy-bonus", "tokens of the entropy bonus", detail, entropy_on=other)


def _without_teacher(rollout: Rollout) -> Rollout:
    """As if the teacher had said nothing: log-probabilities of zero."""
    return replace(rollout, teacher=(0.0,) * len(rollout.teacher))
