"""On-policy self-distillation: the model is its own teacher once it may read a solution (sdft, sdpo).

With ``divergence = "sampled"``, the default:

    L = - (1 / B) sum_i (1 / T_i) sum_t  w_it log pi(y_it | x),
    w_it = - (log pi(y_it | x) - log teacher(y_it | x, solution)) min(r_it, 2),   r_it = pi / pi_old

The student samples y for the prompt x. The teacher is the same model without gradient: it scores y under a prompt that
holds x and a solution. B responses in the step, T_i tokens in response i. w follows from the models before the
optimizer step and is a constant to it. Its expectation is the gradient of KL(student || teacher) at each token, so the
student becomes more like the model that knows the solution. The logged loss is the weighted log-probability.

With another ``divergence`` D the whole next-token distributions are compared at each token, p of the student and t of
the teacher, and the gradient has the student's probabilities of all words in it:

    L = (1 / B) sum_i (1 / T_i) sum_t  min(r_it, 2) D_it

    reverse-kl: D = KL(p || t)     forward-kl: D = KL(t || p)
    jsd: D = (1 - alpha) KL(p || m) + alpha KL(t || m),  m = (1 - alpha) p + alpha t

``top_k`` keeps the words that the student finds likeliest. The other words are left out and the rest is made to add up
to one, or they are one more word (``tail``). A chunk of logits at a time is held, never all.

sdft (arXiv 2601.19897) shows the prompt's demonstration. Prompts without one are not drawn. Rewards are only reported.
sdpo (arXiv 2601.20802) shows a right response of the same group: the first other one whose reward is ``success`` or
more. Where a group has none, its responses have no teacher and no weight; they still count in B, as in the code.

Teacher weights: those that the stage starts from (sdft), a moving average (sdpo), or the policy's own (``current``).
Code: TRL 1.16, ``experimental.sdft`` and ``experimental.sdpo``. Its modes are ``sampled_token``, ``full_logits`` and
``topk_logits``; its distillation_alpha 0, 1 and between are forward-kl, reverse-kl and jsd. sampled_token is the
default of its sdpo; that of its sdft is ``divergence = "jsd"``, ``alpha = 0.5``, ``top_k = 100``. TRL averages over the
rows of each micro-batch; here B counts the whole step. Its tail has a probability of 1e-7 at least, here its own.
Feedback of an environment, the blend with a policy gradient and taking the thinking out of solutions are left out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Options, TokenFacts, Weights
from thence.methods.groups import groups_of
from thence.methods.teaching import Teacher
from thence.objective import Divergence, Logp, Normaliser, Surrogate, Term, distils
from thence.objective.surrogates import LOG_RATIO_LIMIT
from thence.settings.limits import Ceiling, Natural, Signed, SomeShare, Text


def _is_form(value: str) -> str:
    for place in ("{prompt}", "{solution}"):
        if value.count(place) != 1:
            raise ValueError(f"it must hold {place} once, where the teacher reads the {place.strip('{}')}")
    return value


Form = Annotated[Text, AfterValidator(_is_form)]


class SelfDistillationOptions(Options):
    """Settings of both methods."""

    teacher: Literal["current", "start", "average"]
    """The teacher's weights. current: the policy's own. start: those that the stage starts from. average: the moving
    average of the policy's."""
    average_rate: SomeShare = 0.05
    """Share of the policy's weights in the average, added after every optimizer step (teacher = "average")."""
    ratio_bound: Ceiling = 2.0
    """Largest ratio of the policy to the one that sampled. inf: off."""
    divergence: Literal["sampled", "reverse-kl", "forward-kl", "jsd"] = "sampled"
    """sampled: the reverse KL by the taken token alone. reverse-kl: KL(student || teacher) over the whole vocabulary.
    forward-kl: KL(teacher || student). jsd: that of Jensen and Shannon, between both."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's share of the mixture that both are compared with (divergence = "jsd")."""
    top_k: Natural = 0
    """Only the words that the student finds likeliest, so many (not with divergence = "sampled"). 0: all."""
    tail: bool = False
    """The other words count as one more word (top_k). false: they are left out, and the rest adds up to one."""
    skip_tokens: Natural = 0
    """First tokens of each response that get no weight, and are not counted in its length."""
    form: Form
    """The teacher's question: {prompt} is the last user turn (or the plain prompt), {solution} the solution."""

    @model_validator(mode="after")
    def _each_is_used(self) -> SelfDistillationOptions:
        given, whole = self.model_fields_set, 'a divergence over the vocabulary, such as "reverse-kl"'
        if "alpha" in given and self.divergence != "jsd":
            raise ValueError(f'alpha has no part in divergence = "{self.divergence}"; leave it out, or set "jsd"')
        if self.top_k and self.divergence == "sampled":
            raise ValueError(f'top_k has no part in divergence = "sampled"; leave it out, or set {whole}')
        if self.tail and not self.top_k:
            raise ValueError("tail has no part without top_k; leave it out, or set top_k")
        return self


class SdftOptions(SelfDistillationOptions):
    """Settings of SDFT."""

    teacher: Literal["current", "start", "average"] = "start"
    """The teacher's weights. current: the policy's own. start: those that the stage starts from. average: the moving
    average of the policy's."""
    form: Form = "{prompt}\n\n{solution}"
    """The teacher's question: {prompt} is the last user turn (or the plain prompt), {solution} the demonstration."""


class SdpoOptions(SelfDistillationOptions):
    """Settings of SDPO."""

    teacher: Literal["current", "start", "average"] = "average"
    """The teacher's weights. current: the policy's own. start: those that the stage starts from. average: the moving
    average of the policy's."""
    form: Form = "{prompt}\nCorrect solution:\n\n{solution}\n\n\n\nCorrectly solve the original question.\n"
    """The teacher's question: {prompt} is the last user turn (or the plain prompt), {solution} the right response."""
    success: Signed = 1.0
    """Least reward of a response that is shown to the teacher."""
    show_own: bool = False
    """A right response may be its own solution. false: it needs another right one in its group."""


class SelfDistillation(Method):
    """What SDFT and SDPO share: the term and its weights."""

    stage = "rl"
    uses_old = True
    not_ahead = ""
    single_turn = "its teacher reads a response behind another prompt, without what an environment said between"
    Options = SelfDistillationOptions

    @property
    def teacher(self) -> Teacher:
        o = self.options
        return Teacher(o.teacher, o.form, o.average_rate)

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term("distillation", self._surrogate(), Normaliser("sequences")),)

    def _surrogate(self) -> Surrogate:
        o = self.options
        match o.divergence:
            case "reverse-kl":
                return Divergence("reverse", top_k=o.top_k, tail=o.tail)
            case "forward-kl":
                return Divergence("forward", top_k=o.top_k, tail=o.tail)
            case "jsd":
                return Divergence("jsd", o.alpha, o.top_k, o.tail)
        return Logp()

    def rewarded(self, trajectory: Trajectory) -> bool:
        """No response needs a reward of its own to be taught."""
        return False

    @abstractmethod
    def solutions(self, trajectories: Sequence[Trajectory]) -> list[tuple[int, ...] | None]: ...

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        return [{"distillation": self._weights(fact)} for fact in facts]

    def clipped(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> int:
        o = self.options
        ratios = [_ratio(fact)[o.skip_tokens :] for fact in facts if _is_taught(fact)]
        return sum(int((ratio > o.ratio_bound).sum()) for ratio in ratios)

    def _weights(self, fact: TokenFacts) -> Tensor:
        """Of one response's tokens, shape (n,), float64."""
        o = self.options
        weights = torch.zeros(len(fact.logp), dtype=torch.float64)
        counted = len(weights) - o.skip_tokens
        if counted <= 0 or not _is_taught(fact):
            return weights
        held = _ratio(fact).clamp(max=o.ratio_bound) / counted
        if fact.teacher is not None and not distils(self.terms):
            held = held * (fact.teacher.double() - fact.logp.double())
        weights[o.skip_tokens :] = held[o.skip_tokens :]
        return weights


class Sdft(SelfDistillation):
    """Distillation from the model that reads the demonstration."""

    name = "sdft"
    formula = "(1/B) sum_i (1/T) sum (log pi - log teacher) min(r, 2) log pi, the teacher reads a demonstration"
    source = "arXiv 2601.19897; TRL 1.16 experimental.sdft"
    exactness = "reconstruction"
    demonstrations = "shown"
    Options = SdftOptions

    def solutions(self, trajectories: Sequence[Trajectory]) -> list[tuple[int, ...] | None]:
        return [trajectory.prompt.demonstration_ids or None for trajectory in trajectories]


class Sdpo(SelfDistillation):
    """Distillation from the model that reads a right response of the group."""

    name = "sdpo"
    formula = "(1/B) sum_i (1/T) sum (log pi - log teacher) min(r, 2) log pi, the teacher reads a right response"
    source = "arXiv 2601.20802; TRL 1.16 experimental.sdpo"
    exactness = "exact"
    Options = SdpoOptions

    @property
    def least_rollouts(self) -> int:
        """Alone in its group, a response has no other one to be taught by."""
        return 1 if self.options.show_own else 2

    def solutions(self, trajectories: Sequence[Trajectory]) -> list[tuple[int, ...] | None]:
        found: list[tuple[int, ...] | None] = []
        for group in groups_of(trajectories):
            right = [t for t in group if t.score is not None and t.score >= self.options.success and t.response_ids]
            for trajectory in group:
                others = right if self.options.show_own else [t for t in right if t is not trajectory]
                found.append(others[0].response_ids if others else None)
        return found


def _is_taught(fact: TokenFacts) -> bool:
    return fact.shown or fact.teacher is not None


def _ratio(fact: TokenFacts) -> Tensor:
    """Ratio of the policy to the one that sampled, shape (n,), float64; its log is held within +-20."""
    return fact.log_ratio.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
