"""The command line: thin; parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from thence.errors import UserError, foreign_exit

USAGE = """\
thence: SFT, thence RL. Post-train language models to reason, correct by construction.

  thence run RECIPE [--table.field value ...]   run a recipe, or go on with it where it was
  thence run RECIPE --dry-run                   the resolved recipe, its budget and memory; trains nothing
  thence recipes                                the recipes that come with thence
  thence methods [NAME]                         the training methods, or one explained
  thence compare COMPARISON                     arms x bases x seeds at equal FLOPs, with intervals
  thence check MODEL [--data FILE]              what training relies on, tried on this model and these rows
  thence sample FOLDER                          prompts with the model's responses and verdicts
  thence report RUN                             write the report page again and print the table
  thence eval MODEL --suite NAME                measure a model on benchmarks; --compare two, --regrade one
  thence audit TARGET                           what weight does a trainer really give to every token?
  thence doctor                                 environment, versions, known-bad versions of other stacks
  thence --version

`thence COMMAND --help` says more. RECIPE is the name of a shipped recipe or a TOML file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``thence``. Returns the exit code: 0 done, 1 not done, 2 the request makes no sense."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from thence import __version__

        print(f"thence {__version__}")
        return 0
    name, *rest = arguments
    try:
        return _command(name)(rest)
    except UserError as error:
        print(f"thence: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:
        where = foreign_exit(error)
        if where is None:
            raise
        print(f"thence: not done: {where}\n  remedy: fix the code there; what was written stands", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nthence: stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name == "run":
        from thence.cli.run import run_command as command
    elif name == "recipes":
        from thence.cli.recipes import recipes_command as command
    elif name == "methods":
        from thence.cli.methods import methods_command as command
    elif name == "compare":
        from thence.cli.compare import compare_command as command
    elif name == "check":
        from thence.cli.check import check_command as command
    elif name == "sample":
        from thence.cli.sample import sample_command as command
    elif name == "report":
        from thence.cli.report import report_command as command
    elif name == "eval":
        from thence.cli.eval import eval_command as command
    elif name == "audit":
        from thence.cli.audit import audit_command as command
    elif name == "doctor":
        from thence.cli.doctor import doctor as command
    else:
        raise UserError(f"unknown command {name!r}", remedy="`thence --help` lists the commands")
    return command
