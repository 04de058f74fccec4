"""``thence run``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thence.cli.arguments import only
from thence.cli.flags import describe_fields, split_flags
from thence.errors import UserError
from thence.files import read_json
from thence.recipe import Recipe, load_recipe
from thence.redaction import redacted_values
from thence.toml import to_toml

if TYPE_CHECKING:
    from thence.pipeline.prompts import RenderedPrompts

HELP = """\
thence run RECIPE [--table.field value ...] [--dry-run] [--repeat STAGE] [--restart]

  RECIPE      a shipped recipe (`thence recipes`) or a TOML file
  --dry-run   try all that the recipe names, print it resolved, with tokens, FLOPs and memory, and stop
  --repeat    set this stage aside and run it again, with the settings of now; for several: --repeat a,b
  --restart   remove what an earlier run wrote into the folder, and begin anew
  --fields    list every field of a recipe, with its default, and what may change when a run is resumed

Fields: --sft.lr 2e-5, --rl.steps 50, --data.source train.jsonl, --data.skip-bad, --seed 1, --folder runs/mine.
Tables: --data.columns question=problem,answer=solution, or the flag once for each.
Run again after a crash or Ctrl-C: it resumes where it was.
Several processes: torchrun --nproc-per-node N -m thence run RECIPE"""
SWITCHES = ("--dry-run", "--restart", "--fields")


def run_command(argv: Sequence[str]) -> int:
    """Run a recipe and print its table and the path of its report."""
    argv, repeat = _repeated(argv)
    positional, on, overrides = split_flags(argv, SWITCHES)
    if "--help" in on:
        print(HELP)
        return 0
    if "--fields" in on:
        from thence.pipeline.changes import describe_rules

        print(f"{describe_fields()}\n\n{describe_rules()}")
        return 0
    name = only(positional, "thence run takes one recipe", "`thence recipes` lists the shipped ones")
    recipe = load_recipe(name, overrides)
    restart = "--restart" in on
    if restart and repeat:
        raise UserError("--restart and --repeat do not go together", remedy="give one of them", field="--repeat")
    return dry_run(recipe, restart, repeat) if "--dry-run" in on else execute(recipe, restart, repeat)


def _repeated(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--repeat STAGE`` out of a command line. Raises UserError where it names no stage."""
    rest: list[str] = []
    stages: list[str] = []
    given = iter(argv)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != "--repeat":
            rest.append(argument)
            continue
        named = [part.strip() for part in (value if equals else next(given, "")).split(",")]
        if not all(named) or named[0].startswith("-"):
            raise UserError("it names no stage", remedy="write --repeat STAGE, for example eval", field="--repeat")
        stages += named
    return rest, stages


def dry_run(recipe: Recipe, restart: bool = False, repeat: Sequence[str] = ()) -> int:
    """Print what a run would be and cost, then refuse what a run would refuse. Raises UserError."""
    from thence.accounting.budget import plan
    from thence.pages.plan import plan_view
    from thence.pipeline.preflight import preflight, refuse
    from thence.pipeline.prompts import RenderedPrompts
    from thence.terminal import make_console
    from thence.train.parallel import rank_variable

    console = make_console()
    print(to_toml(redacted_values(recipe.resolved())))  # not through rich: a recipe must not be wrapped
    _quiet_libraries()
    ranks = rank_variable("WORLD_SIZE")
    prompts = RenderedPrompts()
    findings = preflight(recipe, None, ranks, restart=restart, repeat=repeat, prompts=prompts)
    wrong = [finding for finding in findings if finding.state == "refused"]
    try:
        console.print(plan_view(plan(recipe, _config(recipe), **_measured(recipe, prompts), ranks=ranks)))
    except UserError:
        if not wrong:
            raise
    print()
    refuse(wrong)  # after the plan: what a run costs can be asked before its files are there
    for finding in findings:
        if finding.state == "unverified":
            print(f"not verified: {finding.part}: {finding.reason}")
    tried = sum(finding.state == "ok" for finding in findings)
    print(f"{tried} of {len(findings)} things that the recipe names were tried, and hold")
    return 0


def execute(recipe: Recipe, restart: bool, repeat: Sequence[str] = ()) -> int:
    """Run, show progress, then print the results and the report's path."""
    from thence.pipeline.progress import Terminal
    from thence.pipeline.run import run
    from thence.terminal import logging_to, make_console
    from thence.train.parallel import rank_variable

    console = make_console()
    leads = rank_variable("RANK") == 0
    _quiet_libraries()
    with logging_to(console, logging.INFO if leads else logging.ERROR), Terminal(console) as watcher:
        folder = run(recipe, watcher=watcher, restart=restart, repeat=repeat)
    if leads:
        from thence.pages.run.page import write_page
        from thence.pages.run.tables import results_table
        from thence.pages.terminal import with_notes
        from thence.pipeline.run_files import read_run

        page = write_page(folder)
        table = results_table(read_run(folder))
        if table.rows:
            console.print(with_notes(table))
        console.print(f"report: {page}", soft_wrap=True)
    return 0


def _config(recipe: Recipe) -> dict[str, Any] | None:
    """The configuration of a model in thence or in an installed package; the plan finds others itself."""
    from thence.train.model_files import resolve

    path = recipe.model.path or ""
    file = Path(resolve(path)) / "config.json" if path.startswith(("world:", "package:")) else None
    remedy = "give a folder whose config.json is whole"
    return read_json(file, remedy=remedy) if file is not None and file.exists() else None


def _measured(recipe: Recipe, prompts: RenderedPrompts) -> dict[str, Any]:
    """Lengths of the training data, where it is at hand and the tokenizer too; else nothing, and the plan assumes."""
    from thence.errors import UserError
    from thence.train.model import load_tokenizer

    training = [recipe.stage(name) for name in recipe.stages if not name.startswith("eval")]
    data = recipe.stage_data(training[0].data if training else {})
    try:
        rows = prompts.load(data, load_tokenizer(recipe.model))
    except UserError as error:
        print(f"(the data were not read: {str(error).splitlines()[0]})\n")
        return {}
    responses = [len(p.demonstration_ids) for p in rows if p.demonstration_ids]
    return {
        "n_examples": len(rows),
        "mean_prompt_tokens": sum(len(p.token_ids) for p in rows) / len(rows),
        "mean_response_tokens": sum(responses) / len(responses) if responses else None,
    }


def _quiet_libraries() -> None:
    """transformers' own bars would break ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
