"""``thence pope``: guided rows for hard problems."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from thence.recipe import load_recipe, shipped_recipes
from thence.settings.limits import Rows


def pope_command(
    recipe: Annotated[str, Parameter(completer=lambda _: [*shipped_recipes()])],
    file: Path,
    /,
    *,
    samples: Rows = 128,
    shares: str = "0.05,0.1,0.15,0.2,0.25",
    form: str | None = None,
    overrides: Annotated[dict[str, Any], Parameter(parse=False)],
) -> int:
    """Find a model's hard problems, and the shortest beginning of a solution from which it succeeds (POPE).

    The recipe's model answers every row of the data of its first RL stage, --samples times. A problem without a right
    answer is hard. It is asked again with more and more of its demonstration in the prompt, until one sample is right.
    The file gets each such problem twice: guided, and as it was. Train on it with any RL method:
    `--rl.data.source FILE`. Hard problems that no share helps are left out. FILE.problems.jsonl has every decision; the
    same command resumes from it.

    Examples:

      thence pope mine.toml hard.jsonl
      thence run mine.toml --rl.data.source hard.jsonl

    Args:
        recipe: A recipe with an RL stage. Any field of it is a flag.
        file: The JSONL file to write.
        samples: Samples of each problem, and of each guided problem.
        shares: Shares of the demonstration to try, shortest first.
        form: The guided question, with {problem} and {prefix} in it. Default: an instruction to continue; a prompt in
            plain text is continued as it is.
    """
    from thence.cli.app import quiet_libraries
    from thence.pipeline.pope import Decision, Guidance, Search, find_guidance, record_of, told_of

    how = Guidance(samples, _shares(shares), form)
    quiet_libraries()
    search = Search(load_recipe(recipe, overrides), how)

    def told(decided: Sequence[Decision], total: int) -> None:
        print(f"{len(decided):,} of {total:,}: {told_of(decided)}", file=sys.stderr, flush=True)

    try:
        decided = find_guidance(search, file, told)
    except KeyboardInterrupt:
        print(f"\nwhat was decided is kept in {record_of(file)}; the same command resumes", file=sys.stderr)
        raise
    rows = 2 * sum(decision.get("share") is not None for decision in decided)
    print(f"{told_of(decided)}\nwritten: {file}, {rows:,} rows")
    return 0


def _shares(text: str) -> tuple[float, ...]:
    from thence.errors import UserError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"{text!r} is no list of numbers", remedy="give shares such as 0.05,0.1,0.25", field="--shares"
        ) from None
