"""``thence sample``: look at what a model of a run, or of an evaluation, says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from thence.cli.report import existing_run
from thence.errors import UserError
from thence.foreign_text import clean
from thence.jsonl import read_lines, say_bad_lines
from thence.pages import samples
from thence.settings.limits import Rows, Temperature, Tokens
from thence.terminal import make_console
from thence.wording import json_kind

COLOURS = {"right": "green", "wrong": "red", "unknown": "yellow", "graded": "cyan"}
ENDS = {"length": ", cut", **{finish: f", {said}" for finish, said in samples.ENDS.items()}}
"""What is said of responses that did not end by themselves."""
VerdictName = Literal["right", "wrong", "graded", "unknown", "ungraded"]


def sample_command(
    folder: str,
    /,
    *,
    n: Rows = 5,
    verdict: VerdictName | None = None,
    stage: Annotated[str | None, Parameter(metavar="NAME")] = None,
    task: Annotated[str | None, Parameter(metavar="NAME")] = None,
    problem: Annotated[str | None, Parameter(metavar="KEY")] = None,
    grader: Annotated[str | None, Parameter(metavar="NAME")] = None,
    prompt: Annotated[str | None, Parameter(metavar="TEXT")] = None,
    temperature: Temperature = 1.0,
    max_tokens: Tokens = 256,
) -> int:
    """Show prompts with the model's responses and verdicts, of a run or of an evaluation; or ask a model.

    Examples:

      thence sample runs/quickstart-seed0 --verdict wrong
      thence sample runs/quickstart-seed0:rl@40
      thence sample runs/quickstart-seed0:rl@40 --prompt "47a+8b-3c*6?" --n 2
      thence sample evals/gsm8k-mine --task gsm8k --n 3

    Args:
        folder: A run or an evaluation: its path, or its name under runs/ or evals/. RUN:STAGE and RUN:STAGE@STEP show
            what was kept of a stage, or of one of its steps. With --prompt: any model, as `thence eval` takes it.
        n: Samples of each stage or task.
        verdict: Only samples with this verdict.
        stage: Of a run: only this stage.
        task: Of an evaluation: only this task.
        problem: Of an evaluation: the first letters of a problem's key.
        grader: Of an evaluation: verdicts of another grader; letter is the lenient letter rule.
        prompt: Ask the model this, once for each of --n responses; nothing is kept.
        temperature: Of a --prompt. 0 is greedy.
        max_tokens: Longest response to a --prompt.
    """
    if prompt is not None:
        return _answer(folder, prompt, n, temperature, max_tokens)
    evaluation = _evaluation(folder)
    folder, stage, step = (folder, stage, None) if evaluation else _named(folder, stage)
    place = evaluation or existing_run(folder)
    of_runs, of_evaluations = {"--stage": stage}, {"--task": task, "--problem": problem, "--grader": grader}
    for flag, value in (of_runs if evaluation else of_evaluations).items():
        if value is not None:
            kind = "an evaluation" if evaluation else "a run"
            raise UserError(f"{flag} is not for {kind}", remedy="leave it out", file=place, field=flag)
    console, shown = make_console(verbatim=True), 0
    for part, lines in _evaluated(place, task, problem or "", grader) if evaluation else _run(place, stage):
        fitting = [line for line in lines if verdict in (None, line["verdict"]) and step in (None, line.get("step"))]
        # spread over the file, so that every split and temperature has its turn
        for line in fitting[:: max(1, len(fitting) // n)][:n]:
            _show(console, part, line)
            shown += 1
    if not shown and step is not None:
        raise UserError(
            f"no samples were kept of step {step}",
            remedy='to ask its model: --prompt "TEXT", if its checkpoint stayed (keep_every)',
            file=place,
        )
    if not shown:
        chosen = of_runs | of_evaluations | {"--verdict": verdict}
        given = ", ".join(flag for flag, value in chosen.items() if value is not None) or "the filters"
        raise UserError("no such samples", remedy=f"leave out {given}", file=place)
    return 0


def _named(name: str, stage: str | None) -> tuple[str, str | None, int | None]:
    """The run, the stage and the step that ``RUN:STAGE@STEP`` names. Raises UserError."""
    from thence.train.run_models import at_step, run_of

    step = at_step(name)
    run, named = run_of(name if step is None else name.rpartition("@")[0])
    if named is not None and stage not in (None, named):
        raise UserError(f"{name} is of stage {named}", remedy="leave --stage out", field="--stage")
    return (name if run is None else str(run)), named or stage, step


def _answer(name: str, prompt: str, n: int, temperature: float, max_tokens: int) -> int:
    """Ask the model of a name, and show its responses. Raises UserError."""
    from thence.cli.app import quiet_libraries
    from thence.evaluate.backends import Refused, Request
    from thence.evaluate.native_backend import NativeBackend
    from thence.evaluate.origin import find_model
    from thence.evaluate.problems import Problem
    from thence.evaluate.suites import Task

    quiet_libraries()
    backend = NativeBackend(find_model(name)[0])
    task = Task(name="prompt", files=("prompt",), samples=n, temperature=temperature, max_tokens=max_tokens)
    problem = Problem(task.name, "prompt", (("user", prompt),), prompt, None, plain=not backend.prompts.chat.template)
    console = make_console(verbatim=True)
    console.print(Text("prompt    ", "dim") + Text(clean(prompt)))
    requests = [Request(problem, number, number) for number in range(n)]
    for _, found in sorted(backend.generate(requests, task), key=lambda pair: pair[0].sample):
        if isinstance(found, Refused):
            raise UserError(f"no response: {found.reason}", remedy="give a shorter --prompt", field="--prompt")
        cut = ", cut" if found.finish == "length" else ""
        console.print(
            Text("response  ", "dim") + Text(clean(found.text)) + Text(f"  {found.tokens} tokens{cut}", "dim")
        )
    return 0


def _run(folder: Path, wanted: str | None) -> Iterator[tuple[str, list[dict]]]:
    """The kept samples of a run, stage by stage. Raises UserError."""
    found = [path.parent.name for path in sorted(folder.glob("stages/*/samples.jsonl"))]
    if wanted is not None and wanted not in found:
        raise UserError(
            f"stage {wanted!r} has no samples",
            remedy=f"stages with samples: {', '.join(found) or 'none yet'}",
            file=folder,
        )
    for stage in [wanted] if wanted is not None else found:
        path = folder / "stages" / stage / "samples.jsonl"
        found = read_lines(path, _wrong_with)
        say_bad_lines(path, found.bad, "it is left out")
        yield stage, found.values


def _wrong_with(line: dict) -> str | None:
    """What a line of a stage's samples lacks to be shown; None: nothing."""
    missing = [name for name in ("verdict", "tokens", "finish", "prompt", "response", "answer") if name not in line]
    if missing:
        return f"it lacks {missing[0]}"
    texts = ("verdict", "finish", "prompt", "response")
    return next((f"{name} is {json_kind(line[name])}" for name in texts if not isinstance(line[name], str)), None)


def _evaluation(name: str) -> Path | None:
    """The folder of an evaluation by path or by its name under ``evals/``; None where there is none."""
    return next((f for f in (Path(name), Path("evals") / name) if (f / "evaluation.toml").is_file()), None)


def _evaluated(folder: Path, wanted: str | None, problem: str, grader: str | None) -> Iterator[tuple[str, list[dict]]]:
    """The samples of an evaluation with their last grades, task by task. Raises UserError."""
    from thence.evaluate.store import Store

    store = Store(folder)
    tasks = store.settings().tasks
    if wanted is not None and wanted not in tasks:
        raise UserError(f"no task {wanted!r} here", remedy=f"tasks: {', '.join(tasks)}", file=folder, field="--task")
    for name in [wanted] if wanted is not None else tasks:
        grades = store.graded(name, grader or tasks[name].grader)
        lines = []
        for sample in store.samples(name):
            grade = grades.get(sample.place)
            if not sample.problem.startswith(problem):
                continue
            lines.append(
                {
                    "verdict": grade.verdict if grade else "ungraded",
                    "score": grade.score if grade else None,
                    "split": f"problem {sample.problem} sample {sample.sample}",
                    "tokens": "?" if sample.tokens is None else sample.tokens,
                    "finish": sample.finish,
                    "temperature": tasks[name].temperature,
                    "prompt": "\n\n".join(content for _, content in sample.prompt),
                    "response": sample.text,
                    "turns": sample.turns,
                    "answer": sample.answer,
                    "extracted": grade.extracted if grade else None,
                    "components": grade.components if grade else None,
                    "reason": f"{grade.reason} ({grade.grader}, {grade.version})" if grade and grade.reason else "",
                }
            )
        yield name, lines


def _turns(line: dict) -> list[tuple[str, str]]:
    """Who said what, where there were turns; empty: a single one."""
    told = line.get("turns")
    found = [(one.get("who"), one.get("text")) if isinstance(one, dict) else one for one in told or ()]
    return [(str(who), str(text)) for who, text in found]


def _show(console: Console, stage: str, line: dict) -> None:
    verdict = line["verdict"]
    degree = f"{verdict} {line['score']:.4g}" if verdict == "graded" and line.get("score") is not None else verdict
    head = Text.assemble(
        (f" {degree} ", f"bold white on {COLOURS.get(verdict, 'grey50')}"),
        (f"  {stage}", "bold"),
        f"  {line.get('split') or 'step ' + str(line['step'])}",
        f"  T={line['temperature']}" if line.get("temperature") is not None else "",
        f"  {line['tokens']} tokens" + ENDS.get(line["finish"], ""),
    )
    console.print(head)
    console.print(Text("  prompt    ", "dim") + Text(clean(line["prompt"])))
    for who, text in _turns(line) or [("policy", line["response"])]:
        said = ("  observed  ", "cyan") if who == "environment" else ("  response  ", "dim")
        console.print(Text.assemble(said, (clean(text), "cyan" if who == "environment" else "")))
    if line["answer"] is not None:
        found = f"   found {line['extracted']}" if line.get("extracted") is not None else ""
        console.print(Text("  answer    ", "dim") + Text(clean(line["answer"] + found)))
    if components := line.get("components"):
        console.print(Text("  reward    ", "dim") + Text(", ".join(f"{k} {v:.4g}" for k, v in components.items())))
    if line.get("reason"):
        console.print(Text("  reason    ", "dim") + Text(clean(line["reason"])))
    console.print()
