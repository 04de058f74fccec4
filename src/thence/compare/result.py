"""What a comparison found, as plain records: what its report, its JSON and its CSV are made of."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thence.compare.belonging import what_does_not_belong
from thence.compare.registration import Registration, what_is_not_registered, what_was_altered
from thence.errors import DamagedFile, UserError
from thence.files import finite, keep_damaged, write_atomically
from thence.records import Record, read_record
from thence.redaction import redacted_values

log = logging.getLogger(__name__)
RESULTS = "results.json"
ALL_BASES = "(all)"
"""In place of a base's name: all of them, block by block. No base can have this name."""
FEW_BASES = 4
"""With more, a report shows means over bases first."""
SUMMARY = "summary.json"
"""What a finished run keeps in its own folder, see :mod:`thence.compare.summary`."""


@dataclass(frozen=True)
class Arm(Record):
    """An arm as its recipe describes it.

    Args:
        name: key in the recipe.
        title: what tables call it.
        group: heading under which tables put it, for example ``Mixed policy from base``.
        after: the arm whose model it starts from; empty: the base.
        kind: ``sft``, ``rl``, or empty for an arm that trains nothing.
        method: name of its method; empty where nothing is trained.
        fault: names of its faults.
        accumulation: micro-batches of one rank in a step that the faults cut.
        tries: settings tried for it, and for each it starts from, before the reported seeds.
        reconstruction: whether the method's source leaves something open.
        paper: what the paper reports, by base name; shown beside, never compared with.
        note: one line for the reader.
    """

    name: str
    title: str
    group: str = ""
    after: str = ""
    kind: str = ""
    method: str = ""
    fault: tuple[str, ...] = ()
    accumulation: int = 0
    tries: int = 1
    reconstruction: bool = False
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Column(Record):
    """A test set at a temperature."""

    split: str
    temperature: float


@dataclass(frozen=True)
class Measured(Record):
    """One run on one column.

    Args:
        right: right samples of each problem; problems are in the same order in every run of a base and seed.
        samples: samples for each problem.
        mean_tokens: mean length of a response.
        truncated, unknown: responses without an end token, and without a verdict.
    """

    column: Column
    right: tuple[int, ...]
    samples: int
    mean_tokens: float
    truncated: int
    unknown: int

    @property
    def accuracy(self) -> float:
        """avg@samples, between 0 and 1."""
        return sum(self.right) / (len(self.right) * self.samples)


@dataclass(frozen=True)
class Spent(Record):
    """What training cost.

    Args:
        steps: optimizer steps for SFT, rollout batches for RL.
        trained_tokens, generated_tokens: tokens.
        rule_flops: 6N a trained token, 2N a generated one.
        executed_flops: prompts, attention, output head and scoring passes included; None where the model's family
            cannot be counted.
        seconds: wall time of the steps.
    """

    steps: int
    trained_tokens: int
    generated_tokens: int
    rule_flops: int | float  # as they were counted, so that a file read and written again is the same
    executed_flops: int | float | None
    seconds: float

    def __add__(self, other: Spent) -> Spent:
        executed = None
        if self.executed_flops is not None and other.executed_flops is not None:
            executed = self.executed_flops + other.executed_flops
        return Spent(
            self.steps + other.steps,
            self.trained_tokens + other.trained_tokens,
            self.generated_tokens + other.generated_tokens,
            self.rule_flops + other.rule_flops,
            executed,
            self.seconds + other.seconds,
        )


NOTHING = Spent(0, 0, 0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Run(Record):
    """One arm from one base with one seed, measured on the test sets.

    Args:
        settings: values that tuning chose, for example ``{"lr": 2e-4}``.
        spent: of the whole way from the base, earlier arms included; the base's own training not.
        own: of the arm's own stage alone.
        curve: quantities of the arm's own stage by name (``step``, ``loss``, ``grad_norm``, ``reward``, ``entropy``,
            ``response_tokens``, ``flops``), one value a step; empty where nothing was trained.
        folder: where the run's files are, relative to the comparison's folder.
    """

    arm: str
    base: str
    seed: int
    settings: Mapping[str, Any]
    spent: Spent
    own: Spent
    measured: tuple[Measured, ...]
    curve: Mapping[str, tuple[int | float | None, ...]]
    folder: str = ""

    def on(self, column: Column) -> Measured | None:
        """Its measurement in a column."""
        return next((m for m in self.measured if m.column == column), None)


@dataclass(frozen=True)
class Try(Record):
    """One setting tried on the dev split: the mean accuracy over the tuning seeds, between 0 and 1."""

    arm: str
    base: str
    settings: Mapping[str, Any]
    accuracy: float
    chosen: bool


@dataclass(frozen=True)
class Failure(Record):
    """A run that did not end, and why."""

    arm: str
    base: str
    seed: int
    why: str


@dataclass(frozen=True)
class Comparison(Record):
    """All of it; finished or not.

    Args:
        reference: the arm that paired differences are taken to.
        budget: for the reader, for example ``2e12 FLOPs``.
        columns: the first is the headline.
        tuning_runs: the finished runs with tuning seeds, tries and what they build on; they are not reported.
        pending: runs that are still to come.
        sections: the tables and figures that the recipe asks for, see :mod:`thence.compare.sections`.
        base_seeds: planned seeds of each base; a base that is only tuned on has none. Empty: all have ``seeds``.
        registration: the design that was written down before the first reported run; None: there is none.
        covariate, contrasts: what is to be decided, as the recipe has it, see :mod:`thence.compare.contrasts`.
    """

    name: str
    description: str
    reference: str
    budget: str
    bases: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    arms: tuple[Arm, ...]
    runs: tuple[Run, ...] = ()
    tuning_runs: tuple[Run, ...] = ()
    tries: tuple[Try, ...] = ()
    failures: tuple[Failure, ...] = ()
    pending: int = 0
    sections: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    base_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    covariate: Mapping[str, Any] = field(default_factory=dict)
    contrasts: tuple[Mapping[str, Any], ...] = ()
    registration: Registration | None = None

    def seeds_of(self, base: str) -> tuple[int, ...]:
        """The planned seeds of a base."""
        return self.base_seeds.get(base, self.seeds)

    @property
    def is_sealed(self) -> bool:
        """Whether no difference may be looked at yet: contrasts were registered, and runs are still to come."""
        return self.registration is not None and bool(self.contrasts) and self.pending > 0

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """Base and seed of every block that is planned."""
        return tuple((base, seed) for base in self.bases for seed in self.seeds_of(base))

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def is_pooled(self) -> bool:
        """Whether there are so many bases that means over all of them are shown first."""
        return len(self.reported_bases) > FEW_BASES

    @property
    def reported_bases(self) -> list[str]:
        """The bases with reported runs; others are only tuned on."""
        return [base for base in self.bases if self.seeds_of(base)]

    def planned_on(self, base: str) -> int:
        """How many blocks a base has; of :data:`ALL_BASES`, how many there are."""
        return len(self.blocks) if base == ALL_BASES else len(self.seeds_of(base))

    def runs_of(self, arm: str, base: str) -> list[Run]:
        """The finished runs of an arm on a base, by seed; on :data:`ALL_BASES`, base by base."""
        if base == ALL_BASES:
            return [run for each in self.bases for run in self.runs_of(arm, each)]
        return sorted((r for r in self.runs if (r.arm, r.base) == (arm, base)), key=lambda r: r.seed)


def results_json(comparison: Comparison) -> str:
    """The records as JSON without secrets, a line a run; :func:`read_results` reads them back."""
    fields = []
    for name, value in asdict(comparison).items():
        value = redacted_values(value)
        rows = isinstance(value, list) and any(isinstance(row, dict) for row in value)
        text = "[\n" + ",\n".join(map(_compact, value)) + "\n]" if rows else _compact(value)
        fields.append(f'"{name}": {text}')
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(finite(value), separators=(",", ":"), allow_nan=False)


def read_results(folder: Path) -> Comparison:
    """The results that a comparison wrote into its folder; or the file itself, where it is kept elsewhere.

    Raises:
        UserError: there are none.
        DamagedFile: they cannot be read, name what they do not hold, or the registered design was changed by hand.
    """
    path = folder if folder.is_file() else folder / RESULTS
    remedy = (
        "put a whole copy of it back (git checkout, a backup); or rename it, and what finished runs measured is read "
        "from their own folders: runs whose folders are not there are then run again"
    )
    try:
        found = read_record(path, Comparison, remedy=remedy)
    except FileNotFoundError:
        raise UserError("no comparison has left its results here", remedy="run `thence compare`", file=path) from None
    if misfit := what_does_not_belong(found):
        field, said = misfit
        raise DamagedFile(f"the file was changed by hand: {said}", remedy=remedy, file=path, field=field)
    if wrong := _not_as_registered(found):
        raise DamagedFile(
            f"the registration was changed by hand: {wrong}",
            remedy="put the file back as thence wrote it (git checkout, a backup); a design is changed in the "
            "comparison's own file, with --amend",
            file=path,
            field="registration",
        )
    return found


def _not_as_registered(found: Comparison) -> str:
    """What does not fit the registered design; empty: all does, or there is none."""
    if (kept := found.registration) is None:
        return ""
    if wrong := what_was_altered(kept):
        return wrong
    seeds = {base: found.seeds_of(base) for base in found.bases}
    field = what_is_not_registered(kept.in_force, found.reference, found.covariate, found.contrasts, seeds)
    return f"what the results are judged by ({field}) is not what the design has" if field else ""


def write_results(folder: Path, comparison: Comparison) -> None:
    """Write ``results.json`` in place of an earlier one.

    An earlier one that tells of runs that are neither in the new one nor in a folder of their own is kept beside it.

    Raises:
        DamagedFile: the earlier one cannot be read; it stays as it is.
    """
    path = folder / RESULTS
    if path.exists():
        before, there = read_results(folder), {run.folder for run in (*comparison.runs, *comparison.tuning_runs)}
        gone = {run.folder for run in (*before.runs, *before.tuning_runs)} - there
        if lost := [name for name in sorted(gone) if not (folder / name / SUMMARY).is_file()]:
            kept = keep_damaged(path, "before")
            log.warning(
                "%d runs of %s are no part of this comparison any more, the first %s: the file is kept as %s",
                *(len(lost), path, lost[0], kept.name),
            )
    write_atomically(path, results_json(comparison))
