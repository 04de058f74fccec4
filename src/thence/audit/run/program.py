"""Audit any program that reads a Hugging Face folder and a JSONL file, trains, and writes a model."""

from __future__ import annotations

import os
import shlex
import signal
import string
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from thence.audit.judge.adapted import ASSUMED, saved_adapter
from thence.audit.judge.case import Judge, probe_model
from thence.audit.judge.copies import WholeModel, WrittenSet, compare_sets, merged_state
from thence.audit.judge.evidence import UNEXPLAINED, Evidence
from thence.audit.objectives import check_objective
from thence.audit.report import Report, make_report
from thence.audit.result import Case, CaseResult
from thence.audit.run.cases import cases_for, named_like
from thence.audit.run.child import write_first
from thence.audit.run.printed import last_cause, printed_lines
from thence.audit.run.repeat import apart, dropout_of_folder, with_cause
from thence.audit.run.runner import free_port
from thence.audit.run.stack import OnCase, working_folder
from thence.audit.run.written import files_before, find_written, nothing_written
from thence.audit.solve.probe import Probe, write_probe
from thence.errors import UserError
from thence.redaction import redacted_command

PLACEHOLDERS: Mapping[str, str] = {
    "model": "folder of the model and tokenizer to start from",
    "data": "file with the examples",
    "data_folder": "folder that holds nothing but that file",
    "out": "folder for the trained model",
    "micro_batch": "rows in one forward pass of one rank",
    "accumulation": "micro-batches of one rank in one optimizer step",
    "ranks": "data-parallel processes",
    "epochs": "passes over the data",
    "steps": "optimizer steps",
    "batch": "rows in one optimizer step",
    "lr": "learning rate",
    "seed": "a number",
    "precision": "float32 or bfloat16",
    "checkpointing": "true or false",
    "packing": "true or false",
    "label_smoothing": "a share",
    "port": "a free port",
}
NEEDED = ("model", "data", "out")
"""``{data_folder}`` does for ``{data}``."""


def audit_program(
    program: Sequence[str],
    *,
    layout: str = "prompt-completion",
    asked: str = "token-mean",
    lr: float | None = None,
    frozen: Sequence[str] = (),
    quick: bool = False,
    only: Sequence[str] = (),
    model_type: str = "llama",
    seed: int = 0,
    seconds: float = 120.0,
    keep: Path | None = None,
    tell: OnCase = lambda _: None,
) -> Report:
    """Run a program over the matrix that its placeholders allow, one optimizer step a case, and judge what it writes.

    The optimizer may be anything whose first update is the gradient (SGD, with or without momentum) or its sign (Adam,
    AdamW). Learning rate and scale are then not known, unless ``lr`` says that it takes plain SGD steps of that size.

    Args:
        program: words of the command line, with ``{placeholders}``.
        layout: of the data file: ``rows``, ``messages``, ``prompt-completion``, ``chat-prompt-completion``, ``alpaca``.
        asked: the objective that the program is meant to have; a key of ``OBJECTIVES``.
        lr: learning rate, if the program takes plain SGD steps; then the scale of the update is judged too.
        frozen: parts of the names of parameters that the program does not train on purpose.
        quick, only, model_type, seed, seconds, keep, tell: as in :func:`thence.audit.audit_stack`.

    Raises:
        UserError: unknown or missing placeholders, an unknown objective, layout or model type, no case that has
            ``only`` in its name, or a program that does not exist.
    """
    start = time.monotonic()
    check_objective(asked)
    have = placeholders(program)
    chosen, reasons = allowed_cases(have, asked, quick=quick)
    chosen = named_like(chosen, only)
    with working_folder(keep) as folder:
        probe = write_probe(folder / "probe", model_type=model_type, seed=seed)
        if layout not in probe.data:
            raise UserError(f"there is no data layout {layout!r}", remedy=f"choose one of {', '.join(probe.data)}")
        run = _Program(program, have, layout, lr, seed, seconds, probe, Judge.of_probe(probe), frozen)
        results = []
        for number, (case, reason) in enumerate(chosen):
            if reason:
                results.append(CaseResult(case, "skipped", reason))
                continue
            place = folder / f"case-{number}"
            place.mkdir(exist_ok=True)
            results.append(_run(run, case, place))
            tell(results[-1])
        results = run.judge.compare_cuts(_with_causes(run, results, folder / "again"))
    flags = [f"--layout {layout}", *(["--quick"] if quick else []), *(f"--only {shlex.quote(part)}" for part in only)]
    flags += [f"--asked {asked}"] if asked != "token-mean" else []
    flags += [f"--lr {lr:g}"] if lr is not None else []
    flags += [f"--frozen {shlex.quote(part)}" for part in frozen]
    flags += [f"--model-type {model_type}"] if model_type != "llama" else []
    flags += [f"--seed {seed}"] if seed else []
    command = " ".join(["thence audit command", *flags, "--", redacted_command(program)])
    return make_report(
        "command", results, {"program": program[0]}, command, probe, time.monotonic() - start, asked, reasons
    )


def placeholders(program: Sequence[str]) -> set[str]:
    """The placeholders of a program.

    Raises:
        UserError: one is not known, or one that is needed is missing.
    """
    have: set[str] = set()
    for word in program:
        try:
            have |= {name for _, name, _, _ in string.Formatter().parse(word) if name is not None}
        except ValueError as error:
            raise UserError(f"{word!r}: {error}", remedy="write {{ and }} for braces of the program's own") from None
    unknown = have - set(PLACEHOLDERS)
    if unknown:
        raise UserError(
            f"unknown placeholder {{{sorted(unknown)[0]}}}",
            remedy=f"there are {', '.join('{%s}' % name for name in PLACEHOLDERS)}",  # noqa: UP031
        )
    missing = [name for name in NEEDED if name not in have and (name != "data" or "data_folder" not in have)]
    if missing:
        raise UserError(
            f"the program has no {{{missing[0]}}}",
            remedy="it must read the model from {model} and the examples from {data}, and write the model to {out}",
        )
    return have


def allowed_cases(have: set[str], asked: str, *, quick: bool) -> tuple[list[tuple[Case, str]], list[str]]:
    """The cases that a program's placeholders allow, and sentences on what is missing for the rest."""
    if {"micro_batch", "batch"} <= have:
        have = have | {"accumulation"}  # whole batch over micro-batch, as many loops have it
    axes = {"incomplete"}
    axes |= {"ranks"} & have
    axes |= {"checkpointing", "packing", "label_smoothing"} & have
    if "precision" in have:
        axes.add("bfloat16")
    reasons = []
    chosen: list[tuple[Case, str]] = []
    for case, reason in cases_for(axes, quick=False):
        case = replace(case, optimizer="unknown", steps=1, epochs=1, asked=asked)
        if (
            case.beyond
            or case.examples > case.window
            or "AdamW" in case.name
            or "epoch" in case.name
            or "steps" in case.name
        ):
            continue
        if reason and case.ranks == 1:
            continue
        if reason:
            reason = "the program has no {ranks}"
        for name, needed in (("micro_batch", case.micro_batch != 1), ("accumulation", case.accumulation != 1)):
            if not reason and name not in have and needed:
                reason = f"the program has no {{{name}}}"
        chosen.append((case, reason))
    for name, words in (
        ("micro_batch", "the micro-batch cannot be set"),
        ("accumulation", "the accumulation cannot be set"),
        ("ranks", "the number of ranks cannot be set"),
    ):
        if name not in have:
            reasons.append(f"{words}, since the program has no {{{name}}}")
    if all(reason for _, reason in chosen):
        chosen.append((Case("as the program cuts it", 8, 1, optimizer="unknown", asked=asked, quick=True), ""))
    if "micro_batch" in have and "accumulation" not in have:
        chosen.append((Case("micro 2, whatever accumulation", 2, 4, optimizer="unknown", asked=asked, quick=True), ""))
    return [(case, reason) for case, reason in chosen if case.quick or not quick], reasons


@dataclass(frozen=True)
class _Program:
    """A program under audit; the fields are arguments of :func:`audit_program`, and what all cases share."""

    words: Sequence[str]
    placeholders: set[str]
    layout: str
    lr: float | None
    seed: int
    seconds: float
    probe: Probe
    judge: Judge
    frozen: Sequence[str]


def _run(program: _Program, case: Case, folder: Path) -> CaseResult:
    """One case: run the program in a separate process, then compare its model with the one before."""
    out = folder / "out"
    values = _values(program, case, folder, out)
    begun = time.monotonic()
    before = files_before(out)
    problem = _call([word.format(**values) for word in program.words], folder, program.seconds)
    waited = time.monotonic() - begun
    if problem:
        return CaseResult(case, "failed", problem, seconds=waited)
    start = WholeModel.of(program.judge.model, read_model(program.probe.model))
    written = find_written(out, start.state, len(start.expected), before)
    if not written.sets or written.sets[0].form == "parts":
        return CaseResult(case, "failed", nothing_written(written, out), seconds=waited)
    pieces = program.judge.plan(case, cut_known="micro_batch" in program.placeholders)
    if program.lr is not None:
        case = replace(case, optimizer="sgd", lr=program.lr)
    first = written.sets[0]
    try:
        judge, states, unseen, trained = _states(program, first, start)
    except UserError as error:
        return CaseResult(case, "not judged", str(error), seconds=waited)
    frozen = frozenset(name for name in states[0] if any(part in name for part in program.frozen))
    evidence = Evidence(states, pieces=pieces, scale_known=program.lr is not None, frozen=frozen, unseen=unseen)
    result = judge.case(case, evidence)
    found, saved = compare_sets(written, start, trained, program.frozen)
    return replace(result, findings=(*result.findings, *found), written=saved, seconds=waited)


def _with_causes(program: _Program, results: list[CaseResult], folder: Path) -> list[CaseResult]:
    """The results; if some were not judged, with what a second run of the first of them says of randomness."""
    unclear = [result for result in results if result.status == "not judged" and UNEXPLAINED in result.reason]
    if not unclear:
        return results
    trained = []
    for number, seed in enumerate((program.seed, program.seed + 1)):
        place = folder / str(number)
        place.mkdir(parents=True)
        values = _values(replace(program, seed=seed), unclear[0].case, place, place / "out")
        if _call([word.format(**values) for word in program.words], place, program.seconds):
            return results
        whole = WholeModel.of(program.judge.model, read_model(program.probe.model))
        written = find_written(place / "out", whole.state, len(whole.expected), {})
        trained += written.sets[:1]
    if len(trained) < 2 or trained[0].state.keys() != trained[1].state.keys():
        return results
    before, first, second = read_model(program.probe.model), trained[0].state, trained[1].state
    start = {name: before.get(name, torch.zeros_like(first[name])) for name in first}
    share, dropout = apart(start, first, second), dropout_of_folder(trained[0].folder)
    if any(name not in before for name in first):
        share = 0.0  # an adapter begins at random, so two runs differ without any dropout
    return [
        replace(result, reason=with_cause(result.reason, share, dropout)) if result in unclear else result
        for result in results
    ]


def _states(
    program: _Program, first: WrittenSet, start: WholeModel
) -> tuple[Judge, list[dict[str, Tensor]], tuple[str, ...], dict[str, Tensor]]:
    """The judge of what a program wrote, the parameters before and after its step, what these do not show, and the
    whole model after the step.

    Raises:
        UserError: it wrote an adapter that nobody can follow.
    """
    if first.form == "model":
        after = start.named_once(first.state)
        return program.judge, [start.named_once(start.state), after], (), after
    found = saved_adapter(probe_model(program.probe), first.folder)
    merged = merged_state(found.model)
    return program.judge.beside(found.model), [found.before, found.after], ASSUMED, start.named_once(merged)


def _values(program: _Program, case: Case, folder: Path, out: Path) -> dict[str, str]:
    """What takes the place of the placeholders; writes the data."""
    source = program.probe.data[program.layout]
    data = folder / "data" / f"train{source.suffix}"
    data.parent.mkdir(exist_ok=True)
    write_first(source, data, case.examples)
    return {
        "model": str(program.probe.model),
        "data": str(data),
        "data_folder": str(data.parent),
        "out": str(out),
        "micro_batch": str(case.micro_batch),
        "accumulation": str(case.accumulation),
        "ranks": str(case.ranks),
        "epochs": str(case.epochs),
        "steps": str(case.steps),
        "batch": str(case.window),
        "lr": f"{program.lr if program.lr is not None else 1e-3:g}",
        "seed": str(program.seed),
        "precision": case.precision,
        "checkpointing": str(case.checkpointing).lower(),
        "packing": str(case.packing).lower(),
        "label_smoothing": f"{case.label_smoothing:g}",
        "port": str(free_port()),
    }


def _call(words: Sequence[str], place: Path, seconds: float) -> str:
    """Run the program; returns what went wrong, or nothing."""
    log = place / "log.txt"
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("wb") as sink:
        try:
            process = subprocess.Popen(
                list(words), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"{words[0]} cannot be started: {error}", remedy="give a program that exists") from None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"no answer within {seconds:g} s"
    if code == 0:
        return ""
    lines = printed_lines(log.read_text(encoding="utf-8", errors="replace"))
    cause = last_cause(lines) or (lines or ["it printed nothing"])[-1]
    return f"exit code {code}: {cause.strip()[:300]}"


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of the probe's folder."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(str(path))
    return state
