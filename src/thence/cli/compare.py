"""``thence compare``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from thence.errors import UserError

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
SWITCHES = ("--dry-run", "--report", "--list", "--fields", "--help", "-h")
VALUES = ("--jobs", "--threads", "--only", "--seeds", "--bases", "--folder")


def compare_command(argv: Sequence[str]) -> int:
    """Run a comparison, print its tables and the path of its report. Returns 1 where runs failed or are missing."""
    positional, on, values = _parse(argv)
    if on & {"--help", "-h"}:
        print(HELP)
        return 0
    if "--fields" in on:
        print(_fields())
        return 0
    from thence.compare.recipe import load_comparison, shipped_comparisons

    if "--list" in on:
        for name in shipped_comparisons():
            print(f"{name:<16} {load_comparison(name).description}")
        return 0
    if len(positional) != 1:
        raise UserError(f"thence compare takes one comparison, not {len(positional)}", remedy="see --help")
    recipe = load_comparison(positional[0])
    if "--folder" in values:
        recipe = recipe.model_copy(update={"folder": values["--folder"]})
    only, bases = _names(values, "--only", recipe.arms), _names(values, "--bases", recipe.bases)
    seeds = [_number("--seeds", text) for text in _split(values.get("--seeds", ""))]
    if unknown := set(seeds) - set(recipe.seeds):
        raise UserError(f"not among the comparison's seeds: {sorted(unknown)}", remedy=f"they are {recipe.seeds}")
    _check(recipe)
    folder = recipe.path()
    if "--dry-run" in on:
        return _dry_run(recipe, only, seeds, bases)
    if "--report" in on:
        return _report(recipe, folder, collect_again=True)
    _run(recipe, values, only, seeds, bases)
    return _report(recipe, folder, collect_again=False)


def _run(recipe, values, only, seeds, bases) -> None:
    from thence.compare.engine import compare
    from thence.compare.live import LiveTable
    from thence.terminal import make_console

    jobs = _number("--jobs", values.get("--jobs", str(len(os.sched_getaffinity(0)))), least=1)
    threads = _number("--threads", values.get("--threads", "1"), least=1)
    with LiveTable(make_console(), jobs) as watcher:
        compare(recipe, jobs=jobs, threads=threads, only=only, seeds=seeds, bases=bases, watcher=watcher)


def _report(recipe, folder: Path, collect_again: bool) -> int:
    from thence.compare.page import write_report
    from thence.compare.result import RESULTS, read_results, to_json
    from thence.compare.statistics import statistics
    from thence.compare.text import print_comparison
    from thence.files import write_atomically
    from thence.terminal import make_console

    if collect_again:
        from thence.compare.collect import collect
        from thence.compare.plan import Planner

        if not folder.is_dir():
            raise UserError("no comparison has been run here", remedy="run it without --report", file=folder)
        write_atomically(folder / RESULTS, to_json(collect(Planner(recipe, folder.resolve()))))
    page = write_report(folder)
    results = read_results(folder)
    console = make_console()
    print_comparison(statistics(results), console)
    for failure in results.failures:
        print(f"failed: {failure.arm} from {failure.base}, seed {failure.seed}: {failure.why}", file=sys.stderr)
    console.print(f"report: {page}", soft_wrap=True)
    return 1 if results.failures else 0


def _dry_run(recipe, only, seeds, bases) -> int:
    from thence.compare.live import title
    from thence.compare.plan import Planner
    from thence.compare.preflight import refuse_what_cannot_run

    planner = Planner(recipe, recipe.path().resolve(), only, seeds, bases)
    needs = list(planner.needs())
    refuse_what_cannot_run(planner, planner.to_run())
    done = 0
    for need in needs:
        is_done = planner.is_done(need)
        done += is_done
        print(f"{'done' if is_done else '    '}  {title(need)}")
    print(f"{len(needs)} runs, {done} of them done; budget of an arm: {recipe.budget or 'none'}")
    return 0


def _check(recipe) -> None:
    """Fail on a wrong method, option or fault before anything is computed."""
    from thence.compare.recipe import resolved_stage
    from thence.methods.registry import stage_method
    from thence.pipeline.context import step_of
    from thence.recipe import Rl, Sft

    for name, arm in recipe.arms.items():
        if arm.kind:
            stage = resolved_stage(recipe, name).stage(arm.kind)
            assert isinstance(stage, Sft | Rl)
            try:
                stage_method(stage, arm.kind)
                step_of(arm.kind, stage)
            except UserError as error:
                raise UserError(error.problem, remedy=error.remedy, field=f"arms.{name}: {error.field}") from None


def _parse(argv: Sequence[str]) -> tuple[list[str], set[str], dict[str, str]]:
    positional: list[str] = []
    on: set[str] = set()
    values: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if argument in SWITCHES:
            on.add(argument)
        elif name in VALUES:
            if not equals and not rest:
                raise UserError("the flag needs a value", remedy="see --help", field=name)
            values[name] = value if equals else rest.pop(0)
        elif argument.startswith("-"):
            raise UserError("no such flag", remedy="see `thence compare --help`", field=argument)
        else:
            positional.append(argument)
    return positional, on, values


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _names(values, flag: str, known) -> list[str]:
    names = _split(values.get(flag, ""))
    for name in names:
        if name not in known:
            raise UserError(f"no {name!r} in the comparison", remedy=f"there are: {', '.join(known)}", field=flag)
    return names


def _number(flag: str, text: str, least: int = 0) -> int:
    if not text.isdigit() or int(text) < least:
        raise UserError(f"not a number from {least}: {text!r}", remedy="give a whole number", field=flag)
    return int(text)


def _fields() -> str:
    from thence.cli.flags import describe_section
    from thence.compare.recipe import ArmTable, Base, Budget, ComparisonRecipe, Tuning

    tables = {"": ComparisonRecipe, "budget": Budget, "bases.NAME": Base, "arms.NAME": ArmTable, "tuning": Tuning}
    parts = []
    for name, section in tables.items():
        parts.append(f"\n[{name}]" if name else "at the top of the file")
        parts += describe_section(section)
    return "\n".join(parts)
