"""What a step of reinforcement learning is asked to do: every setting that changes the weight of a token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from thence.audit.objectives import OBJECTIVES
from thence.errors import UserError


@dataclass(frozen=True)
class PolicyObjective:
    """The loss of the GRPO family, setting by setting.

    With ratio r_t = pi / pi_old, advantage A_i, correction c_t for the engine that sampled, and normaliser n_i:

        loss = sum over trained tokens of  n_i * (- c_t * surrogate(r_t, A_i) + kl * estimator_t - entropy * H_t)

    Args:
        baseline: subtracted from the reward: mean of the ``group``, of the ``batch`` that was sampled at once, of the
            others in the group (``leave-one-out``, RLOO), or ``none``.
        scale: standard deviation that advantages are divided by: ``group`` (GRPO), ``batch``, or ``none`` (Dr. GRPO).
        bessel: divide squares by n - 1, not by n.
        eps: added to the standard deviation.
        ratio: ``token`` (PPO, GRPO), ``sequence`` (GSPO, arXiv 2507.18071 eq. 5: exp of the mean log-ratio of a
            response's trained tokens), ``sequence-token`` (GSPO-token, section 4.3: that value with the gradient of
            each token by itself, so that factors of single tokens, such as corrections, stay theirs) or
            ``none`` (the plain policy gradient: r_t counts as one and nothing is clipped).
        surrogate: ``clip``: min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347 eq. 7); ``weight``: the
            detached ratio, clipped on both sides whatever the advantage, times log pi (CISPO, arXiv 2506.13585);
            ``mask``: r A, and nothing outside the range whatever the advantage; ``sigmoid``: (4 / tau) sigmoid(tau
            (r - 1)) A with tau = ``soft_above`` for positive advantages, else ``soft_below`` (SAPO, arXiv 2511.20347);
            ``gamma``: the detached phi(w) times A log pi, phi(w) = e^l w^k e^(-l w) with (k, l) = ``gamma_above`` where
            A >= 0, else ``gamma_below``, and w the product of a response's ratios and corrections (VESPO, arXiv
            2602.10693). Neither of the two is clipped. ``tv``, ``binary-kl``, ``band``: the detached ratio, at most
            ``dual_clip``, times log pi, and nothing outside a trust region of probabilities (DPPO, arXiv 2602.04879;
            IPO of prime-rl). With d = pi - pi_old: ``tv`` d <= high where A > 0, d >= -low where A < 0; ``binary-kl``
            the KL between taking the token and another one, for tokens that move away; ``band`` -low <= d <= high.
        clip_low, clip_high: range of the ratio below and above one, or bounds of a trust region; infinity: off.
        dual_clip: largest ratio through which a negative advantage acts (arXiv 1912.09729), with a trust region largest
            ratio at all; infinity: off.
        pull: coefficient of (log pi - log pi_old)^2.
        kl: coefficient of the KL to the reference policy.
        estimator: of the KL from samples; with d = log pi - log pi_ref: ``k1`` d, ``k2`` d^2 / 2,
            ``k3`` exp(-d) - 1 + d; ``full``: KL(pi || pi_ref), exact, over the whole vocabulary; ``full-forward``:
            KL(pi_ref || pi), exact too (ASFT, arXiv 2509.23753).
        kl_in: ``loss``: a term of its own, differentiated; ``reward``: kl times the estimator, summed over the
            response, is taken from the reward before advantages are made.
        kl_ratio: the KL is multiplied by the ratio, which is differentiated too (DeepSeek-V3.2, arXiv 2512.02556).
        entropy: coefficient of the entropy of the distributions that predict the trained tokens.
        temperature: logits are divided by it in every log-probability.
        correction: of the difference between the engine that sampled and the trainer, by
            exp(log pi_old - log pi_sampler): ``none``; ``truncate`` at the cap; ``mask``: tokens outside floor and
            cap get weight zero.
        correction_level: the ratio of a ``token``, or of the ``sequence`` (exp of the summed log-ratio).
        correction_cap, correction_floor: bounds of that ratio.
        normaliser: the key of ``OBJECTIVES`` that weighs rows and tokens.
        longest: constant of a constant divisor, tokens.
        truncated: whether responses that were cut at the length limit ``train`` or are a ``mask`` of zeros (DAPO's
            overlong filtering). They take part in the advantages of their group either way.
        demonstration: surrogate of demonstrations, with p their tokens' probability: ``likelihood`` log p (SFT),
            ``probability`` p (mixed policy), ``shape`` p / (p + gamma) (LUFFY, arXiv 2504.14945 eq. 8),
            ``uncertain`` log p times the detached p (1 - p) (CHORD-phi, arXiv 2508.11408), ``raised`` minus the
            cross-entropy to the reference policy's distribution with the token raised by ``raised_by`` nats (GIFT,
            arXiv 2601.09233); they have no ratio, no clip and no correction.
        raised_by: beta of ``raised``.
        demonstration_weight: its coefficient.
        demonstration_advantage: whether it is multiplied by the advantage.
        gamma: of the shaping.
        own_weight: coefficient of all other responses.
        compared: rewards that a group's baseline and standard deviation are made of: ``all`` or the policy's ``own``.
        counted: tokens that the normaliser counts: of ``all`` rows, or of rows whose weights are not all zero
            (``informative``: no masked response, no group of equal rewards).
        demonstration_likelihood: coefficient of log p of demonstrations beside their surrogate (SRFT, arXiv 2506.19767
            eq. 4 and 6).
        demonstration_divisor: tokens that divide the terms of demonstrations: as the normaliser (``all``), their
            ``own``, or both kinds by tokens of their own (``each``).
        own: what all other responses are weighted by: ``advantage``; ``correctness``: ``right_weight`` where the
            reward is 1 or more, else minus ``wrong_weight`` (SRFT eq. 9); or ``teacher``: each token by the teacher's
            log-probability minus the policy's (self-distillation, arXiv 2601.19897 and 2601.20802), or, with a
            ``divergence``, by no weight of its own.
        divergence: of the policy's whole next-token distributions p from the teacher's t, times the ratio as the
            surrogate has it: ``reverse`` KL(p || t), ``forward`` KL(t || p), ``jsd`` (1 - a) KL(p || m) +
            a KL(t || m) with m = (1 - a) p + a t and a the ``mixture``; ``none``: the taken tokens alone.
        likeliest: words that are compared, those that the policy finds likeliest; 0: all. With ``tail`` the others are
            one more word, else the rest is made to add up to one.
        confidence: level of the policy's entropy H before the step, a mean over the ``sequence`` or over all responses
            of the step (``batch``), or that of the ``token``; right responses are multiplied by exp(H) and
            ``demonstration_likelihood`` by exp(``confidence_sign`` * H), both detached (SRFT eq. 5, 10); or ``none``.
        replay: surrogate of replayed responses, with r the ratio to the policy that sampled them: ``shape``
            r / (r + gamma) (ExGRPO), ``ratio`` r, ``likelihood`` log p, each times the advantage.
        prefix: tokens that an expert wrote before the policy went on: ``train`` as all others; ``context``: counted,
            without a weight (BREAD, arXiv 2506.17211); ``likelihood``: ``prefix_weight`` times the mean of log p over
            them (UFT, arXiv 2505.16984); ``kept``: as all others, but only the ``prefix_keep`` share of those of the
            step with the highest entropy (Prefix-RFT, arXiv 2507.01679); ``bounded``: ``prefix_weight`` times log p
            with the slope min(1, p / ``prefix_bound``) (TrSFT of TRAPO, arXiv 2512.17636; a bound of 0: slope 1),
            divided as all others, and nothing on a repeated prefix. Only ``train`` has a KL on them.
        entropy_on: tokens with the entropy bonus: ``all``; those that are no ``prefix``'s (``own``); or a mean over
            those (``own-mean``).
    """

    baseline: Literal["group", "batch", "leave-one-out", "none"] = "group"
    scale: Literal["none", "group", "batch"] = "group"
    bessel: bool = True
    eps: float = 1e-6
    ratio: Literal["token", "sequence", "sequence-token", "none"] = "token"
    surrogate: Literal["clip", "weight", "mask", "sigmoid", "gamma", "tv", "binary-kl", "band"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = math.inf
    pull: float = 0.0
    kl: float = 0.0
    estimator: Literal["k1", "k2", "k3", "full", "full-forward"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_ratio: bool = False
    entropy: float = 0.0
    temperature: float = 1.0
    correction: Literal["none", "truncate", "mask"] = "none"
    correction_level: Literal["token", "sequence"] = "token"
    correction_cap: float = math.inf
    correction_floor: float = 0.0
    normaliser: str = "token-mean"
    longest: float = 0.0
    truncated: Literal["train", "mask"] = "train"
    counted: Literal["all", "informative"] = "all"
    demonstration: Literal["likelihood", "probability", "shape", "uncertain", "raised"] = "likelihood"
    raised_by: float = 20.0
    demonstration_weight: float = 1.0
    demonstration_advantage: bool = False
    gamma: float = 0.1
    own_weight: float = 1.0
    compared: Literal["all", "own"] = "all"
    demonstration_likelihood: float = 0.0
    demonstration_divisor: Literal["all", "own", "each"] = "all"
    own: Literal["advantage", "correctness", "teacher"] = "advantage"
    divergence: Literal["none", "reverse", "forward", "jsd"] = "none"
    mixture: float = 0.5
    likeliest: int = 0
    tail: bool = False
    right_weight: float = 0.1
    wrong_weight: float = 1.0
    confidence: Literal["none", "token", "sequence", "batch"] = "none"
    confidence_sign: Literal[-1, 1] = -1
    replay: Literal["shape", "ratio", "likelihood"] = "shape"
    prefix: Literal["train", "context", "likelihood", "kept", "bounded"] = "train"
    prefix_weight: float = 1.0
    prefix_keep: float = 0.2
    prefix_bound: float = 0.1
    entropy_on: Literal["all", "own", "own-mean"] = "all"
    soft_above: float = 1.0
    soft_below: float = 1.05
    gamma_above: tuple[float, float] = (2.0, 3.0)
    gamma_below: tuple[float, float] = (3.0, 2.0)

    @property
    def by_response(self) -> bool:
        """Whether the ratio is that of a whole response."""
        return self.ratio.startswith("sequence")

    @property
    def trusts(self) -> bool:
        """Whether tokens outside a trust region of probabilities are masked."""
        return self.surrogate in ("tv", "binary-kl", "band")

    @property
    def exact(self) -> bool:
        """Whether the KL is over the whole vocabulary."""
        return self.estimator in ("full", "full-forward")

    @property
    def forward(self) -> bool:
        """Whether whole distributions are compared as KL(pi_ref || pi), not as KL(pi || pi_ref)."""
        return self.estimator == "full-forward" or self.demonstration == "raised"

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> PolicyObjective:
        """From the plain settings that an adapter says (infinity may be None).

        Raises:
            UserError: an unknown setting, or a value that it cannot have.
        """
        known = {field.name: field for field in fields(cls)}
        for name in said:
            if name not in known:
                raise UserError(
                    f"a policy objective has no setting {name!r}", remedy=f"use {', '.join(sorted(known))}", field=name
                )
        settings: dict[str, Any] = {name: math.inf if value is None else value for name, value in said.items()}
        settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        made = cls(**settings)
        made.check()
        return made

    def check(self) -> None:
        """Refuse values that no step can be predicted from.

        Raises:
            UserError: an unknown choice or normaliser; a temperature or a divisor that is not positive; an exact KL in
                the reward.
        """
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            if choices and float not in choices and value not in choices:
                raise UserError(
                    f"a policy objective's {name} cannot be {value!r}",
                    remedy=f"use one of {', '.join(map(str, choices))}",
                    field=name,
                )
        if self.normaliser not in OBJECTIVES:
            raise UserError(
                f"there is no normaliser {self.normaliser!r}",
                remedy=f"use one of {', '.join(OBJECTIVES)}",
                field="normaliser",
            )
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"the temperature {self.temperature:g} is not above zero",
                remedy="give the temperature that logits are divided by",
                field="temperature",
            )
        if self.divergence != "none" and (self.own != "teacher" or self.exact or self.demonstration == "raised"):
            raise UserError(
                "a divergence is from a teacher, and no other whole distributions are compared beside it",
                remedy='set own = "teacher" and an estimator of sampled tokens (k1, k2, k3), or divergence = "none"',
                field="divergence",
            )
        if self.divergence == "jsd" and not 0 < self.mixture < 1:
            raise UserError(
                f"the teacher's share of a mixture cannot be {self.mixture:g}",
                remedy="give a number between 0 and 1; at the ends it is a forward or a reverse KL",
                field="mixture",
            )
        if self.exact and self.kl_in == "reward" and self.kl:
            raise UserError(
                "the exact KL in the reward cannot be predicted",
                remedy="use an estimator of the sampled tokens: k1, k2 or k3",
                field="estimator",
            )

    def plain(self) -> dict[str, Any]:
        """For JSON; infinity becomes None."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}
