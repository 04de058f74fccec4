"""The faults of reinforcement learning, in the order in which several are applied."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from thence.faults import features as has
from thence.faults import penalties, policy, versions
from thence.faults.cut import Change
from thence.faults.fault import Fault, Needs
from thence.objective import Clip, Generation, Ratio


def _needs(*features: has.Feature, steps: int = 1, generations: int = 1) -> Needs:
    return Needs(features=(has.ROLLOUTS, *features), steps=steps, generations=generations)


def _fault(name: str, title: str, finds: str, source: str, change: Change, needs: Needs) -> Fault:
    return Fault(name, title, (finds,), needs, source, change)


def _advantage(
    name: str, title: str, finds: str, source: str, rule: Callable[[Generation], Tensor], *features: has.Feature
) -> Fault:
    return _fault(name, title, finds, source, policy.with_advantages(rule), _needs(*features))


def _clip(name: str, title: str, finds: str, source: str, change: Change, *features: has.Feature) -> Fault:
    return _fault(name, title, finds, source, change, _needs(has.CLIP, has.MOVED, *features, steps=2))


def _kl(name: str, title: str, finds: str, source: str, change: Change, *features: has.Feature, **counts: int) -> Fault:
    return _fault(name, title, finds, source, change, _needs(has.KL, *features, **counts))


def _importance(name: str, title: str, finds: str, source: str, weight_of: Callable[[Tensor, float], Tensor]) -> Fault:
    return _fault(name, title, finds, source, penalties.importance(weight_of), _needs(has.IMPORTANCE))


POLICY_FAULTS = (
    Fault(
        "old-stale", "old log-probabilities are one version too old", ("old-version",),
        _needs(has.CLIP, has.MOVED, steps=3, generations=2),
        "a scoring replica that gets the new weights one step late", wrap=versions.stale, outermost=True,
        remembers=True,
    ),
    Fault(
        "temperature-ignored", "temperature left out of the trainer's log-probabilities", ("temperature",),
        _needs(has.TEMPERATURE, has.NO_KL, has.CLIP), "TRL before 0.16: logits were not divided by the temperature",
        wrap=versions.temperature_ignored, outermost=True,
    ),
    Fault(
        "truncated-trained", "truncated responses trained that were to be masked", ("truncated-trained",),
        _needs(has.MASKED), "overlong filtering (DAPO, arXiv 2503.14476) that does not arrive at the loss",
        policy.truncated_trained,
    ),
    Fault(
        "environment-trained", "tokens of tools and environments trained", ("environment-trained",),
        _needs(has.ENVIRONMENT), "a response mask without the mask of tool output", policy.environment_trained,
    ),
    Fault(
        "uninformative-counted", "filtered groups of equal rewards counted by the normaliser", ("normaliser-counted",),
        _needs(has.TOKENS, has.UNINFORMATIVE), "groups that are masked after the tokens were counted",
        policy.uninformative_counted,
    ),
    _advantage(
        "groups-interleaved", "mean of interleaved responses in place of the group's", "advantage-groups",
        "rewards reshaped along the wrong axis", policy.groups_interleaved,
    ),
    _advantage(
        "groups-shifted", "groups that begin one response too early", "advantage-groups",
        "rows shifted against their groups by a sampler or a dropped row", policy.groups_shifted,
    ),
    _advantage(
        "baseline-batch", "mean of the rollout batch in place of the group's", "advantage-baseline",
        "REINFORCE's baseline where GRPO's was asked for", policy.baseline_batch,
    ),
    _advantage(
        "baseline-missing", "no baseline", "advantage-baseline",
        "plain REINFORCE where GRPO was asked for", policy.baseline_missing,
    ),
    _advantage(
        "std-biased", "standard deviation without Bessel's correction", "advantage-bessel",
        "numpy's default, where torch's was asked for", policy.std_biased, has.STD,
    ),
    _advantage(
        "std-of-batch", "standard deviation of the rollout batch in place of the group's", "advantage-deviation",
        "a batch-level normalisation (REINFORCE++, arXiv 2501.03262) where GRPO was asked for", policy.std_of_batch,
        has.STD,
    ),
    Fault(
        "advantage-negated", "advantages with the wrong sign", ("advantage-sign",), _needs(),
        "a loss that is maximised", policy.advantage_negated,
    ),
    Fault(
        "uninformative-left-out", "groups of equal rewards not counted by the normaliser", ("normaliser-counted",),
        _needs(has.TOKENS), "tokens counted where the advantage is not zero", policy.uninformative_left_out,
    ),
    Fault(
        "group-means", "every group divided by its own tokens", ("group-mean",), _needs(has.TOKENS),
        "a token mean inside each prompt's group, where one over the step was asked for", policy.group_means,
    ),
    _clip(
        "clip-missing", "ratio not clipped", "clip-missing", "a policy gradient with ratio alone",
        policy.with_surrogate(lambda clip: Ratio()),
    ),
    _clip(
        "clip-both-sides", "ratio clipped on both sides whatever the advantage", "clip-both-sides",
        "a clamped ratio without the minimum of PPO (arXiv 1707.06347 eq. 7)",
        policy.with_surrogate(lambda clip: policy.ClipBothSides(clip.low, clip.high)),
    ),
    _clip(
        "clip-symmetric", "upper clip range as narrow as the lower", "clip-range",
        "DAPO's clip-higher that does not arrive at the loss (arXiv 2503.14476)",
        policy.with_surrogate(lambda clip: Clip(clip.low, clip.low, clip.dual)), has.CLIP_HIGHER,
    ),
    _clip(
        "dual-clip-missing", "no dual clip", "clip-dual", "verl's clip_ratio_c that does not arrive at the loss",
        policy.with_surrogate(lambda clip: Clip(clip.low, clip.high)), has.DUAL_CLIP,
    ),
    _clip(
        "ratio-by-sequence", "one ratio a response where each token was to have its own", "ratio-level",
        "GSPO (arXiv 2507.18071) where GRPO was asked for", policy.ratio_by_sequence,
    ),
    _clip(
        "ratio-one", "old log-probabilities recomputed before every step", "ratio-missing",
        "old log-probabilities taken after the update: the ratio is always one", policy.ratio_one,
    ),
    Fault(
        "ratio-by-token", "each token its own ratio where a response was to have one", ("ratio-level",),
        _needs(has.SEQUENCE_RATIO, has.MOVED, steps=2),
        "GRPO where GSPO (arXiv 2507.18071) was asked for", policy.ratio_by_token,
    ),
    _kl(
        "kl-k1", "estimator k1 in place of k3", "kl-estimator", "a loss whose KL has no gradient in expectation",
        penalties.kl_by("k1"), has.K3,
    ),
    _kl(
        "kl-doubled", "KL counted twice", "kl-coefficient", "a penalty in two places",
        penalties.kl_times(2.0), steps=2,
    ),
    _kl(
        "kl-halved", "KL counted half", "kl-coefficient", "a coefficient that is averaged once too often",
        penalties.kl_times(0.5), steps=2,
    ),
    _kl(
        "kl-missing", "no KL", "kl-coefficient", "a coefficient that does not arrive at the loss",
        penalties.kl_times(0.0), steps=2,
    ),
    _kl(
        "kl-to-old", "KL to the policy that sampled, not to the reference", "kl-reference",
        "a reference that is synchronised with the policy", penalties.kl_to_old, steps=2, generations=2,
    ),
    _kl(
        "kl-in-reward", "KL in the reward where it was to be in the loss", "kl-place",
        "PPO's place of the KL, where GRPO's was asked for",
        penalties.kl_in_reward, has.WHOLE, steps=2, generations=2,
    ),
    _importance(
        "importance-missing", "no importance weights against the sampler", "importance-missing",
        "a correction that does not arrive at the loss", lambda ratio, bound: ratio.new_ones(ratio.shape),
    ),
    _importance(
        "importance-uncapped", "importance weights without their cap", "importance-bound", "a cap that is not applied",
        lambda ratio, bound: ratio,
    ),
    _importance(
        "importance-masked", "tokens above the cap of importance weights masked, not truncated", "importance-mode",
        "masked importance sampling where truncated was asked for",
        lambda ratio, bound: ratio * (ratio <= bound),
    ),
    _importance(
        "importance-inverted", "importance weights upside down", "importance-inverted",
        "the sampler's probability over the trainer's",
        lambda ratio, bound: (1 / ratio).clamp(max=bound),
    ),
)  # fmt: skip
