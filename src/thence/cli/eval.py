"""``thence eval``: measure a model on benchmarks, compare two evaluations, grade one again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thence.cli.arguments import Parser, of
from thence.errors import RecipeError, UserError
from thence.settings.annotations import type_at
from thence.settings.limits import Count, Processes, Rows, Seconds
from thence.settings.text_values import parse_value, read_value
from thence.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from thence.evaluate.backends import Backend
    from thence.evaluate.store import Settings, Store

USAGE = """\
thence eval MODEL --suite NAME [--data DIR] [--limit N] [--samples K] [--folder OUT]
       thence eval --endpoint URL [--model-name NAME] --suite NAME ...
       thence eval --compare A B
       thence eval --regrade FOLDER [--grader NAME]
       thence eval --list"""
EPILOG = """\
MODEL is a Hugging Face folder or hub name, a run's folder (its last trained model) or RUN:STAGE, world:chain/rich,
package:NAME, or a GGUF file. NAME of a suite is one of `thence eval --list`, a TOML file, or a .jsonl or .parquet file.
Run again after a crash or Ctrl-C: it resumes where it was. `thence sample FOLDER` shows what the model said.
Exit code 1: done, but a server did not answer some problems; they are counted apart, and the same command asks again.
An endpoint's URL may hold user:password@, a query, and ${NAME} for an environment variable: none of it is kept."""
FIELDS = ("samples", "temperature", "top_p", "max_tokens", "seed", "grader", "template", "system")


def eval_command(argv: Sequence[str]) -> int:
    """Run, compare, regrade or list."""
    args = _parser().parse(argv)
    if args.list:
        return _list()
    if args.compare:
        return _compare(args)
    if args.regrade:
        return _regrade(args)
    return _evaluate(args)


def _parser() -> Parser:
    parser = Parser(
        prog="thence eval",
        usage=USAGE,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.may_be_empty = frozenset({"--system"})
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="what is measured")
    add("--suite", metavar="NAME", help="the benchmarks")
    add("--data", metavar="DIR", type=Path, help="folder (or file) with the benchmarks' data; default: the hub")
    add("--limit", metavar="N", type=of(Count), help="only the first N problems of every task")
    add("--folder", metavar="OUT", type=Path, help="where everything is kept; default: evals/SUITE-MODEL")
    add("--set", metavar="[TASK.]FIELD=VALUE", action="append", default=[], help="any other field of the tasks")
    tasks = parser.add_argument_group("fields of all tasks (default: the suite's)")
    tasks.add_argument("--tasks", metavar="A,B", help="only these tasks")
    tasks.add_argument("--samples", metavar="K", help="responses for each problem")
    tasks.add_argument("--temperature", metavar="T", help="of sampling; 0 is greedy")
    tasks.add_argument("--top-p", metavar="P", help="nucleus sampling; 1: off")
    tasks.add_argument("--max-tokens", metavar="N", help="longest response")
    tasks.add_argument("--seed", metavar="N", help="of sampling")
    tasks.add_argument("--grader", metavar="NAME", help="exact, math, math-after-think, math-boxed, your own function")
    tasks.add_argument("--template", metavar="NAME", help="own, question, boxed, letter, steps or text with {question}")
    tasks.add_argument("--system", metavar="TEXT", help="system message")
    backend = parser.add_argument_group("what generates")
    backend.add_argument("--backend", choices=("native", "vllm", "endpoint"), help="default: native, or endpoint")
    backend.add_argument("--chat-template", metavar="NAME", default="own", help="own, none, or a Jinja file")
    backend.add_argument(
        "--template-variable",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the chat template, for example enable_thinking=false",
    )
    backend.add_argument("--gguf-file", metavar="NAME", help="a GGUF file inside MODEL")
    backend.add_argument("--rows", metavar="N", type=of(Rows), help="responses sampled side by side (native; 64)")
    backend.add_argument(
        "--vllm", metavar="FIELD=VALUE", action="append", default=[], help="a setting of vLLM, see docs/vllm.md"
    )
    backend.add_argument(
        "--endpoint", metavar="URL", help="an OpenAI-compatible server, for example http://host:8000/v1"
    )
    backend.add_argument("--model-name", metavar="NAME", help="the model's name on the server")
    backend.add_argument("--key-variable", metavar="NAME", default="OPENAI_API_KEY", help="holds the server's API key")
    backend.add_argument("--concurrency", metavar="N", type=of(Processes), default=8, help="requests under way (8)")
    backend.add_argument("--timeout", metavar="S", type=of(Seconds), default=600.0, help="seconds for a response (600)")
    other = parser.add_argument_group("instead of measuring")
    other.add_argument("--compare", metavar=("A", "B"), nargs=2, help="two evaluations: paired differences, B minus A")
    other.add_argument("--regrade", metavar="FOLDER", help="grade an evaluation again without generating")
    other.add_argument("--list", action="store_true", help="list the shipped suites")
    return parser


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


def _evaluate(args: argparse.Namespace) -> int:
    from thence.evaluate.problems import load_problems
    from thence.evaluate.progress import Terminal
    from thence.evaluate.run import evaluate
    from thence.terminal import logging_to, make_console

    settings = _settings(args)
    folder = args.folder or Path("evals") / _folder_name(settings)
    problems = {name: load_problems(task, args.data, args.limit) for name, task in settings.tasks.items()}
    console = make_console()
    console.print(
        f"{settings.suite}: {counted(sum(map(len, problems.values())), 'problem')}, into {folder}", highlight=False
    )
    try:
        with logging_to(console), Terminal(console) as watcher:
            store = evaluate(
                settings,
                problems,
                folder,
                _backend_maker(args, settings),
                environment=lambda: _environment(args.endpoint),
                watcher=watcher,
            )
    except KeyboardInterrupt:
        print(f"\nwhat was sampled is kept in {folder}", file=sys.stderr)
        raise
    return _present(console, store) or _notice(store)


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


def _settings(args: argparse.Namespace) -> Settings:
    from thence.evaluate.origin import find_model
    from thence.evaluate.store import Settings
    from thence.evaluate.suites import load_suite
    from thence.http_client import shown_address

    if not args.suite:
        raise UserError("which benchmarks?", remedy="give --suite NAME; see `thence eval --list`", field="--suite")
    backend = args.backend or ("endpoint" if args.endpoint else "native")
    if (backend == "endpoint") != bool(args.endpoint):
        remedy = "give --endpoint URL for a server, or leave it out"
        raise UserError(f"--backend {backend} and --endpoint do not go together", remedy=remedy, field="--endpoint")
    name = (args.model_name or args.model) if backend == "endpoint" else args.model
    if backend != "endpoint" and args.model_name:
        raise UserError("--model-name is for servers", remedy="leave it out", field="--model-name")
    if not name and backend != "endpoint":
        raise UserError("which model?", remedy="thence eval MODEL --suite NAME", field="MODEL")
    overrides: dict[str, Any] = {f: value for f in FIELDS if (value := getattr(args, f)) is not None}
    overrides |= dict(_assignment(text) for text in args.set)
    if args.tasks:
        overrides["tasks"] = args.tasks.split(",")
    if args.endpoint:
        from thence.evaluate.endpoint import server_address

        server_address(args.endpoint)  # a wrong one is said before data are read
    try:
        suite = load_suite(args.suite, overrides)
    except RecipeError as error:
        if error.field not in overrides:
            raise
        flag = f"--{error.field.replace('_', '-')}" if error.field in FIELDS else f"--set {error.field}"
        raise RecipeError(error.problem, remedy=error.remedy, field=flag) from None
    model, stage = find_model(name, args.gguf_file) if name and backend != "endpoint" else (None, None)
    return Settings(
        model=name or "the only one served",
        stage=stage,
        gguf_file=model.gguf_file if model else None,
        backend=backend,
        endpoint=shown_address(args.endpoint) if args.endpoint else None,
        chat_template=args.chat_template,
        template_variables=_variables(args),
        suite=suite.name,
        data=None if args.data is None else str(args.data),
        limit=args.limit,
        tasks={task.name: task for task in suite.tasks},
    )


def _assignment(text: str, flag: str = "--set") -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r} sets nothing", remedy=f"write {flag} FIELD=VALUE", field=flag)
    return name, value


def _variables(args: argparse.Namespace) -> dict[str, Any]:
    pairs = (_assignment(text, "--template-variable") for text in args.template_variable)
    return {name: parse_value(value) for name, value in pairs}


def _folder_name(settings: Settings) -> str:
    from thence.evaluate.origin import short_name

    name = settings.model
    if settings.endpoint and name == "the only one served":
        scheme, _, place = settings.endpoint.partition("?")[0].partition("://")
        name = f"{scheme}://{place.rpartition('@')[2]}"
    stage = f"-{settings.stage}" if settings.stage and not settings.model.endswith(f":{settings.stage}") else ""
    return f"{settings.suite}-{short_name(name or '')}{stage}"


def _backend_maker(args: argparse.Namespace, settings: Settings) -> Callable[[], Backend]:
    """How the backend is opened, when it turns out to be needed."""

    def make() -> Backend:
        if settings.backend == "endpoint":
            from thence.evaluate.endpoint import EndpointBackend, EndpointSettings

            return EndpointBackend(
                EndpointSettings(
                    args.endpoint, args.model_name or args.model, args.key_variable, args.concurrency, args.timeout
                ),
                settings.template_variables,
            )
        from thence.evaluate.origin import find_model

        _quiet_libraries()
        model, _ = find_model(settings.model, settings.gguf_file)
        if settings.backend == "vllm":
            from thence.evaluate.vllm_backend import VllmBackend
            from thence.rollout.vllm.settings import VllmSettings, vllm_settings

            given = [_assignment(text, "--vllm") for text in args.vllm]
            table = {name: read_value(value, type_at(VllmSettings, [name])) for name, value in given}
            vllm = vllm_settings(table, "--vllm")
            return VllmBackend(model, settings.chat_template, vllm, settings.template_variables)
        from thence.evaluate.native_backend import ROWS, NativeBackend

        return NativeBackend(model, settings.chat_template, args.rows or ROWS, settings.template_variables)

    return make


def _environment(endpoint: str | None) -> dict[str, Any]:
    from thence.http_client import shown_address
    from thence.pipeline.folder import environment
    from thence.redaction import redacted_command

    facts = environment("")
    if endpoint:  # before the arguments are quoted, or a quote in a password would hide it from us
        shown = [argument.replace(endpoint, shown_address(endpoint)) for argument in sys.argv[1:]]
        facts["command"] = redacted_command([Path(sys.argv[0]).name, *shown])
    del facts["device"]  # the backend tells, if it knows
    return facts


def _regrade(args: argparse.Namespace) -> int:
    from thence.evaluate.progress import Terminal
    from thence.evaluate.run import regrade
    from thence.terminal import logging_to, make_console

    console = make_console()
    with logging_to(console), Terminal(console) as watcher:
        store = regrade(_existing(args.regrade).folder, args.grader, watcher)
    return _present(console, store, args.grader)


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


def _compare(args: argparse.Namespace) -> int:
    from thence.evaluate.summary import compare
    from thence.pages.evaluation.tables import comparison_table
    from thence.pages.terminal import with_notes
    from thence.terminal import make_console

    a, b = (_existing(name, args.suite) for name in args.compare)
    make_console().print(with_notes(comparison_table(compare(a, b, args.grader))))
    return 0


def _existing(name: str, suite: str | None = None) -> Store:
    """The evaluation in a folder, under `evals/`, or of a model on a suite. Raises UserError."""
    from thence.evaluate.origin import short_name
    from thence.evaluate.store import Store

    places = [Path(name), Path("evals") / name]
    if suite is not None:
        places.append(Path("evals") / f"{suite}-{short_name(name)}")
    for folder in places:
        if Store(folder).exists:
            return Store(folder)
    hint = "" if suite else ", or name models and say --suite"
    raise UserError("no evaluation here", remedy=f"give the folder that `thence eval` printed{hint}", file=name)


def _quiet_libraries() -> None:
    """transformers' own bars would break ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
