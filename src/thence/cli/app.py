"""The commands of thence: typed functions, made into flags, help pages and shell completion by cyclopts.

The module of a command is imported when it is called, or when its own help page is printed.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cyclopts import App, Parameter

from thence.errors import UserError

HELP_FLAGS = ("--help", "-h")
WITH_FIELDS = ("run", "plan", "check", "data", "pope")
"""Commands whose flags are also the fields of a recipe."""
COMMANDS = {
    "run": "Run a recipe, or resume it where it stopped.",
    "plan": "Say what a recipe costs on given hardware.",
    "check": "Try what training relies on, with your model and rows.",
    "data": "Print rows as the model sees them, and their lengths.",
    "pope": "Make guided rows for the problems that a model never solves.",
    "compare": "Compare arms x bases x seeds at one budget.",
    "eval": "Measure a model on benchmarks; compare evaluations.",
    "sample": "Show what the model said, with verdicts.",
    "watch": "Watch a run from another terminal.",
    "serve": "Show the pages of runs in a browser, as they grow.",
    "export": "Make a Hugging Face folder or GGUF file of a run.",
    "merge": "Merge a LoRA adapter into its model.",
    "report": "Write the report page of a run again.",
    "audit": "Recover the weight that a trainer gives to every token.",
    "doctor": "List versions here, and those known to train wrongly.",
    "recipes": "List the recipes that come with thence, or print one.",
    "methods": "List the training methods, or explain one.",
    "schema": "Print the JSON schema of recipes or comparisons.",
    "completion": "Print or install the completion for your shell.",
}
USAGE = {
    "": "thence COMMAND ...",
    "run": "thence run RECIPE [--table.field VALUE ...] [OPTIONS]",
    "plan": "thence plan RECIPE --hardware NAMExCOUNT [--table.field VALUE ...] [OPTIONS]",
    "check": "thence check MODEL|RECIPE [--data FILE] [--table.field VALUE ...]",
    "eval": "thence eval MODEL --suite NAME [OPTIONS]\n"
    "       thence eval --endpoint URL --suite NAME [OPTIONS]\n"
    "       thence eval --compare A B [C ...] | --regrade FOLDER | --list",
    "data": "thence data SOURCE|RECIPE --model MODEL [--table.field VALUE ...]",
    "pope": "thence pope RECIPE FILE [--table.field VALUE ...] [OPTIONS]",
    "compare": "thence compare COMPARISON [OPTIONS]",
    "export": "thence export CHECKPOINT FOLDER [OPTIONS]\n       thence export RUN|RUN:STAGE FOLDER [OPTIONS]\n"
    "       thence export RUN FILE.gguf --gguf TYPE\n"
    "       thence export RUN FOLDER --push-to-hub OWNER/NAME [--dry-run]",
    "merge": "thence merge ADAPTER|RUN|RUN:STAGE FOLDER [OPTIONS]",
    "serve": "thence serve [RUN ...] [OPTIONS]",
    "recipes": "thence recipes [NAME]",
    "methods": "thence methods [NAME]",
    "schema": "thence schema [recipe|comparison]",
    "completion": "thence completion [SHELL] [--install]",
    "audit": "thence audit TARGET [OPTIONS]\n       thence audit command [OPTIONS] -- PROGRAM ... {model} {data} ...",
}
EXAMPLES = """\
Examples:
  thence run quickstart                  SFT, then RL, of a tiny model
  thence run mine.toml --rl.steps 4      any field of a recipe is a flag
  thence COMMAND --help                  more about a command"""


def command(name: str) -> Callable[[Sequence[str]], int]:
    """What a command does with the rest of the command line. Raises UserError where there is no such command."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown command {name!r}", remedy=f"{hint}`thence --help` lists the commands")
    from thence.cli.parsing import call

    return partial(call, name)


def print_help(name: str = "") -> int:
    """Print the help page of a command, or of thence itself. Returns 0."""
    from thence.terminal import make_console

    app = make_app()
    if name:
        page = app[name]
        page.help, page.help_epilogue = _told(inspect.getdoc(page.default_command) or "")
    app.help_print([name] if name else [], console=make_console())
    return 0


def make_app(read: Callable[..., Any] | None = None) -> App:
    """The commands.

    Args:
        read: reads the texts of an argument as a value of its type; None: cyclopts does.
    """
    parameter = Parameter(
        converter=read, negative_bool=(), negative_iterable=(), show_default=lambda value: value or None
    )
    app = App(
        name="thence",
        help="SFT, thence RL: post-train language models to reason, correct by construction.",
        help_epilogue=EXAMPLES,
        usage=f"Usage: {USAGE['']}",
        help_format="plaintext",
        help_flags=HELP_FLAGS,
        group_parameters="Options",
        version_flags=(),
        end_of_options_delimiter="",
    )
    for place, (name, said) in enumerate(COMMANDS.items()):
        options: dict[str, Any] = {"name": name, "help": said, "sort_key": place, "default_parameter": parameter}
        if name in USAGE:
            options["usage"] = f"Usage: {USAGE[name]}"
        app.command(f"thence.cli.{name}:{name}_command", **options)
    return app


def _told(docstring: str) -> tuple[str, str]:
    """The description in a docstring, each paragraph on one line for a terminal of any width, and its examples."""
    text, _, _ = docstring.partition("\nArgs:\n")
    description, heading, examples = re.split(r"\n(Examples?:)\n", text)
    paragraphs = [" ".join(part.split()) for part in description.strip().split("\n\n")]
    return "\n\n".join(paragraphs), f"{heading}\n{examples.strip(chr(10))}"


def quiet_libraries() -> None:
    """transformers' own bars and warnings would break ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
