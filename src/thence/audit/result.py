"""What an audit found: plain frozen records, the same in the terminal, the page, JSON and JUnit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["prompt", "first", "body", "end", "after", "padding"]
"""What a token is as the target of a prediction. ``first``, ``body`` and ``end`` make up the response; ``end`` is its
end-of-turn token, ``after`` what a template writes behind it, ``padding`` the filling up to the longest row."""

RESPONSE_ROLES: tuple[Role, ...] = ("first", "body", "end")

Status = Literal["judged", "not judged", "skipped", "failed"]
Kind = Literal["fault", "choice", "note"]
Beyond = Literal["", "resume", "saved", "evaluation"]
"""What a case looks at beside the weights of its steps: starting again from a checkpoint, what is saved, the trainer's
own evaluation; empty: the weights."""
Outcome = Literal["no finding", "finding", "cannot judge"]
EXIT_CODES: Mapping[str, int] = {"no finding": 0, "finding": 1, "cannot judge": 2}


@dataclass(frozen=True)
class Case:
    """One setting of the matrix: how the same examples are cut into micro-batches, and with what switches.

    Args:
        name: shown in the report, unique in a matrix.
        micro_batch: rows in one forward pass of one rank.
        accumulation: micro-batches of one rank in one optimizer step.
        ranks: data-parallel processes.
        examples: size of the data set; fewer or more than one window makes an incomplete one.
        epochs: passes over the data set.
        steps: stop after that many optimizer steps.
        optimizer: ``sgd``; ``adamw`` with betas (0, 0.999) and the epsilon below, linear in the gradient; ``unknown``:
            that of the program, as seen from its first update.
        lr: learning rate, of the first step where the schedule is not constant.
        eps: epsilon of adamw.
        betas: of adamw. Cases whose weights are judged have (0, 0.999); those that resume need a state to be lost.
        schedule: of the learning rate: ``constant``, or ``linear`` from ``lr`` at the first step to 0 after the last
            one of all epochs.
        clip: global-norm clipping; 0: off.
        precision: of the weights and the arithmetic; ``autocast`` keeps float32 weights and computes in bfloat16.
        packing: rows laid end to end.
        checkpointing: activation checkpointing.
        label_smoothing: share of the loss given to the uniform distribution.
        options: what only this stack has (ZeRO stage, offload, loss type ...).
        asked: the objective that the settings ask for; a key of ``thence.audit.objectives.OBJECTIVES``.
        quick: whether ``--quick`` runs it.
        extra: a setting that nobody has by default; only ``--all`` and ``--only`` run it.
        beyond: what is looked at in place of the weights; empty: the weights.
        save_after: optimizer steps before the checkpoint from which a case that resumes starts again.
    """

    name: str
    micro_batch: int = 2
    accumulation: int = 4
    ranks: int = 1
    examples: int = 8
    epochs: int = 1
    steps: int = 1
    optimizer: Literal["sgd", "adamw", "unknown"] = "sgd"
    lr: float = 1.0
    eps: float = 1e4
    betas: tuple[float, float] = (0.0, 0.999)
    schedule: Literal["constant", "linear"] = "constant"
    clip: float = 0.0
    precision: Literal["float32", "bfloat16", "autocast"] = "float32"
    packing: bool = False
    checkpointing: bool = False
    label_smoothing: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    asked: str = "token-mean"
    quick: bool = False
    extra: bool = False
    beyond: Beyond = ""
    save_after: int = 0

    @property
    def window(self) -> int:
        """Rows in one full optimizer step."""
        return self.micro_batch * self.accumulation * self.ranks


@dataclass(frozen=True)
class TokenWeight:
    """One target token of one row.

    Args:
        text: the token as text.
        role: what it is.
        weight: what it got: the factor of the gradient of its negative log-probability in the update.
        ideal: what it should have got under the objective asked for (0 for tokens that are not to be trained).
        ratio: weight over ideal; over the mean ideal weight where the ideal is zero. If the scale of the update is
            not known, the ratios of the response are scaled to a weighted mean of one.
    """

    text: str
    role: Role
    weight: float
    ideal: float
    ratio: float


@dataclass(frozen=True)
class SequenceWeights:
    """The weights of one row: an example's prompt and response.

    Args:
        example: index in the probe.
        micro_batch: index of its micro-batch among those of its rank in this step, or None where not known.
        rank: its rank, or None.
        weight: weight of its response tokens over ideal, averaged.
        tokens: every target token, in order.
    """

    example: int
    micro_batch: int | None
    rank: int | None
    weight: float
    tokens: tuple[TokenWeight, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that the weights say.

    Args:
        id: a key of ``thence.audit.judge.findings.CATALOGUE``.
        kind: ``fault``: not what was asked for; ``choice``: an objective with a name of its own, as asked;
            ``note``: worth knowing.
        detail: one sentence with the figures of this case.
    """

    id: str
    kind: Kind
    detail: str


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, recovered.

    Args:
        index: 1 for the first.
        objective: the objective that the weights amount to (a key of ``OBJECTIVES``), or None.
        alike: further objectives that give the same weights in this case and cannot be told apart here.
        residual: norm of the part of the update that the token weights do not explain, over the norm of the update.
        residual_sequences: the same for one weight per sequence.
        condition: condition number of the token gradients, columns scaled to norm one.
        error: standard error of a token's ratio, in units of the ideal weight.
        scale: sum of the recovered weights over the sum of the ideal ones; None where the optimizer hides it.
        smallest: least ratio among response tokens.
        largest: greatest ratio among response tokens.
        lost: share of the ideal gradient weight that did not arrive.
        roles: mean ratio by role.
        sequences: every row of the step.
        findings: what is to be said of this step.
        undetermined: response tokens whose gradients depend on those of others; they are taken to be as asked.
        source: what the weights were read from: the update, its signs alone, or the gradients that the optimizer got.
        unseen: what this step does not show, such as what the optimizer makes of the gradient, a line each.
    """

    index: int
    objective: str | None
    alike: tuple[str, ...]
    residual: float
    residual_sequences: float
    condition: float
    error: float
    scale: float | None
    smallest: float
    largest: float
    lost: float
    roles: Mapping[str, float]
    sequences: tuple[SequenceWeights, ...]
    findings: tuple[Finding, ...] = ()
    undetermined: int = 0
    source: Literal["update", "signs", "gradient"] = "update"
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class CutComparison:
    """The first update of a case beside that of another case, which trains the same rows in another cut.

    Args:
        reference: name of the other case.
        measure: ``signs``: share of signs that differ, for Adam; ``norm``: norm of the difference over that of the
            reference's update.
        share: what was measured.
        allowed: what rounding may cause.
    """

    reference: str
    measure: Literal["signs", "norm"]
    share: float
    allowed: float


@dataclass(frozen=True)
class PolicyCheck:
    """What a case says of its policy objective.

    Args:
        settings: that were asked for, by name; None stands for infinity.
        verified: parts of the objective of which any other setting that was tried would have given another update.
        open: part -> a change of it that would have given the same updates, or why nothing was tried: not verified.
        found: what is not as asked, in words; two sentences are true together.
        others: further changes that explain the updates as well, in words.
    """

    settings: Mapping[str, Any]
    verified: tuple[str, ...] = ()
    open: Mapping[str, str] = field(default_factory=dict)
    found: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedSets:
    """The sets of weights that a program wrote, by the names of their files.

    Args:
        judged: whose weights the case is about, and why that one.
        same: further ones that hold the same numbers, up to rounding.
        left: others, each with the reason why nothing is said of them.
    """

    judged: str
    same: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseResult:
    """One case: its steps, or why there are none.

    Args:
        status: ``judged``; ``not judged``: it ran, but the update is not a weighted sum of token gradients;
            ``skipped``: the stack lacks the setting; ``failed``: the stack stopped with an error or a time limit.
        reason: for every status but ``judged``.
        findings: of the case as a whole (no step taken, ranks that differ ...); those of steps stand in the steps.
        seconds: wall time in the stack.
        cut: comparison with another cut of the same rows; None: there was none to compare with.
        said: of a case without steps (``Case.beyond``), what was seen, one clause.
        unseen: of such a case, what it could not show, clauses.
        policy: what was verified of a policy objective; None: supervised, or nothing but advantages was said.
        written: of a program, the sets of weights that it wrote; None: nobody looked for others.
    """

    case: Case
    status: Status
    reason: str = ""
    steps: tuple[StepResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0
    cut: CutComparison | None = None
    said: str = ""
    unseen: tuple[str, ...] = ()
    policy: PolicyCheck | None = None
    written: SavedSets | None = None

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What is not as asked for, also in a case that could not be judged."""
        return tuple(finding for finding in self.all_findings if finding.kind == "fault")

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """Of the case and of its steps, each id once."""
        unique: dict[str, Finding] = {}
        for finding in (*self.findings, *(f for step in self.steps for f in step.findings)):
            unique.setdefault(finding.id, finding)
        return tuple(unique.values())


@dataclass(frozen=True)
class PublicReport:
    """A public report of what was found, from known_faults.toml.

    Args:
        installed: whether the audited version is among the affected ones.
    """

    id: str
    package: str
    affected: str
    remedy: str
    sources: tuple[str, ...]
    installed: bool


@dataclass(frozen=True)
class AuditVerdict:
    """The answer, in two plain sentences, and what to change.

    Args:
        objective: what the weights of all judged cases amount to, or None.
        asked: what was asked for.
        sentences: what is the case; then what it means for training.
        remedy: what to change; empty where nothing is wrong.
        known: public reports of the same fault.
        case: name of the case whose figures the sentences give; empty: of all.
    """

    outcome: Outcome
    objective: str | None
    asked: str
    sentences: tuple[str, str]
    remedy: str = ""
    known: tuple[PublicReport, ...] = ()
    case: str = ""

    @property
    def exit_code(self) -> int:
        """0 no finding, 1 finding, 2 could not judge."""
        return EXIT_CODES[self.outcome]
