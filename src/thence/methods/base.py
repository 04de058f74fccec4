"""What a method is: what to sample and attach, and the weight that every token gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.methods.facts import TokenFacts
from thence.methods.teaching import Teacher
from thence.methods.weights import Weights, laid_out
from thence.objective import BareRow, Batch, Row, Sampled, Term, compares, trained_tokens
from thence.objective.terms import needs_behaviour, needs_reference
from thence.settings.section import Section
from thence.settings.validation import validated

T = TypeVar("T")


class Options(Section):
    """Settings of a method: immutable, and an unknown key is an error."""


class Sampler(Protocol):
    """What a method composes its batch with.

    Attributes:
        step: rollout batches before this one.
        steps: rollout batches of the stage.
        rank, world: this process among those that share the batch. Each composes its share of one batch: prompts are
            dealt in turn, so that 1, 2 or 4 ranks have the same batch. What a method decides must be the same on all.
    """

    step: int
    steps: int
    rank: int
    world: int

    def next_prompts(self, count: int) -> list[Prompt]:
        """This rank's share of the next ``count`` prompts in the data's order: every ``world``-th from ``rank`` on."""
        ...

    def rollouts(self, prompts: Sequence[Prompt], n: int, first: int = 0) -> list[Trajectory]:
        """``n`` graded responses of the policy for each prompt, prompt by prompt.

        Those that nobody can judge are among them, with ``score = None``: see :mod:`thence.methods.unknown`.

        Args:
            first: number of a prompt's first response. The random numbers of a response follow from its number, so a
                method that samples a group in rounds gives each round the numbers that come next: 4 responses and then
                4 more with ``first = 4`` are the 8 that one call gives. Two calls for one draw of a prompt with the
                same numbers give the same responses twice. A rank may ask for other prompts in a round than another
                rank, or for none: no rank waits for another here.
        """
        ...

    def continuations(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int, first: int = 0
    ) -> list[Trajectory]:
        """``n`` graded responses for each prompt that begin with the given tokens and are finished by the policy.

        ``first`` as for :meth:`rollouts`; the numbers of continuations and rollouts are apart.
        """
        ...

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, as the tokenizer decodes it."""
        ...

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        """The expert's responses, graded like the policy's. Every prompt must have one."""
        ...

    def expert_prompts(self, count: int) -> list[Prompt]:
        """This rank's share of the next ``count`` prompts with a demonstration, in an order of their own."""
        ...

    def uniform(self, *key: object) -> float:
        """A number in [0, 1) that follows from the recipe's seed, the stage, the step and the key alone."""
        ...

    def total(self, count: int) -> int:
        """The sum of a count over all ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every rank, in rank order, on every rank. All ranks must ask."""
        ...


@dataclass(frozen=True)
class SideStep:
    """An optimizer step of a second kind, with its own optimizer state.

    Args:
        name: of the kind; the optimizer belongs to it.
        terms: of this kind of step.
        trajectories: this rank's.
        weights: of each trajectory, as :meth:`Method.weigh` gives them.
        lr: learning rate; None: the stage's.
        clip_norm: largest gradient norm; None: the stage's.
    """

    name: str
    terms: tuple[Term, ...]
    trajectories: Sequence[Trajectory]
    weights: Sequence[Weights]
    lr: float | None = None
    clip_norm: float | None = None


_COMPOSED = ("compose", "side_steps", "work")


class Method(ABC):
    """A rule that gives every token a list of (surrogate, weight) terms.

    Third parties register a subclass under the entry point group ``thence.methods``.
    """

    name: ClassVar[str]
    stage: ClassVar[Literal["sft", "rl"]]
    formula: ClassVar[str]
    """The loss in one line."""
    source: ClassVar[str]
    """Where the formula stands."""
    exactness: ClassVar[Literal["exact", "reconstruction"]]
    """reconstruction: parts of it are not public, and what stands for them was chosen here. There is no default, and
    none is inherited: every method that can be named in a recipe states it in its own class."""
    demonstrations: ClassVar[Literal["no", "whole", "begun", "shown"]] = "no"
    """Whether it learns from demonstrations in an RL stage: from whole ones, from responses that begin with a part of
    one, or from what a teacher who reads them makes of responses. Then prompts without one are not drawn."""
    uses_facts: ClassVar[bool] = False
    """Whether :meth:`weigh` looks at the policy's own log-probabilities and entropies."""
    uses_old: ClassVar[bool] = False
    """Whether :meth:`weigh` looks at the old log-probabilities too (:attr:`TokenFacts.old`); it then gets facts."""
    needs_several_steps: ClassVar[bool] = False
    """Whether its bound can act only from the second optimizer step of a rollout batch on."""
    uses_reference: ClassVar[bool] = False
    """Whether :meth:`weigh` looks at the log-probabilities of a reference model (:attr:`TokenFacts.reference`). The
    facts' ``logp`` and ``entropy`` are NaN where it says nothing else."""
    not_ahead: ClassVar[str | None] = None
    """Why batches cannot be composed before the steps before them are taken (``rl.ahead``), as a part of a sentence.
    Empty: they can, for :meth:`compose` looks at the sampler and the options alone, and what :meth:`weigh` needs of it
    is told by :meth:`take_up`. None: not stated. Stated in the class that composes: see :mod:`thence.methods.ahead`."""
    single_turn: ClassVar[str] = ""
    """Why it cannot train rollouts of several turns, as a sentence; empty: it can. One that weighs the policy's tokens
    by rewards can: its n response tokens are those of all turns. One that takes responses apart cannot."""
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Mapping[str, Any] | None = None):
        remedy = f"see `thence methods {self.name}` (method {self.name})"
        self.options: Any = validated(self.Options, dict(options or {}), "options", remedy=remedy)

    @classmethod
    def exactness_with(cls, options: Mapping[str, Any]) -> Literal["exact", "reconstruction"]:
        """The exactness with these options of a recipe; default: :attr:`exactness` whatever they are."""
        return cls.exactness

    @property
    def least_rollouts(self) -> int:
        """The fewest rollouts of a prompt with which it can learn anything; default: 1."""
        return 1

    @property
    def teacher(self) -> Teacher | None:
        """Who scores the responses beside the policy; default: nobody. With a teacher, :meth:`weigh` gets facts."""
        return None

    def solutions(self, trajectories: Sequence[Trajectory]) -> Sequence[tuple[int, ...] | None]:
        """What the teacher reads beside each trajectory's prompt: the tokens of a response to it. Default: nothing.

        Args:
            trajectories: whole groups.

        Returns:
            One entry a trajectory; None: there is nothing to show, and the trajectory has no teacher.
        """
        return [None] * len(trajectories)

    def prepare(self, rollouts: int, max_tokens: int) -> None:
        """Told the stage's settings, once, before anything is sampled.

        Args:
            rollouts: n of :meth:`compose`.
            max_tokens: the longest response.

        Raises:
            RecipeError: it cannot learn with them. ``field`` is as seen from the stage's table.
        """
        if rollouts < self.least_rollouts:
            raise RecipeError(
                f"{self.name} learns nothing from {rollouts} rollout of a prompt",
                remedy=f"set rollouts to {self.least_rollouts} or more; 8 is usual",
                field="rollouts",
            )

    def rewarded(self, trajectory: Trajectory) -> bool:
        """Whether the method needs this trajectory's reward. Default: all but demonstrations.

        One that it needs and nobody can tell is left out of the step.
        """
        return trajectory.origin != "demonstration"

    def compared(self, trajectory: Trajectory) -> bool:
        """Whether this trajectory's reward is part of its group's baseline. Default: if the reward is needed."""
        return self.rewarded(trajectory)

    @property
    def reference_passes(self) -> int:
        """How often a reference model, the policy as the stage began, reads every row of a step; 0: none is kept."""
        return needs_reference(self.terms) + self.uses_reference + compares(self.terms)

    def own_passes(self, steps: int, bounded: bool = False) -> float:
        """How often the policy reads every row of a rollout batch without gradient, for this method's sake: a plan
        counts with it. :meth:`thence.pipeline.rl_update.Update.take` makes these passes.

        Args:
            steps: optimizer steps on a rollout batch.
            bounded: whether the recipe has an ``importance_bound``, which takes a pass of its own.
        """
        facts = self.uses_facts or self.uses_old or self.uses_reference or self.teacher is not None
        later = (steps - 1) / steps if self.uses_old else float(needs_behaviour(self.terms) and steps > 1)
        return facts + later + bounded

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms of every batch, each with a name of its own."""

    @abstractmethod
    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> Sequence[Weights]:
        """The weights of every trajectory's response tokens, for whole groups at a time.

        Args:
            trajectories: those of one optimizer step.
            facts: of the policy before that step, one a trajectory, if the method ``uses_facts`` or ``uses_old``.

        Returns:
            For each trajectory a weight for each term, by the term's name: a number for all of its n tokens, or a
            tensor of shape (n,). All terms are named: one that the trajectory has no part in gets 0.
        """

    def clipped(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> int:
        """How many response tokens a clip of the method's own holds back; default: 0.

        For the metrics. The step counts clips within a surrogate; it cannot tell a weight of 0 that comes from a clip
        in :meth:`weigh` from any other 0. The arguments are those of :meth:`weigh`.
        """
        return 0

    def figures(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> dict[str, float]:
        """Quantities of an SFT stage's log by name, each summed over these response tokens; default: none.

        The stage logs their means a token, over all ranks. The arguments are those of :meth:`weigh`.
        """
        return {}

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        """This rank's trajectories of one rollout batch, whole groups; default: ``n`` rollouts for each prompt.

        Args:
            prompts: of the whole batch, over all ranks.
            n: size of a group.
        """
        return sampler.rollouts(sampler.next_prompts(prompts), n)

    def work(self, prompts: int, n: int) -> Work:
        """What a rollout batch samples and trains, side steps included; default: all ``n`` rollouts of each prompt.

        A plan counts with it. The arguments are those of :meth:`compose`. Overridden wherever :meth:`compose` or
        :meth:`side_steps` is.
        """
        return Work.just(Outcome(prompts * n, prompts * n))

    @property
    def states_work(self) -> bool:
        """Whether :meth:`work` speaks of what this class composes, and not of what a class above it does."""
        owners = type(self).__mro__
        places = {part: next(i for i, owner in enumerate(owners) if part in vars(owner)) for part in _COMPOSED}
        return places["work"] == min(places.values())

    def take_up(self, sampler: Sampler) -> None:  # noqa: B027 - most methods need nothing
        """Told by whom the batch was composed that is weighed next, where that was not the batch composed last.

        With ``rl.ahead``, another object of this method composes the batches, in another thread.
        """

    def side_steps(self, sampler: Sampler) -> list[SideStep]:
        """Optimizer steps of another kind that follow the update on this rollout batch; default: none."""
        return []

    def took_step(self, kind: str, grad_norm: float) -> None:  # noqa: B027 - most methods do not look at it
        """Told after every optimizer step: ``main`` or a side step's name, and the gradient norm before clipping."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values. If all ranks have the same, another number of them can resume."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a method without state has nothing to take up
        """Take up a state that :meth:`state` gave."""


def in_turn(parts: Sequence[Sequence[T]]) -> list[T]:
    """What was dealt to ranks in turn, in the order before it was dealt."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def reward_of(trajectory: Trajectory) -> float:
    """The reward of a trajectory that is given an advantage.

    Raises:
        ValueError: nobody knows it; such a trajectory is left out before weights are given.
    """
    if trajectory.score is None:
        raise ValueError(f"a response to prompt {trajectory.prompt.index} has no reward; leave it out, or grade it")
    return trajectory.score


def switched_on(**weights: float) -> dict[str, float]:
    """The weights of terms that a coefficient of zero switches off: those that are not zero."""
    return {name: weight for name, weight in weights.items() if weight}


def bare_row(trajectory: Trajectory) -> BareRow:
    """What the model reads of a trajectory; its response tokens are the trained ones, and no observation is."""
    after, written = trajectory.after_prompt()
    ids = torch.tensor([*trajectory.prompt.token_ids, *after], dtype=torch.int64)
    trained = trained_tokens(len(trajectory.prompt.token_ids), len(ids))
    if trajectory.observations:
        trained[len(trajectory.prompt.token_ids) :] &= torch.tensor(written)
    return BareRow(ids, trained)


def make_rows(
    terms: Sequence[Term],
    trajectories: Sequence[Trajectory],
    weights: Sequence[Weights],
    *,
    old: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
    sampled: Sequence[Sampled] | None = None,
    shown: Sequence[BareRow | None] | None = None,
) -> list[Row]:
    """Trajectories and their weights as rows of a batch.

    Args:
        terms: of the batch.
        weights: of each trajectory, as :meth:`Method.weigh` gives them.
        old: log-probabilities of each trajectory's response tokens under the policy as it stood when the batch was
            sampled, shape (n,) each; None: it has not moved since. A replay has its own instead. Rows have them only
            where a term is a ratio to that policy.
        reference: the same under the reference policy of a KL term.
        sampled: how each response came about, for faults.
        shown: what a teacher reads in place of each row.

    Raises:
        UserError: see :func:`laid_out`.
    """
    rows, ratio = [], needs_behaviour(terms)
    for i, (trajectory, given) in enumerate(zip(trajectories, weights, strict=True)):
        bare, weight = bare_row(trajectory), laid_out(terms, given, len(trajectory.response_ids))
        behaviour = behaviour_of(trajectory, None if old is None else old[i]) if ratio else None
        theirs = None if reference is None else reference[i]
        facts = None if sampled is None else sampled[i]
        teaching = None if shown is None else shown[i]
        rows.append(Row(bare.token_ids, bare.trained, weight, behaviour, theirs, facts, teaching))
    return rows


def behaviour_of(trajectory: Trajectory, old: Tensor | None) -> Tensor | None:
    """Log-probabilities under the policy that sampled a trajectory, shape (n,): those of a replay, else ``old``."""
    return old if trajectory.behaviour is None else torch.tensor(trajectory.behaviour)


def make_batch(
    method: Method, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = (), temperature: float = 1.0
) -> Batch:
    """Trajectories as a batch for :meth:`thence.Trainer.step`, with the weights that the method gives them.

    Args:
        trajectories: whole groups.
        facts: of the policy as it stands, one a trajectory, if the method ``uses_facts``.
        temperature: of sampling.
    """
    return Batch(
        method.terms, tuple(make_rows(method.terms, trajectories, method.weigh(trajectories, facts))), temperature
    )
