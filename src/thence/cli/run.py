"""``thence run``."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from thence.cli.app import quiet_libraries
from thence.cli.events import RunEvents, Way, logging_as_events, tell, tell_done, way_of
from thence.cli.parsing import none_given, refuse_without_on
from thence.errors import UserError
from thence.recipe import Recipe, load_recipe, shipped_recipes
from thence.redaction import redacted_values
from thence.settings.limits import Cores, Gigabytes, Gpus, Natural, Processes
from thence.toml import to_toml

if TYPE_CHECKING:
    from thence.pipeline.progress import RunWatcher


def run_command(
    recipe: Annotated[str | None, Parameter(completer=lambda _: [*shipped_recipes()])] = None,
    /,
    *,
    dry_run: bool = False,
    repeat: Annotated[tuple[str, ...], Parameter(metavar="STAGE")] = (),
    restart: bool = False,
    fields: bool = False,
    ranks: Processes | None = None,
    device_gb: Gigabytes | None = None,
    on: Annotated[str | None, Parameter(metavar="ray[:ADDRESS]")] = None,
    cores: Cores | None = None,
    gpus: Gpus | None = None,
    memory_gb: Gigabytes | None = None,
    restarts: Natural | None = None,
    quiet: bool = False,
    json_: bool = False,
    overrides: Annotated[dict[str, Any], Parameter(parse=False)],
) -> int:
    """Run a recipe, or resume it where it stopped; print its table and the path of its report.

    Any field of a recipe is a flag; --fields lists them. A field that is true or false needs no value. A table takes
    entries: --data.columns question=problem,answer=solution, or the flag once for each entry. Run the same command
    again after a crash or Ctrl-C: it resumes.

    Examples:

      thence run quickstart
      thence run mine.toml --sft.lr 1e-5 --rl.steps 4 --data.source train.jsonl
      thence run mine.toml --dry-run
      thence run paper-qwen --dry-run --ranks 8 --device-gb 80
      torchrun --nproc-per-node 2 -m thence run mine.toml
      thence run mine.toml --on ray:auto --ranks 8

    Args:
        recipe: A shipped recipe (`thence recipes`) or a TOML file.
        dry_run: Try all that the recipe names, print it resolved, with tokens, FLOPs and memory, and stop.
        repeat: Set this stage aside and run it again, with the settings of now. Several: --repeat a,b.
        restart: Remove what an earlier run wrote into the folder, and start again.
        ranks: With --dry-run: plan for this many processes. With --on: run on this many. Default: 1.
        device_gb: With --dry-run: plan for so much memory in each, in GB. Default: that of this machine.
        on: Run the ranks on a Ray cluster: ray, ray:auto, ray:HOST:PORT, or ray:ray://HOST:PORT. See docs/ray.md.
        cores: With --on: CPU cores that each rank needs. Default: OMP_NUM_THREADS, else 1.
        gpus: With --on: GPUs that each rank needs, 0 or 1. Default: 1 where the cluster has any.
        memory_gb: With --on: host memory that each rank needs, in GB. Default: as planned from the recipe.
        restarts: With --on: how often all ranks may start again after a node was lost. Default: 3.
        fields: List every field of a recipe with its default, and what may change when a run is resumed.
        quiet: Print nothing but warnings and errors.
        json_: Print what happens and the results as JSON, one object a line.
    """
    way = way_of(quiet, json_)
    if fields:
        from thence.cli.fields import describe_fields
        from thence.pipeline.changes import describe_rules

        print(f"{describe_fields()}\n\n{describe_rules()}")
        return 0
    if recipe is None:
        raise none_given("run", "recipe")
    loaded, stages = load_recipe(recipe, overrides), [part.strip() for text in repeat for part in text.split(",")]
    if not all(stages):
        raise UserError("it names no stage", remedy="write --repeat STAGE, for example eval", field="--repeat")
    if restart and stages:
        raise UserError("--restart and --repeat do not go together", remedy="give one of them", field="--repeat")
    refuse_without_on(on, {"--cores": cores, "--gpus": gpus, "--memory-gb": memory_gb, "--restarts": restarts})
    if dry_run and on is not None:
        raise UserError("a dry run starts no ranks", remedy="leave --on or --dry-run out", field="--on")
    if dry_run:
        return plan_run(loaded, restart, stages, ranks, device_gb)
    for flag, value in (("--ranks", ranks if on is None else None), ("--device-gb", device_gb)):
        if value is not None:
            remedy = "torchrun starts the processes of a run, or --on ray"
            raise UserError("it is for --dry-run", remedy=remedy, field=flag)
    if on is not None:
        from thence.cli.on_ray import arguments_of, run_on

        again = [*(["--restart"] if restart else []), *(f"--repeat={name}" for name in stages)]
        arguments, wanted = arguments_of(recipe, overrides), (cores, gpus, memory_gb)
        return run_on(on, loaded, arguments, again, ranks or 1, wanted, 3 if restarts is None else restarts, way)
    return execute(loaded, restart, stages, way)


def plan_run(
    recipe: Recipe,
    restart: bool = False,
    repeat: Sequence[str] = (),
    ranks: int | None = None,
    device_gb: float | None = None,
) -> int:
    """Print what a run would be and cost, then refuse what a run would refuse. Raises UserError.

    Args:
        ranks: processes to plan for; default: those of the environment.
        device_gb: memory of each; default: what this machine has.
    """
    from thence.accounting.budget import plan
    from thence.pages.plan import plan_view
    from thence.pipeline.layout import check_layout, memory_of, own_device
    from thence.pipeline.planning import facts_of, measured_lengths
    from thence.pipeline.preflight import preflight, refuse
    from thence.pipeline.prompts import RenderedPrompts
    from thence.terminal import make_console
    from thence.train.parallel import rank_variable

    console = make_console()
    print(to_toml(redacted_values(recipe.resolved())))  # not through rich: a recipe must not be wrapped
    quiet_libraries()
    ranks = ranks or rank_variable("WORLD_SIZE")
    device = memory_of(own_device(), ranks) if device_gb is None else device_gb * 1e9
    prompts = RenderedPrompts()
    findings = preflight(recipe, None, ranks, restart=restart, repeat=repeat, prompts=prompts)
    wrong = [finding for finding in findings if finding.state == "refused"]
    try:
        given: dict[str, Any] = {"ranks": ranks, "device_bytes": device, **facts_of(recipe)}
        given["on_host"] = device_gb is None and own_device().type == "cpu"
        try:
            given |= measured_lengths(recipe, prompts)
        except UserError as error:
            print(f"(the data were not read: {str(error).splitlines()[0]})\n")
        console.print(plan_view(plan(recipe, **given)))
    except UserError:
        if not wrong:
            raise
    print()
    check_layout(recipe, ranks)
    refuse(wrong)  # after the plan: what a run costs can be asked before its files are there
    for finding in findings:
        if finding.state == "unverified":
            print(f"not verified: {finding.part}: {finding.reason}")
    tried = sum(finding.state == "ok" for finding in findings)
    print(f"{tried} of {len(findings)} things that the recipe names were tried, and hold")
    return 0


def execute(recipe: Recipe, restart: bool, repeat: Sequence[str] = (), way: Way = "shown") -> int:
    """Run, show progress, then print the results and the report's path.

    Args:
        way: shown to a person, as JSON for a program, or quiet.
    """
    from thence.pipeline.run import run
    from thence.terminal import make_console
    from thence.train.parallel import rank_variable

    leads = rank_variable("RANK") == 0
    quiet_libraries()
    with _told(way, leads) as watcher:
        folder = run(recipe, watcher=watcher, restart=restart, repeat=repeat)
    if not leads:
        return 0
    page, problem = _page_of(folder)
    from thence.pages.plan import compared_table
    from thence.pages.run.tables import results_table
    from thence.pages.terminal import TableView, with_notes
    from thence.pipeline.foreseen import compared
    from thence.pipeline.run_files import read_run

    found, measured = read_run(folder), compared(folder)
    if way == "json":
        tell("measured", compared=[asdict(each) for each in measured])
        tell_done(folder, page, [asdict(cell) for cell in found.cells])
    if way != "shown":
        if problem:
            print(problem, file=sys.stderr)
        return 0
    console = make_console()
    if (table := results_table(found)).rows:
        console.print(with_notes(table))
    if measured:
        console.print(TableView(compared_table(measured)))
    console.print(problem or f"report: {page}", soft_wrap=True)
    return 0


@contextlib.contextmanager
def _told(way: Way, leads: bool) -> Iterator[RunWatcher]:
    """Who is told what happens in a run, and where its log goes."""
    from thence.pipeline.progress import NullWatcher
    from thence.recorded import shown_on
    from thence.terminal import logging_to, make_console

    if way == "json" and leads:
        with logging_as_events():
            yield RunEvents()
    elif way == "quiet" or way == "json":
        with logging_to(make_console(stderr=True), logging.WARNING if leads else logging.ERROR):
            yield NullWatcher()
    else:
        with shown_on(make_console()) as watcher:
            yield watcher


def _page_of(folder: Path) -> tuple[Path | None, str]:
    """Write a run's page. Returns it, or why there is none where a package for pages is missing: the run is done."""
    from thence.pages.run.page import write_page

    try:
        return write_page(folder), ""
    except ImportError as error:
        package = (error.name or "jinja2").split(".")[0]
        return None, f"no report: {package} cannot be imported; install it, then run: thence report {folder}"
