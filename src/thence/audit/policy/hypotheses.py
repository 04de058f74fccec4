"""Single changes of what was asked for: settings that a trainer may have instead, and mistakes that it makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from thence.audit.objectives import OBJECTIVES
from thence.audit.policy.change import Hypothesis, on_step, overridden, setting, whole_tokens
from thence.audit.policy.facts import PolicyStep, Rollout
from thence.audit.policy.mixed_changes import mixed_changes
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.observed import Variant
from thence.audit.policy.outside import outside_changes

_BASELINES = {
    "group": "the mean of its group",
    "batch": "the mean of the whole batch",
    "leave-one-out": "the mean of the others in its group",
    "none": "nothing",
}
_SCALES = {
    "none": "not divided by a deviation",
    "group": "divided by the deviation of the group",
    "batch": "divided by the deviation of the batch",
}
_LEVELS = {"token": "of each token", "none": "left out"}
_LEVELS |= dict.fromkeys(("sequence", "sequence-token"), "of the whole response")
_SURROGATES = {
    "clip": "clipped by the sign of the advantage",
    "weight": "a detached weight",
    "mask": "masked on both sides, whatever the sign of the advantage",
    "sigmoid": "passed through a sigmoid",
    "gamma": "weighted by the gamma function of the whole response's ratio",
    "tv": "masked by the change of the token's probability, by the sign of the advantage",
    "binary-kl": "masked by the KL between the token and all others",
    "band": "masked by the change of the token's probability, whatever the sign of the advantage",
}


def hypotheses(steps: Sequence[PolicyStep], asked: PolicyObjective) -> list[Hypothesis]:
    """All changes that have no number to be solved for, the likely ones first."""
    return [
        *_advantages(steps, asked), *_ratio(asked), *_old(steps, asked), *_kl(steps, asked),
        *_importance(steps, asked), *_masks(steps, asked), *_normalisers(steps, asked), *_rows(steps),
        *mixed_changes(steps, asked), *outside_changes(steps, asked),
    ]  # fmt: skip


def _advantages(steps: Sequence[PolicyStep], asked: PolicyObjective) -> Iterator[Hypothesis]:
    for other, words in _BASELINES.items():
        if other != asked.baseline:
            detail = f"{words} is subtracted from a reward, not {_BASELINES[asked.baseline]}"
            yield setting("advantage-baseline", "baseline", detail, baseline=other)
    rollouts = steps[0].rollouts
    if asked.baseline in ("group", "leave-one-out") or asked.scale == "group":
        for words, groups in _other_groups(rollouts):
            detail = f"the groups that advantages are made in are {words}"
            yield on_step("advantage-groups", "groups", detail, lambda s, g=groups: _regrouped(s, g))
        for words, per in (("micro-batch", "micro_batch"), ("rank", "rank")):
            if all((getattr(s, per) >= 0).all() and len(set(getattr(s, per).tolist())) > 1 for s in steps):
                detail = f"advantages are made among the rows of a {words}, not of a group"
                yield on_step("advantage-groups", "groups", detail, lambda s, p=per: _by_place(s, p))
        detail = "a group counts one row more than it has, with reward 0 (padding, for example)"
        yield on_step("advantage-padded", "groups", detail, _padded)
    for other, words in _SCALES.items():
        if other != asked.scale:
            detail = f"advantages are {words}, where they were to be {_SCALES[asked.scale]}"
            yield setting("advantage-deviation", "deviation", detail, scale=other)
    if asked.scale != "none":
        words = ("n", "n - 1") if asked.bessel else ("n - 1", "n")
        detail = f"the squares of the deviation are divided by {words[0]}, not by {words[1]}"
        yield setting("advantage-bessel", "deviation", detail, bessel=not asked.bessel)
        if _flat_groups(rollouts, asked.scale):
            detail = "a group of equal rewards is trained on the rewards themselves, where its advantages are zero"
            yield overridden("advantage-zero-variance", "groups of equal rewards", detail, _raw_where_flat)
    if any(rollout.truncated for rollout in rollouts):
        detail = "responses cut at the length limit do not take part in the statistics of their group"
        yield on_step("advantage-filtered", "groups", detail, _filtered)
    detail = "the advantages have the opposite sign"
    yield on_step("advantage-sign", "sign", detail, _negated)
    yield Hypothesis("advantage-sign", "sign", "the loss has the opposite sign", lambda v: replace(v, factor=-1.0))


def _ratio(asked: PolicyObjective) -> Iterator[Hypothesis]:
    if asked.ratio == "none":
        for level in ("token", "sequence"):
            detail = f"the ratio {_LEVELS[level]} is in the loss, where none was asked for"
            yield setting("ratio-added", "ratio", detail, ratio=level, clip_low=math.inf, clip_high=math.inf)
            yield setting("ratio-added", "ratio", f"{detail}, and clipped", ratio=level, clip_low=0.2, clip_high=0.2)
        return
    detail = "the ratio is always one: left out, or the old log-probabilities are made anew at every step"
    yield setting("ratio-missing", "ratio", detail, ratio="none")
    if asked.surrogate != "gamma":  # whose w is the response's always
        other = "token" if asked.by_response else "sequence"
        detail = f"the ratio is {_LEVELS[other]}, not {_LEVELS[asked.ratio]}"
        yield setting("ratio-level", "level of the ratio", detail, ratio=other)
    above = "1 + high is no bound to the ratio of positive advantages"
    below = "1 - low is no bound to the ratio of negative advantages"
    dual = {"dual_clip": math.inf}
    if asked.clip_low < math.inf or asked.clip_high < math.inf:
        yield setting("clip-missing", "", "the ratio is not clipped", clip_low=math.inf, clip_high=math.inf, **dual)
    if asked.clip_high < math.inf:
        yield setting("clip-missing", "clipping above", above, clip_high=math.inf)
    if asked.clip_low < math.inf:
        yield setting("clip-missing", "clipping below", below, clip_low=math.inf)
    for kind, words in _SURROGATES.items():
        if kind != asked.surrogate:
            found = "clip-both-sides" if kind == "mask" else "clip-surrogate"
            detail = f"the ratio is {words}, where it was to be {_SURROGATES[asked.surrogate]}"
            yield setting(found, "kind of clipping", detail, surrogate=kind)
    if asked.clip_low != asked.clip_high:
        low, high = asked.clip_low, asked.clip_high
        for new, words in (((high, low), "exchanged"), ((low, low), "both low"), ((high, high), "both high")):
            detail = f"the two bounds of the ratio, {low:g} below and {high:g} above, are {words}"
            yield setting("clip-range", "bounds of the ratio", detail, clip_low=new[0], clip_high=new[1])
    if asked.dual_clip < math.inf:
        detail = f"ratios above {asked.dual_clip:g} still act on negative advantages"
        yield setting("clip-dual", "dual clip", detail, dual_clip=math.inf)


def _old(steps: Sequence[PolicyStep], asked: PolicyObjective) -> Iterator[Hypothesis]:
    part = "old log-probabilities"
    for back in range(1, max(_own(s) for s in steps) + 1):
        detail = f"the old log-probabilities are those of {_before(back)}"
        yield on_step("old-version", part, detail, lambda s, b=back: _older(s, b))
    if any(_own(s) for s in steps):
        detail = "the old log-probabilities are those of the initial parameters at every step"
        yield on_step("old-version", part, detail, lambda s: replace(s, old=s.versions[0]))
    detail = "the old log-probabilities are made anew at every step"
    if asked.correction != "none" or asked.kl_in == "reward":
        yield on_step("old-version", part, detail, lambda s: replace(s, old=s.logp))
    if _with_sampler(steps):
        detail = "the sampling engine's log-probabilities stand in the ratio, not the trainer's own old ones"
        yield on_step("old-sampler", "", detail, lambda s: replace(s, old=s.sampler))


def _kl(steps: Sequence[PolicyStep], asked: PolicyObjective) -> Iterator[Hypothesis]:
    if not asked.kl:
        return
    yield setting("kl-coefficient", "KL coefficient", f"no KL is taken, where {asked.kl:g} was asked for", kl=0.0)
    detail = f"the KL has the opposite sign: its coefficient is {-asked.kl:g}"
    yield setting("kl-sign", "KL coefficient", detail, kl=-asked.kl)
    for other in ("k1", "k2", "k3"):
        if other != asked.estimator:
            detail = f"the KL is estimated by {other}, where {asked.estimator} was asked for"
            yield setting("kl-estimator", "KL estimator", detail, estimator=other)
    if asked.kl_in == "loss" and not asked.exact and asked.ratio != "none":
        how = ("is not multiplied", "was to be") if asked.kl_ratio else ("is multiplied", "was not to be")
        detail = f"the KL {how[0]} by the ratio, and {how[1]}"
        yield setting("kl-estimator", "KL estimator", detail, kl_ratio=not asked.kl_ratio)
    if not asked.exact:
        other = "reward" if asked.kl_in == "loss" else "loss"
        detail = f"the KL is in the {other}, where it was asked for in the {asked.kl_in}"
        yield setting("kl-place", "place of the KL", detail, kl_in=other)
    detail = "the reference of the KL is the old policy"
    yield on_step("kl-reference", "reference of the KL", detail, lambda s: replace(s, reference=s.old))
    if max(len(s.versions) for s in steps) > 1:
        detail = "the reference of the KL is the policy one optimizer step before"
        yield on_step("kl-reference", "reference of the KL", detail, lambda s: replace(s, reference=s.versions[-2:][0]))
        detail = "the reference of the KL is the initial policy"
        yield on_step("kl-reference", "reference of the KL", detail, lambda s: replace(s, reference=s.versions[0]))
    if _with_sampler(steps):
        detail = "the reference of the KL is the sampling engine"
        yield on_step("kl-reference", "reference of the KL", detail, lambda s: replace(s, reference=s.sampler))


def _importance(steps: Sequence[PolicyStep], asked: PolicyObjective) -> Iterator[Hypothesis]:
    if not _with_sampler(steps):
        return
    part, bound = "importance weights", "bounds of the importance weights"
    if asked.correction == "none":
        for level, words in (("token", "of tokens"), ("sequence", "of responses")):
            detail = (
                f"importance weights {words} between sampler and trainer are in the loss, where none were asked for"
            )
            yield setting("importance-added", part, detail, correction="truncate", correction_level=level)
            detail += ", cut at {:g}"
            for cap in (2.0, 5.0):
                settings = {"correction": "truncate", "correction_level": level, "correction_cap": cap}
                yield setting("importance-added", part, detail.format(cap), **settings)
        return
    yield setting("importance-missing", part, "importance weights are left out", correction="none")
    detail = "the importance weights are the sampler's probability over the trainer's, not the other way round"
    inverse = lambda s: replace(s, sampler=2 * s.old - s.sampler)  # noqa: E731
    yield on_step("importance-inverted", part, detail, inverse)
    other = "token" if asked.correction_level == "sequence" else "sequence"
    detail = f"importance weights are {_LEVELS[other]}, not {_LEVELS[asked.correction_level]}"
    yield setting("importance-level", "level of the importance weights", detail, correction_level=other)
    if asked.correction_cap < math.inf or asked.correction_floor > 0:
        detail = "importance weights have no bound"
        unbounded = {"correction_cap": math.inf, "correction_floor": 0.0}
        yield setting("importance-bound", bound, detail, **unbounded)
        mode = {"truncate": "mask", "mask": "truncate"}[asked.correction]
        words = {"mask": "get weight zero, and are not held at it", "truncate": "are held at it, and not masked"}[mode]
        yield setting("importance-mode", bound, f"tokens beyond the bound {words}", correction=mode)


def _masks(steps: Sequence[PolicyStep], asked: PolicyObjective) -> Iterator[Hypothesis]:
    rollouts = steps[0].rollouts
    if any(rollout.truncated for rollout in rollouts):
        part = "responses cut at the length limit"
        if asked.truncated == "mask":
            detail = "responses cut at the length limit are trained, where they are to be masked"
            yield setting("truncated-trained", part, detail, truncated="train")
            detail = "responses cut at the length limit are masked, but counted by the normaliser"
            yield overridden("normaliser-counted", part, detail, lambda v: {"counted": ~v.step.environment()})
        else:
            detail = "responses cut at the length limit are masked, where they are to be trained"
            yield setting("truncated-masked", part, detail, truncated="mask")
            detail = f"{detail}; the normaliser counts them"
            kept = lambda v: {"trained": whole_tokens(v) & ~v.step.truncated()[v.step.row], "counted": whole_tokens(v)}  # noqa: E731
            yield overridden("truncated-masked", part, detail, kept)
    if any(rollout.environment for rollout in rollouts):
        part, detail = "tokens of the environment", "tokens that the policy did not write are trained"
        yield overridden("environment-trained", part, detail, lambda v: {"trained": _with_environment(v)})
        detail += ", and not counted by the normaliser"
        both = lambda v: {"trained": _with_environment(v), "counted": whole_tokens(v)}  # noqa: E731
        yield overridden("environment-trained", part, detail, both)
        detail = "tokens that the policy did not write are counted by the normaliser"
        yield overridden("normaliser-counted", part, detail, lambda v: {"counted": _with_environment(v)})
    for found, words, which in (("end-missing", "last", _last), ("first-missing", "first", lambda s: s.place == 0)):
        detail = f"the {words} token of every response is not trained"
        without = lambda v, w=which: {"trained": whole_tokens(v) & ~w(v.step)}  # noqa: E731
        yield overridden(found, f"{words} tokens", detail, without)
        counted = lambda v, w=which: {"trained": whole_tokens(v) & ~w(v.step), "counted": whole_tokens(v)}  # noqa: E731
        yield overridden(found, f"{words} tokens", f"{detail}, but counted", counted)


def _normalisers(steps: Sequence[PolicyStep], asked: PolicyObjective) -> Iterator[Hypothesis]:
    for name, objective in OBJECTIVES.items():
        if name == asked.normaliser or (name == "constant-divisor" and not asked.longest):
            continue
        detail = f"the {objective.title} is taken, where the {OBJECTIVES[asked.normaliser].title} was asked for"
        # The others are the same as these where there is one rank, or one row in a micro-batch: see ``alike``.
        part = "normaliser" if name in ("token-mean", "sequence-mean", "micro-batch-mean") else ""
        yield setting(name, part, detail, normaliser=name)
    if any(len({s.rollouts[e].group for e in s.example}) > 1 for s in steps):
        yield overridden("group-mean", "normaliser", "the mean of the means of groups is taken", _group_mean)
    other = {"all": "informative", "informative": "all"}[asked.counted]
    words = {"informative": "does not count", "all": "counts"}[other]
    detail = f"the normaliser {words} rows whose advantage is zero"
    yield setting("normaliser-counted", "tokens that the normaliser counts", detail, counted=other)


def _rows(steps: Sequence[PolicyStep]) -> Iterator[Hypothesis]:
    """Rows whose gradient is lost."""
    if all((s.micro_batch >= 0).all() for s in steps) and any(s.micro_batch.max() > 0 for s in steps):
        for found, words, kept in (
            ("first-only", "the first micro-batch", lambda s: s.micro_batch == 0),
            ("last-only", "the last micro-batch", lambda s: s.micro_batch == s.micro_batch.max()),
            (
                "first-and-last-only",
                "the first and the last micro-batch",
                lambda s: (s.micro_batch == 0) | (s.micro_batch == s.micro_batch.max()),
            ),
        ):
            only = lambda v, k=kept: replace(v, factor=v.factor * k(v.step)[v.step.row])  # noqa: E731
            yield Hypothesis(found, "rows", f"only {words} arrived", only)
    ranks = {rank for s in steps for rank in s.rank.tolist()}
    if len(ranks) > 1:
        for rank in sorted(ranks):
            lost = lambda v, r=rank: replace(v, factor=v.factor * (v.step.rank != r)[v.step.row])  # noqa: E731
            yield Hypothesis("rank-missing", "rows", f"the rows of rank {rank} did not arrive", lost)


def _other_groups(rollouts: Sequence[Rollout]) -> Iterator[tuple[str, list[int]]]:
    count = len(rollouts)
    size = max(sum(other.group == r.group and other.batch == r.batch for other in rollouts) for r in rollouts)
    if size < 2 or count % size:
        return
    neighbours, interleaved = [i // size for i in range(count)], [i % (count // size) for i in range(count)]
    shifted = [((i + 1) % count) // size for i in range(count)]
    for words, groups in (
        ("neighbouring rows", neighbours),
        ("interleaved rows", interleaved),
        ("shifted by one row", shifted),
    ):
        if not _same_parts(groups, [r.group for r in rollouts]):
            yield words, groups


def _same_parts(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


def _with_sampler(steps: Sequence[PolicyStep]) -> bool:
    """Whether a sampling engine gave log-probabilities; those of a replay are an earlier policy's."""
    return any(rollout.sampler and not rollout.replay for rollout in steps[0].rollouts)


def _regrouped(step: PolicyStep, groups: Sequence[int]) -> PolicyStep:
    own = (*groups, *(max(groups) + 1 + r.group for r in step.rollouts[len(groups) :]))
    return replace(step, rollouts=tuple(replace(r, group=g) for r, g in zip(step.rollouts, own, strict=True)))


def _by_place(step: PolicyStep, place: str) -> PolicyStep:
    rollouts = list(step.rollouts)
    for example, number in zip(step.example.tolist(), getattr(step, place).tolist(), strict=True):
        rollouts[example] = replace(rollouts[example], group=-1 - number)
    return replace(step, rollouts=tuple(rollouts))


def _padded(step: PolicyStep) -> PolicyStep:
    places = dict.fromkeys((r.group, r.batch) for r in step.rollouts)
    return replace(step, rollouts=(*step.rollouts, *(Rollout(0.0, group, batch) for group, batch in places)))


def _filtered(step: PolicyStep) -> PolicyStep:
    own = tuple(replace(r, group=-1 - i) if r.truncated else r for i, r in enumerate(step.rollouts))
    return replace(step, rollouts=own)


def _negated(step: PolicyStep) -> PolicyStep:
    return replace(step, rollouts=tuple(replace(r, reward=-r.reward) for r in step.rollouts))


def _flat_groups(rollouts: Sequence[Rollout], scale: str) -> bool:
    keys = {(r.batch, r.group if scale == "group" else 0) for r in rollouts}
    for key in keys:
        own = [r.reward for r in rollouts if (r.batch, r.group if scale == "group" else 0) == key]
        if len(own) > 1 and max(own) == min(own):
            return True
    return False


def _raw_where_flat(variant: Variant) -> dict[str, Any]:
    from thence.audit.policy.predict import row_advantages

    advantage = row_advantages(variant.step, variant.asked)
    rollouts = variant.step.rollouts
    for row, example in enumerate(variant.step.example.tolist()):
        mine = rollouts[example]
        own = {r.reward for r in rollouts if r.batch == mine.batch and r.group == mine.group}
        if len(own) == 1:
            advantage[row] = mine.reward
    return {"advantage": advantage}


def _before(back: int) -> str:
    return "one version before those that made the responses" if back == 1 else f"{back} versions before"


def _older(step: PolicyStep, back: int) -> PolicyStep:
    """The step with its old log-probabilities from so many versions earlier."""
    return replace(step, old=step.versions[max(_own(step) - back, 0)])


def _own(step: PolicyStep) -> int:
    """The version of a step's old log-probabilities."""
    return next((i for i, logp in enumerate(step.versions) if logp is step.old), 0)


def _with_environment(variant: Variant) -> np.ndarray:
    masked = variant.step.truncated()[variant.step.row] & (variant.asked.truncated == "mask")
    return ~masked


def _last(step: PolicyStep) -> np.ndarray:
    lengths = np.bincount(step.row, minlength=step.rows)
    return step.place == lengths[step.row] - 1


def _group_mean(variant: Variant) -> dict[str, Any]:
    step = variant.step
    group = np.unique([step.rollouts[e].group for e in step.example], return_inverse=True)[1]
    lengths = np.bincount(step.row[whole_tokens(variant)], minlength=step.rows)
    tokens = np.bincount(group, lengths)
    return {"normal": 1.0 / (len(tokens) * np.maximum(tokens[group], 1))}
