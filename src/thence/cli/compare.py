"""``thence compare``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from thence.cli.arguments import SWITCH, Option, only, read_flag, take_apart
from thence.errors import UserError
from thence.settings.annotations import takes
from thence.settings.limits import Place, Processes, Seed

HELP = """\
thence compare COMPARISON [--jobs N] [--only ARM,ARM] [--seeds 0,1] [--bases rich] [--folder F] [--dry-run] [--report]

  COMPARISON  a shipped comparison (`thence compare --list`) or a TOML file: arms x bases x seeds at one budget
  --jobs      processes side by side; default: one a CPU core
  --threads   threads of each process; default 1
  --only      run these arms, and those that they come after
  --seeds     run these of the reported seeds
  --bases     run from these bases
  --folder    where everything is kept; default: runs/<name>
  --dry-run   what would be run, and what is done already
  --report    write the report of what is there; run nothing

Run the same command again after a crash or Ctrl-C: finished runs are never repeated, others go on from their last
checkpoint. The report is FOLDER/report.html; the numbers are in results.json, report.json, runs.csv and summary.csv."""
SWITCHES = ("--dry-run", "--report", "--list", "--fields")
VALUES = {
    "--jobs": takes(Processes),
    "--threads": takes(Processes),
    "--only": "names of arms, with commas between",
    "--seeds": "seeds, with commas between",
    "--bases": "names of bases, with commas between",
    "--folder": "a folder",
}
OPTIONS = {flag: SWITCH for flag in SWITCHES} | {flag: Option(words=words) for flag, words in VALUES.items()}


def compare_command(argv: Sequence[str]) -> int:
    """Run a comparison, print its tables and the path of its report. Returns 1 where runs failed or are missing."""
    found = take_apart(argv, OPTIONS)
    if found.help:
        print(HELP)
        return 0
    on, values = found.given, {flag: found.given[flag][0] for flag in VALUES if flag in found.given}
    if "--fields" in on:
        print(_fields())
        return 0
    from thence.compare.recipe import load_comparison, shipped_comparisons

    if "--list" in on:
        for name in shipped_comparisons():
            print(f"{name:<16} {load_comparison(name).description}")
        return 0
    name = only(found.positional, "thence compare takes one comparison", "`thence compare --list` lists them")
    recipe = load_comparison(name)
    if "--folder" in values:
        recipe = recipe.model_copy(update={"folder": read_flag("--folder", values["--folder"], Place)})
    numbers = {flag: read_flag(flag, values[flag], Processes) for flag in ("--jobs", "--threads") if flag in values}
    arms, bases = _names(values, "--only", recipe.arms), _names(values, "--bases", recipe.bases)
    seeds = [read_flag("--seeds", text, Seed) for text in _split("--seeds", values.get("--seeds", ""))]
    if unknown := set(seeds) - set(recipe.seeds):
        raise UserError(
            f"not among the comparison's seeds: {sorted(unknown)}", remedy=f"they are {recipe.seeds}", field="--seeds"
        )
    folder = recipe.path()
    if "--dry-run" in on:
        return _dry_run(recipe, arms, seeds, bases)
    if "--report" in on:
        return _report(recipe, folder, collect_again=True)
    _run(recipe, numbers, arms, seeds, bases)
    return _report(recipe, folder, collect_again=False)


def _run(recipe, numbers, arms, seeds, bases) -> None:
    from thence.compare.engine import compare
    from thence.compare.live import LiveTable
    from thence.terminal import make_console

    jobs, threads = numbers.get("--jobs", len(os.sched_getaffinity(0))), numbers.get("--threads", 1)
    with LiveTable(make_console(), jobs) as watcher:
        compare(recipe, jobs=jobs, threads=threads, only=arms, seeds=seeds, bases=bases, watcher=watcher)


def _report(recipe, folder: Path, collect_again: bool) -> int:
    from thence.compare.result import read_results, write_results
    from thence.compare.statistics import statistics
    from thence.pages.comparison.page import print_comparison, write_page
    from thence.terminal import make_console

    if collect_again:
        from thence.compare.collect import collect
        from thence.compare.folder import check_folder
        from thence.compare.plan import Planner

        if not folder.is_dir():
            raise UserError("no comparison has been run here", remedy="run it without --report", file=folder)
        check_folder(folder)
        write_results(folder, collect(Planner(recipe, folder.resolve())))
    page = write_page(folder)
    results = read_results(folder)
    console = make_console()
    print_comparison(statistics(results), console)
    for failure in results.failures:
        print(f"failed: {failure.arm} from {failure.base}, seed {failure.seed}: {failure.why}", file=sys.stderr)
    console.print(f"report: {page}", soft_wrap=True)
    return 1 if results.failures else 0


def _dry_run(recipe, arms, seeds, bases) -> int:
    from thence.compare.live import title
    from thence.compare.plan import Planner
    from thence.compare.preflight import refuse_what_cannot_run

    planner = Planner(recipe, recipe.path().resolve(), arms, seeds, bases)
    runs = list(planner.runs())
    refuse_what_cannot_run(planner, planner.to_run())
    done = 0
    for run in runs:
        is_done = planner.is_done(run)
        done += is_done
        print(f"{'done' if is_done else '    '}  {title(run)}")
    print(f"{len(runs)} runs, {done} of them done; budget of an arm: {recipe.budget or 'none'}")
    return 0


def _split(flag: str, text: str) -> list[str]:
    """The parts of a list with commas. Raises UserError where one is empty or there twice."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if "" in parts or len(set(parts)) < len(parts):
        raise UserError(f"{text!r}: a part is empty or given twice", remedy="write A,B", field=flag)
    return parts


def _names(values, flag: str, known) -> list[str]:
    names = _split(flag, values.get(flag, ""))
    for name in names:
        if name not in known:
            raise UserError(f"no {name!r} in the comparison", remedy=f"there are: {', '.join(known)}", field=flag)
    return names


def _fields() -> str:
    from thence.cli.flags import describe_section
    from thence.compare.recipe import ArmTable, Base, Budget, ComparisonRecipe, Tuning

    tables = {"": ComparisonRecipe, "budget": Budget, "bases.NAME": Base, "arms.NAME": ArmTable, "tuning": Tuning}
    parts = []
    for name, section in tables.items():
        parts.append(f"\n[{name}]" if name else "at the top of the file")
        parts += describe_section(section)
    return "\n".join(parts)
