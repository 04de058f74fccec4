"""``thence eval``: measure a model on benchmarks, compare evaluations, grade one again."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from thence.cli.app import quiet_libraries
from thence.cli.eval_flags import KEY_VARIABLE, ONLY_SERVED, Generator, TaskFields
from thence.cli.events import Way, logging_as_events, tell_done, way_of
from thence.errors import RecipeError, UserError
from thence.files import read_json
from thence.settings.annotations import type_at
from thence.settings.limits import Count
from thence.settings.text_values import parse_value, read_value
from thence.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from thence.evaluate.backends import Backend
    from thence.evaluate.progress import EvaluationProgress
    from thence.evaluate.store import Settings, Store
    from thence.evaluate.suites import Suite

INSTEAD = Group("Instead of measuring", sort_key=5)


def eval_command(
    model: str | None = None,
    /,
    *,
    suite: Annotated[str | None, Parameter(metavar="NAME")] = None,
    data: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    limit: Count | None = None,
    folder: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    set_: Annotated[tuple[str, ...], Parameter(metavar="[TASK.]FIELD=VALUE")] = (),
    fields: TaskFields = TaskFields(),
    generator: Generator = Generator(),
    compare: Annotated[tuple[str, ...], Parameter(group=INSTEAD, metavar="A B [C ...]", consume_multiple=True)] = (),
    regrade: Annotated[str | None, Parameter(group=INSTEAD, metavar="FOLDER")] = None,
    list_: Annotated[bool, Parameter(group=INSTEAD)] = False,
    quiet: bool = False,
    json_: bool = False,
) -> int:
    """Measure a model on benchmarks, compare evaluations, grade one again.

    MODEL is a Hugging Face folder or hub name, a run's folder (its last trained model) or RUN:STAGE, world:chain/rich,
    package:NAME, or a GGUF file. Run the same command again after a crash or Ctrl-C: it resumes. `thence sample FOLDER`
    shows what the model said. Exit code 1: done, but a server did not answer some problems; they are counted apart, and
    the same command asks again.

    Examples:

      thence eval runs/mine --suite gsm8k --limit 100
      thence eval --endpoint http://host:8000/v1 --suite mine.jsonl --grader exact
      thence eval --compare evals/gsm8k-base evals/gsm8k-mine

    Args:
        model: What is measured.
        suite: The benchmarks: a name of --list, a TOML file, or a .jsonl or .parquet file.
        data: Folder (or file) with the benchmarks' data. Default: the hub.
        limit: Only the first problems of every task.
        folder: Where everything is kept. Default: evals/SUITE-MODEL.
        set_: Any other field of the tasks.
        compare: Two evaluations or more (folders, runs or RUN:STAGE): paired differences of each from the first.
        regrade: Grade an evaluation again without generating, with --grader or each task's own grader.
        list_: List the shipped suites.
        quiet: Print nothing but warnings and errors.
        json_: Print what happens and the results as JSON, one object a line.
    """
    way = way_of(quiet, json_)
    if way != "shown" and (list_ or compare or regrade):
        raise UserError("it is for measuring a model", remedy="leave it out", field=f"--{way}")
    if list_:
        return _list()
    if compare or regrade:
        sampling = {name.replace("_", "-"): value for name, value in vars(fields).items() if name != "grader"}
        others = {"MODEL": model, "--data": data, "--limit": limit, "--folder": folder, "--set": set_ or None}
        others |= {f"--{name}": value for name, value in sampling.items()}
        others |= {"--suite": suite} if regrade else {}
        _refuse_unread("--compare" if compare else "--regrade", others, generator)
    if compare:
        return _compare(compare, suite, fields.grader)
    if regrade:
        return _regrade(regrade, fields.grader)
    settings = _settings(model, _suite(suite, fields, set_), data, limit, generator)
    return _evaluate(settings, folder, generator, way)


def _refuse_unread(instead: str, others: Mapping[str, Any], generator: Generator) -> None:
    """Raise UserError for what was given and is for sampling alone."""
    given = [flag for flag, value in others.items() if value is not None]
    defaults = vars(Generator())
    given += [f"--{name.replace('_', '-')}" for name, value in vars(generator).items() if value != defaults[name]]
    if given:
        raise UserError(f"{instead} samples nothing and does not read it", remedy="leave it out", field=given[0])


def _list() -> int:
    from thence.evaluate.suites import load_suite, shipped_suites

    for name in shipped_suites():
        suite = load_suite(name)
        print(f"{name}: {suite.description}")
        for task in suite.tasks:
            files = f"  --data files: {task.files[0]}" if task.files else ""
            hub = f"  hub: {task.source}" if task.source else ""
            print(f"  {task.name:<14} {task.title:<28} k = {task.samples:<3}{hub}{files}")
    return 0


def _evaluate(settings: Settings, folder: Path | None, generator: Generator, way: Way) -> int:
    from thence.evaluate.problems import load_problems
    from thence.evaluate.run import evaluate
    from thence.terminal import make_console

    folder = folder or Path("evals") / _folder_name(settings)
    data = None if settings.data is None else Path(settings.data)
    problems = {name: load_problems(task, data, settings.limit) for name, task in settings.tasks.items()}
    console = make_console(quiet=way != "shown")
    count = counted(sum(map(len, problems.values())), "problem")
    console.print(f"{settings.suite}: {count}, into {folder}", highlight=False)
    try:
        with _told(way, console) as progress:
            store = evaluate(
                settings,
                problems,
                folder,
                lambda: _backend(settings, generator),
                environment=lambda: _environment(settings, generator.endpoint),
                progress=progress,
            )
    except KeyboardInterrupt:
        print(f"\nwhat was sampled is kept in {folder}", file=sys.stderr)
        raise
    code = _present(console, store)
    if way == "json":
        results = read_json(store.folder / "results.json", remedy="run the same command again")
        tell_done(store.folder, store.folder / "report.html", results)
    return code or _notice(store)


@contextlib.contextmanager
def _told(way: Way, console: Console) -> Iterator[EvaluationProgress]:
    """Who is told how an evaluation goes, and where its log goes."""
    from thence.cli.events import EvaluationEvents
    from thence.evaluate.progress import EvaluationDisplay, EvaluationProgress
    from thence.terminal import logging_to, make_console

    if way == "json":
        with logging_as_events():
            yield EvaluationEvents()
    elif way == "quiet":
        with logging_to(make_console(stderr=True), logging.WARNING):
            yield EvaluationProgress()
    else:
        with logging_to(console), EvaluationDisplay(console, doing="opening the model ...") as progress:
            yield progress


def _notice(store: Store) -> int:
    """Say what was not answered. Returns 1 if anything was not."""
    count = len({(task, problem) for task in store.settings().tasks for problem, _ in store.refusals(task)})
    if count:
        problems = "1 problem was" if count == 1 else f"{count:,} problems were"
        print(
            f"thence: {problems} not answered and counted apart; {store.folder / 'report.html'} says why. "
            "The same command asks again.",
            file=sys.stderr,
        )
    return 1 if count else 0


def _suite(name: str | None, fields: TaskFields, assigned: Sequence[str]) -> Suite:
    """The suite with the fields that were set. Raises UserError, which names the flag that was typed."""
    from thence.evaluate.suites import load_suite

    if not name:
        raise UserError("which benchmarks?", remedy="give --suite NAME; see `thence eval --list`", field="--suite")
    by_flag = {field: value for field, value in vars(fields).items() if value is not None}
    if fields.tasks is not None:
        by_flag["tasks"] = fields.tasks.split(",")
    by_set = dict(_assignment(text) for text in assigned)
    try:
        return load_suite(name, by_flag | by_set)
    except RecipeError as error:
        if error.field in by_set:
            flag = f"--set {error.field}"
        elif error.field in by_flag:
            flag = f"--{error.field.replace('_', '-')}"
        else:
            raise
        raise RecipeError(error.problem, remedy=error.remedy, field=flag) from None


def _settings(model: str | None, suite: Suite, data: Path | None, limit: int | None, generator: Generator) -> Settings:
    from thence.evaluate.origin import find_model
    from thence.evaluate.store import Settings
    from thence.http_client import shown_address

    backend, endpoint = generator.kind(), generator.endpoint
    served = backend == "endpoint"
    if served != bool(endpoint):
        remedy = "give --endpoint URL for a server, or leave it out"
        raise UserError(f"--backend {backend} and --endpoint do not go together", remedy=remedy, field="--endpoint")
    name = (generator.model_name or model) if served else model
    if not served and generator.model_name:
        raise UserError("--model-name is for servers", remedy="leave it out", field="--model-name")
    if not name and not served:
        raise UserError("which model?", remedy="thence eval MODEL --suite NAME", field="MODEL")
    played = next((task.name for task in suite.tasks if task.environment is not None), None)
    if served and played is not None:
        raise UserError(
            f"the task {played} has an environment, and a server cannot continue a rollout token by token",
            remedy="give the model itself, with --backend native or vllm",
            field="--endpoint",
        )
    _check_server(generator)
    found, stage = find_model(name, generator.gguf_file) if name and not served else (None, None)
    return Settings(
        model=name or ONLY_SERVED,
        stage=stage,
        gguf_file=found.gguf_file if found else None,
        backend=backend,
        endpoint=shown_address(endpoint) if endpoint else None,
        chat_template=generator.chat_template,
        template_variables=_variables(generator),
        suite=suite.name,
        data=None if data is None else str(data),
        limit=limit,
        tasks={task.name: task for task in suite.tasks},
    )


def _check_server(generator: Generator) -> None:
    """Raise UserError for an address or a key that cannot be used, before data are read."""
    if generator.endpoint:
        from thence.evaluate.endpoint import server_address

        server_address(generator.endpoint)
    if generator.key_variable and not os.environ.get(generator.key_variable):
        raise UserError(
            f"the environment variable {generator.key_variable} is not set",
            remedy="set it to the server's API key, or leave the flag out",
            field="--key-variable",
        )


def _assignment(text: str, flag: str = "--set") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r} sets nothing", remedy=f"write {flag} FIELD=VALUE", field=flag)
    return name, value


def _variables(generator: Generator) -> dict[str, Any]:
    pairs = (_assignment(text, "--template-variable") for text in generator.template_variable)
    return {name: parse_value(value) for name, value in pairs}


def _folder_name(settings: Settings) -> str:
    from thence.evaluate.origin import short_name

    name = settings.model
    if settings.endpoint and name == ONLY_SERVED:
        scheme, _, place = settings.endpoint.partition("?")[0].partition("://")
        name = f"{scheme}://{place.rpartition('@')[2]}"
    stage = f"-{settings.stage}" if settings.stage and not settings.model.endswith(f":{settings.stage}") else ""
    return f"{settings.suite}-{short_name(name or '')}{stage}"


def _backend(settings: Settings, generator: Generator) -> Backend:
    if settings.backend == "endpoint":
        from thence.evaluate.endpoint import EndpointBackend, EndpointSettings

        name = None if settings.model == ONLY_SERVED else settings.model
        return EndpointBackend(
            EndpointSettings(
                generator.endpoint or "",
                name,
                generator.key_variable or KEY_VARIABLE,
                generator.concurrency,
                generator.timeout,
            ),
            settings.template_variables,
        )
    from thence.evaluate.origin import find_model

    quiet_libraries()
    model, _ = find_model(settings.model, settings.gguf_file)
    if settings.backend == "vllm":
        from thence.evaluate.vllm_backend import VllmBackend
        from thence.rollout.vllm.settings import VllmSettings, vllm_settings

        given = [_assignment(text, "--vllm") for text in generator.vllm]
        table = {name: read_value(value, type_at(VllmSettings, [name])) for name, value in given}
        vllm = vllm_settings(table, "--vllm")
        return VllmBackend(model, settings.chat_template, vllm, settings.template_variables)
    from thence.evaluate.native_backend import ROWS, NativeBackend

    return NativeBackend(model, settings.chat_template, generator.rows or ROWS, settings.template_variables)


def _environment(settings: Settings, endpoint: str | None) -> dict[str, Any]:
    from thence.evaluate.origin import files_digest, find_model
    from thence.http_client import shown_address
    from thence.pipeline.folder import environment
    from thence.redaction import as_typed, redacted_command

    facts = environment("")
    if endpoint:  # before the arguments are quoted, or a quote in a password would hide it from us
        shown = [argument.replace(endpoint, shown_address(endpoint)) for argument in sys.argv[1:]]
        facts["command"] = redacted_command(as_typed([sys.argv[0], *shown]))
    del facts["device"]  # the backend tells, if it knows
    if not endpoint and (digest := files_digest(find_model(settings.model, settings.gguf_file)[0])):
        facts["weight_files"] = digest
    return facts


def _regrade(name: str, grader: str | None) -> int:
    from thence.evaluate.progress import EvaluationDisplay
    from thence.evaluate.run import regrade
    from thence.terminal import logging_to, make_console

    console = make_console()
    try:
        with logging_to(console), EvaluationDisplay(console) as progress:
            store = regrade(existing_evaluation(name).folder, grader, progress)
    except UserError as error:
        if error.field != "reward":
            raise
        flag = "--grader" if grader else "grader"
        raise UserError(error.problem, remedy=error.remedy, file=error.file, line=error.line, field=flag) from None
    return _present(console, store, grader)


def _present(console: Console, store: Store, grader: str | None = None) -> int:
    """Print the table and write what is made of the numbers; another grader's numbers are printed only."""
    from thence.evaluate.export import write_exports
    from thence.evaluate.summary import summarise
    from thence.pages.evaluation.page import write_page
    from thence.pages.evaluation.tables import results_table
    from thence.pages.terminal import with_notes

    own = all(task.grader == grader for task in store.settings().tasks.values()) or grader is None
    result = summarise(store, grader)
    console.print(with_notes(results_table(result)))
    if not own:
        console.print("the files in the folder stay with each task's own grader", style="dim")
        return 0
    write_exports(store, result)
    page = write_page(store, result)
    numbers = store.folder / "results.json"
    console.print(f"report: {page}\nnumbers: {numbers}, results.csv", soft_wrap=True, highlight=False)
    return 0


def _compare(names: Sequence[str], suite: str | None, grader: str | None) -> int:
    from thence.evaluate.summary import compare_evaluations
    from thence.pages.evaluation.tables import comparison_table, comparison_tables
    from thence.pages.terminal import with_notes
    from thence.terminal import make_console

    if len(names) < 2:
        raise UserError("one evaluation has nothing to be compared with", remedy="name two or more", field="--compare")
    first, *others = (existing_evaluation(name, suite, comparing=True) for name in names)
    found = [compare_evaluations(first, other, grader) for other in others]
    console = make_console()
    if len(found) == 1:
        console.print(with_notes(comparison_table(found[0])))
        return 0
    for place, table in enumerate(comparison_tables(found)):
        console.print(*([""] if place else []), with_notes(table), sep="\n")
    return 0


def existing_evaluation(name: str, suite: str | None = None, *, comparing: bool = False) -> Store:
    """The evaluation in a folder, under `evals/`, of a model on a suite, or of a run's stage. Raises UserError."""
    from thence.evaluate.origin import short_name
    from thence.evaluate.store import Store
    from thence.pipeline.run_files import evaluation_of
    from thence.train.run_models import run_of

    places = [Path(name), Path("evals") / name]
    if suite is not None:
        places.append(Path("evals") / f"{suite}-{short_name(name)}")
    for folder in places:
        if Store(folder).exists:
            return Store(folder)
    run, stage = run_of(name)
    if run is not None:
        return Store(evaluation_of(run, stage))
    hint = ", or name models and say --suite" if comparing and not suite else ""
    raise UserError(
        "no evaluation here", remedy=f"give the folder that `thence eval` printed, or a run's{hint}", file=name
    )
