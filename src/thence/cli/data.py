"""``thence data``: look at rows as the model will see them, and give them pass rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from thence.data.worlds.named import is_of_world
from thence.errors import UserError
from thence.foreign_text import clean
from thence.recipe import Data, Recipe, load_recipe, shipped_recipes
from thence.settings.limits import Rows
from thence.terminal import make_console

if TYPE_CHECKING:
    from thence.data.trajectory import Prompt

BINS, BAR = 12, 40
MODEL = "world:chain/rich"


def data_command(
    source: Annotated[str, Parameter(completer=lambda _: [*shipped_recipes()])],
    /,
    *,
    model: str | None = None,
    n: Rows = 3,
    pass_rates: Annotated[str | None, Parameter(metavar="EVALUATION")] = None,
    out: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    overrides: Annotated[dict[str, Any], Parameter(parse=False)],
) -> int:
    """Print rows as the model will see them, with what is trained, and how long they are; or give them pass rates.

    SOURCE is a JSONL or Parquet file, a hub data set, or a recipe: then the data of its first training stage. Any field
    of a recipe is a flag. The model gives the tokenizer and the chat template; no weight is read.

    With --pass-rates, every row of SOURCE is written to --out with one more column, `pass_rate`: the share of its
    responses that are right in an evaluation of that file. A recipe then sets data.pass_rate or data.order.

    Examples:

      thence data train.jsonl --model ./my-model
      thence data mine.toml --n 10
      thence data rows.parquet --model ./my-model --data.columns '{ question = "problem" }'
      thence eval ./my-model --suite train.jsonl --samples 8 --temperature 1
      thence data train.jsonl --pass-rates evals/train-my-model --out rated.jsonl

    Args:
        source: Rows, several files with commas between; or a recipe.
        model: Whose tokenizer: a folder, a hub name or a run. Default: the recipe's.
        n: Rows that are printed, spread over the data set.
        pass_rates: An evaluation of SOURCE: its folder, or its name under evals/.
        out: The JSONL file to write with --pass-rates.
    """
    if pass_rates is not None:
        return _rate(source, pass_rates, out, {**({} if model is None else {"model": model}), **overrides})
    if out is not None:
        raise UserError("rows are only printed", remedy="leave it out, or add --pass-rates EVALUATION", field="--out")
    from rich.text import Text

    from thence.cli.app import quiet_libraries
    from thence.pipeline.prompts import load_prompts
    from thence.train.model import load_tokenizer

    recipe = _recipe(source, model, overrides)
    data = _first_data(recipe)
    quiet_libraries()
    tokenizer = load_tokenizer(recipe.model)
    prompts = load_prompts(data, tokenizer)
    console = make_console(verbatim=True)
    coloured = console.is_terminal and not console.no_color
    how = "context dim, trained tokens green, special tokens reversed" if coloured else "trained tokens between » and «"
    console.print(Text(f"{how}\n"))
    for prompt in prompts[:: max(1, len(prompts) // n)][:n]:
        _show(prompt, tokenizer, console.print, coloured)
    trained = [len(prompt.demonstration_ids) for prompt in prompts if prompt.demonstration_ids]
    tokens = sum(len(prompt.token_ids) + len(prompt.demonstration_ids or ()) for prompt in prompts)
    print(f"{len(prompts):,} rows, {len(trained):,} with a demonstration; {tokens:,} tokens, {sum(trained):,} trained")
    print("\nprompt, tokens a row")
    print("\n".join(histogram([len(prompt.token_ids) for prompt in prompts])))
    if trained:
        print("\ndemonstration, tokens a row")
        print("\n".join(histogram(trained)))
    return 0


def _rate(source: str, evaluation: str, out: Path | None, unused: Mapping[str, Any]) -> int:
    from thence.cli.eval import existing_evaluation
    from thence.data.selection import PASS_RATE
    from thence.evaluate.pass_rates import rated_rows
    from thence.jsonl import write_jsonl

    if unused:
        flag = f"--{next(iter(unused)).replace('_', '-')}"
        raise UserError("pass rates need the file and its evaluation only", remedy="leave it out", field=flag)
    if out is None:
        raise UserError("where do the rows go?", remedy="add --out rated.jsonl", field="--out")
    file, place = Path(source).expanduser(), out.expanduser()
    if place.exists():
        raise UserError("the file exists", remedy="give another file, or remove it", file=out)
    if not file.is_file():
        problem = "pass rates are of one JSONL or Parquet file"
        raise UserError(problem, remedy="give the file that was evaluated", file=source)
    if not place.absolute().parent.is_dir():
        raise UserError(f"there is no folder {place.parent}", remedy="make it, or give another file", field="--out")
    rows = rated_rows(existing_evaluation(evaluation), file)
    write_jsonl(place, rows)
    rates = [row[PASS_RATE] for row in rows]
    never, always = rates.count(0), rates.count(1)
    print(f"{len(rows):,} rows: {never:,} never right, {always:,} always, {len(rows) - never - always:,} in between")
    print("\npass rate, per cent")
    print("\n".join(histogram([round(100 * rate) for rate in rates], 10)[:-1]))
    print(f"\nwritten: {out}")
    print(f"sometimes right: --data.source {out} --data.pass-rate 0.01,0.99")
    return 0


def _recipe(source: str, model: str | None, overrides: dict[str, Any]) -> Recipe:
    if source in shipped_recipes() or source.endswith(".toml"):
        return load_recipe(source, {**({} if model is None else {"model.path": model}), **overrides})
    tables = {
        "name": "data",
        "stages": ["sft"],
        "model": {"path": model or MODEL},
        "data": {"source": source.split(",")},
    }
    if model is None and not is_of_world(source):
        raise UserError(
            "rows become tokens by a model's tokenizer", remedy=f"thence data {source} --model MODEL", field="--model"
        )
    return load_recipe(tables, overrides)


def _first_data(recipe: Recipe) -> Data:
    """The data of the first stage that trains, else of the first."""
    names = [*(name for name in recipe.stages if not name.startswith("eval")), *recipe.stages]
    return recipe.stage_data(recipe.stage(names[0]).data)


def _show(prompt: Prompt, tokenizer: Any, write: Any, coloured: bool) -> None:
    from rich.text import Text

    from thence.data.chat import Rendered
    from thence.data.show import segments, terminal_text

    shown = prompt.demonstration_ids
    row = Rendered(list(prompt.token_ids), None if shown is None else list(shown))
    counts = f"{len(prompt.token_ids):,} + {len(shown or ()):,} trained" if shown else f"{len(prompt.token_ids):,}"
    answer = f", answer {prompt.answer}" if prompt.answer is not None else ""
    write(Text(f"row {prompt.index + 1}: {counts} tokens{answer}", "bold"))
    parts = [replace(part, text=clean(part.text)) for part in segments(row, tokenizer)]
    if coloured:
        write(terminal_text(parts))
    else:
        context, trained = ("".join(part.text for part in parts if part.trained is kind) for kind in (False, True))
        write(Text(f"{context}»{trained}«" if shown else context))
    write("")


def histogram(lengths: Sequence[int], bins: int = BINS) -> list[str]:
    """Lines of text: how many of the lengths lie in each of evenly wide ranges, then the usual quantiles.

    Args:
        lengths: at least one, in tokens.
    """
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    ends = [(low + i * width, min(high, low + (i + 1) * width - 1)) for i in range(len(counts))]
    names = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in ends]
    margin, most = max(map(len, names)), max(counts)
    lines = [
        f"{name:>{margin}}  {'#' * max(round(BAR * count / most), int(count > 0)):{BAR}} {count:>9,}".rstrip()
        for name, count in zip(names, counts, strict=True)
    ]
    ordered = sorted(lengths)
    at = {f"{share:.0%}": ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 0.99)}
    said = ", ".join(f"{share} up to {value:,}" for share, value in at.items())
    return [*lines, f"{said}, longest {high:,}"]
