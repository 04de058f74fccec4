"""``thence compare``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from thence.cli.events import ComparisonEvents, NoEvents, Way, tell, tell_done, way_of
from thence.cli.parsing import none_given, read_flag, refuse_without_on
from thence.errors import UserError
from thence.files import read_json
from thence.machine import usable_cores
from thence.settings.limits import Cores, Gigabytes, Gpus, Processes, Seed

if TYPE_CHECKING:
    from thence.compare.engine import ComparisonWatcher
    from thence.compare.registration import Registration


def compare_command(
    comparison: str | None = None,
    /,
    *,
    jobs: Processes | None = None,
    threads: Processes = 1,
    on: Annotated[str | None, Parameter(metavar="ray[:ADDRESS]")] = None,
    cores: Cores | None = None,
    gpus: Gpus | None = None,
    memory_gb: Gigabytes | None = None,
    only: Annotated[str | None, Parameter(metavar="ARM,ARM")] = None,
    seeds: Annotated[str | None, Parameter(metavar="0,1")] = None,
    bases: Annotated[str | None, Parameter(metavar="NAME,NAME")] = None,
    folder: Path | None = None,
    dry_run: bool = False,
    report: bool = False,
    power: bool = False,
    register: bool = False,
    amend: str | None = None,
    list_: bool = False,
    fields: bool = False,
    quiet: bool = False,
    json_: bool = False,
) -> int:
    """Compare methods: arms x bases x seeds at one budget, with intervals.

    Run the same command again after a crash or Ctrl-C: finished runs are never repeated, others resume from their last
    checkpoint. The report is FOLDER/report.html; the numbers are in results.json, report.json, runs.csv and
    summary.csv. Exit code 1: runs failed.

    Examples:

      thence compare quick --dry-run
      thence compare mine.toml --jobs 2 --seeds 0,1
      thence compare mine.toml --on ray:auto --gpus 1
      thence compare mine.toml --power

    Args:
        comparison: A shipped comparison or a TOML file.
        jobs: Processes side by side. Default: one per CPU core; with --on ray as many as the cluster holds.
        threads: Threads of each process.
        on: Run on a Ray cluster: ray, ray:auto, ray:HOST:PORT, or ray:ray://HOST:PORT. See docs/ray.md.
        cores: With --on: CPU cores that each run needs. Default: --threads.
        gpus: With --on: GPUs that each run needs. Default: 1 where the cluster has any, else 0.
        memory_gb: With --on: host memory that each run needs, in GB. Default: as planned from its recipe.
        only: Run these arms, and those that they come after.
        seeds: Run these of the reported seeds.
        bases: Run from these bases.
        folder: Where everything is kept. Default: runs/NAME.
        dry_run: Print what would be run, and what is done already.
        report: Write the report of what is there; run nothing.
        power: Print what the contrasts can decide with the planned blocks; run nothing.
        register: Write the registration of the design and print its hash; run nothing.
        amend: Why the design is changed after it was registered. The report shows it.
        list_: List the shipped comparisons.
        fields: List every field of a comparison.
        quiet: Print nothing but warnings and errors.
        json_: Print what happens and where the results are as JSON, one object a line.
    """
    way = way_of(quiet, json_)
    if fields:
        print(_fields())
        return 0
    from thence.compare.recipe import load_comparison, shipped_comparisons

    if list_:
        for name in shipped_comparisons():
            print(f"{name:<16} {load_comparison(name).description}")
        return 0
    if comparison is None:
        raise none_given("compare", "comparison")
    recipe = load_comparison(comparison)
    if folder is not None:
        recipe = recipe.model_copy(update={"folder": str(folder)})
    arms, some_bases = _names("--only", only, recipe.arms), _names("--bases", bases, recipe.bases)
    some_seeds = [read_flag("--seeds", text, Seed) for text in _split("--seeds", seeds)]
    _check_blocks(recipe, some_bases, some_seeds)
    if power:
        return _power(recipe, way)
    if dry_run and amend:
        raise UserError("a dry run writes nothing", remedy="leave --dry-run or --amend out", field="--amend")
    if dry_run:
        return _dry_run(recipe, arms, some_seeds, some_bases)
    if report:
        return _report(recipe, recipe.path(), collect_again=True, way=way, amend=amend or "")
    from thence.compare.engine import compare
    from thence.compare.engine import register as write_registration

    if register:
        return _tell_registration(write_registration(recipe, amend or ""), way)
    refuse_without_on(on, {"--cores": cores, "--gpus": gpus, "--memory-gb": memory_gb})
    chosen = {"only": arms, "seeds": some_seeds, "bases": some_bases, "amend": amend or ""}
    if on is None:
        jobs = jobs or usable_cores()
        with _told(way, jobs) as watcher:
            compare(recipe, jobs=jobs, threads=threads, **chosen, watcher=watcher)
    else:
        from thence.cli.on_ray import place_of

        cluster = place_of(on, jobs, threads, (cores, gpus, memory_gb))
        with cluster as (place, side_by_side), _told(way, side_by_side) as watcher:
            compare(recipe, place=place, **chosen, watcher=watcher)
    return _report(recipe, recipe.path(), collect_again=False, way=way)


@contextlib.contextmanager
def _told(way: Way, jobs: int) -> Iterator[ComparisonWatcher]:
    """Who is told how the comparison goes."""
    from thence.compare.live import LiveTable
    from thence.terminal import make_console

    if way == "shown":
        with LiveTable(make_console(), jobs) as watcher:
            yield watcher
    else:
        yield ComparisonEvents() if way == "json" else NoEvents()


def _tell_registration(registration: Registration, way: Way) -> int:
    if way == "json":
        tell("registered", time=registration.time, sha256=registration.sha256_in_force)
    elif way == "shown":
        print(f"registered {registration.time}: sha256 {registration.sha256}")
        for amendment in registration.amendments:
            print(f"amended {amendment.time} ({amendment.reason}): sha256 {amendment.sha256}")
    return 0


def _report(recipe, folder: Path, collect_again: bool, way: Way, amend: str = "") -> int:
    from thence.compare.result import RESULTS, read_results, write_results
    from thence.compare.statistics import statistics
    from thence.pages.comparison.page import print_comparison, write_page
    from thence.terminal import make_console

    if collect_again:
        from thence.compare.collect import collect
        from thence.compare.design import Registrar
        from thence.compare.folder import check_folder
        from thence.compare.plan import Planner

        if not folder.is_dir():
            raise UserError("no comparison has been run here", remedy="run it without --report", file=folder)
        check_folder(folder)
        planner = Planner(recipe, folder.resolve())
        Registrar(planner, amend)
        kept = read_results(folder).failures if (folder / RESULTS).exists() else ()
        found = collect(planner, kept)
        finished = {(run.arm, run.base, run.seed) for run in (*found.runs, *found.tuning_runs)}
        failures = tuple(one for one in kept if (one.arm, one.base, one.seed) not in finished)
        write_results(folder, replace(found, failures=failures))
    page = write_page(folder)
    results = read_results(folder)
    console = make_console()
    if way == "shown":
        print_comparison(statistics(results), console)
    for failure in () if way == "shown" else results.failures:  # they stand below the tables
        print(f"failed: {failure.arm} from {failure.base}, seed {failure.seed}: {failure.why}", file=sys.stderr)
    if way == "json":
        tell_done(folder, page, read_json(folder / "report.json", remedy="run the same command again"))
    elif way == "shown":
        console.print(f"report: {page}", soft_wrap=True)
    return 1 if results.failures else 0


def _dry_run(recipe, arms, seeds, bases) -> int:
    from thence.compare.design import registered
    from thence.compare.live import title
    from thence.compare.plan import Planner
    from thence.compare.preflight import refuse_what_cannot_run

    planner = Planner(recipe, recipe.path().resolve(), arms, seeds, bases)
    kept = registered(planner)
    runs = list(planner.runs())
    refuse_what_cannot_run(planner, planner.to_run())
    blocks: dict[tuple[str, int] | None, list[bool]] = {block: [] for block in recipe.blocks()}
    at: tuple[str, int] | None = ("", -1)
    for run in runs:
        block = (run.base, run.seed) if (run.base, run.seed) in blocks else None
        if block != at:
            print("tuning" if block is None else f"block: {run.base}, seed {run.seed}")
            at = block
        is_done = planner.is_done(run)
        blocks.setdefault(block, []).append(is_done)
        print(f"{'done' if is_done else '    '}  {title(run)}")
    done = sum(map(sum, blocks.values()))
    asked = [of for block, of in blocks.items() if block is not None and of]
    whole = f"{len(asked)} blocks, {sum(map(all, asked))} of them whole"
    print(f"{len(runs)} runs, {done} of them done; {whole}; budget of an arm: {recipe.budget or 'none'}")
    if kept is not None:
        print(f"the design is the one that was registered {kept.time}: sha256 {kept.sha256_in_force}")
    return 0


def _check_blocks(recipe, bases: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise UserError where a seed is none of those that are reported from the bases asked for."""
    known = dict.fromkeys(seed for base, seed in recipe.blocks() if not bases or base in bases)
    if unknown := set(seeds) - set(known):
        of = f"of {', '.join(bases)}" if bases else "among the comparison's seeds"
        remedy = f"they are {list(known)}" if known else "leave --seeds out: what is asked for is only tuned on"
        raise UserError(f"not {of}: {sorted(unknown)}", remedy=remedy, field="--seeds")


def _power(recipe, way: Way) -> int:
    from thence.compare.power import foresee
    from thence.pages.comparison.foreseen import power_table
    from thence.pages.terminal import with_notes
    from thence.terminal import make_console

    found = foresee(recipe)
    if way == "json":
        tell("power", contrasts=[asdict(each) for each in found])
    elif way == "shown":
        make_console().print(with_notes(power_table(recipe, found)))
    return 0


def _split(flag: str, text: str | None) -> list[str]:
    """The parts of a list with commas. Raises UserError where one is empty or there twice."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if "" in parts or len(set(parts)) < len(parts):
        raise UserError(f"{text!r}: a part is empty or given twice", remedy="write A,B", field=flag)
    return parts


def _names(flag: str, text: str | None, known: Mapping[str, object]) -> list[str]:
    names = _split(flag, text)
    for name in names:
        if name not in known:
            raise UserError(f"no {name!r} in the comparison", remedy=f"there are: {', '.join(known)}", field=flag)
    return names


def _fields() -> str:
    from thence.cli.fields import describe_section
    from thence.compare.bases import Base
    from thence.compare.contrasts import AssumedSpread, Contrast, Covariate, Power
    from thence.compare.recipe import ArmBudget, ArmTable, ComparisonRecipe, Tuning

    tables = {"": ComparisonRecipe, "budget": ArmBudget, "bases.NAME": Base, "arms.NAME": ArmTable, "tuning": Tuning}
    tables |= {"covariate": Covariate, "[contrasts]": Contrast, "power": Power, "power.pilot": AssumedSpread}
    parts = []
    for name, section in tables.items():
        parts.append(f"\n[{name}]" if name else "at the top of the file")
        parts += describe_section(section)
    return "\n".join(parts)
