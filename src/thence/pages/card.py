"""The model card of an exported model: README.md with the front matter of the Hugging Face hub.

Everything in it comes from the files of the run. What these do not say is not in it, and no licence is stated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.errors import DamagedFile
from thence.files import read_json, write_atomically
from thence.foreign_text import clean, one_line
from thence.pipeline.run_files import Measurement, RunFiles, StageMetrics, read_run
from thence.recipe import kind_of
from thence.redaction import redacted, redacted_values
from thence.train.run_marker import is_run

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_STEP = re.compile(r"step-(\d+)")
_LICENCE = (
    "The files of the run state none. Whoever publishes this model has to choose one (`license:` at the top of this "
    "file). The licences of the base model and of the data apply."
)


@dataclass(frozen=True)
class CardSubject:
    """Which weights of a run a card describes.

    Args:
        run: the run folder.
        stage: the training stage whose weights they are.
        step: the step after which they were kept; None: the finished model of the stage.
    """

    run: Path
    stage: str
    step: int | None = None


def subject_of_card(weights: Path) -> CardSubject | None:
    """The run, stage and step of a folder ``RUN/stages/STAGE/model`` or ``.../checkpoints/step-N``; None of others."""
    place = weights.expanduser().absolute()
    found = _STEP.fullmatch(place.name)
    stage = place.parent.parent if found and place.parent.name == "checkpoints" else place.parent
    if (found is None and place.name != "model") or stage.parent.name != "stages" or not is_run(stage.parent.parent):
        return None
    return CardSubject(stage.parent.parent, stage.name, int(found[1]) if found else None)


def write_card(weights: Path, file: Path, parameters: int, numbers: str, library: str = "transformers") -> bool:
    """Write the card of weights that lie in a run; nothing, and False, where they lie elsewhere.

    Args:
        weights: a model's or checkpoint's folder in its run.
        file: the card.
        parameters: how many the exported model has.
        numbers: the types of its numbers, in words.
        library: what opens the model, as the hub calls it.
    """
    subject = subject_of_card(weights)
    if subject is None:
        return False
    write_atomically(file, model_card(subject, parameters, numbers, library))
    return True


def model_card(subject: CardSubject, parameters: int, numbers: str, library: str = "transformers") -> str:
    """The text of a card; arguments as of :func:`write_card`.

    Raises:
        UserError: the run folder is gone.
    """
    run = read_run(subject.run)
    recipe = redacted_values(run.recipe)
    lines = [
        *_front_matter(recipe, library),
        f"# {_code(recipe.get('name') or run.folder.name)}",
        "",
        *([_prose(str(recipe["description"])), ""] if recipe.get("description") else []),
        f"- Base model: {_base(recipe)}",
        f"- Weights: {_weights(subject)}",
        f"- Size: {parameters:,} parameters ({_prose(numbers)})",
        f"- Trained with: {', '.join(_software(run.environment))}",
        "",
        "## Training",
        "",
        *_training(run, recipe, subject),
        "",
        "## Evaluation",
        "",
        *_evaluation(run, subject),
        "",
        "## Recipe",
        "",
        "All settings of the run. Save them as `recipe.toml`, and run them with `thence run recipe.toml`.",
        "",
        *_fenced(redacted(run.recipe_text), "toml"),
        "",
        "## Licence",
        "",
        _LICENCE,
        "",
    ]
    return "\n".join(lines)


def _front_matter(recipe: Mapping[str, Any], library: str) -> list[str]:
    from huggingface_hub import ModelCardData

    path = recipe.get("model", {}).get("path")
    sources = dict.fromkeys(source for table in recipe.values() for source in _sources(table))
    sources |= dict.fromkeys(_sources({"data": recipe.get("data")}))
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=["thence"],
        base_model=path if _is_of_hub(path, "model") else None,
        datasets=[source for source in sources if _is_of_hub(source, "dataset")] or None,
    )
    return ["---", data.to_yaml().strip(), "---", ""]


def _is_of_hub(name: Any, kind: str) -> bool:
    """Whether a name is known to be one of the hub: its cache holds it. A relative path looks the same."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        return False
    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)).is_dir()


def _base(recipe: Mapping[str, Any]) -> str:
    model = recipe.get("model", {})
    path = f"{model['path']}/{model['gguf_file']}" if model.get("gguf_file") else model.get("path")
    if path:
        return _code(path)
    return f"none: random weights of a {_code(model.get('init', {}).get('model_type', 'model'))}"


def _weights(subject: CardSubject) -> str:
    if subject.step is not None:
        return f"the checkpoint after step {subject.step} of stage {_code(subject.stage)}"
    words = f"the finished model of stage {_code(subject.stage)}"
    done = _done(subject)
    best, values = done.get("best_step"), done.get("best")
    if not isinstance(best, int) or not isinstance(values, Mapping):
        return words
    measured = ", ".join(f"{_code(name)} {value:.4g}" for name, value in values.items())
    return f"{words}, the best step by what it measured: step {best} ({measured})"


def _done(subject: CardSubject) -> Mapping[str, Any]:
    try:
        return read_json(subject.run / "stages" / subject.stage / "done.json", remedy="")
    except (DamagedFile, OSError):
        return {}


def _software(environment: Mapping[str, Any]) -> Iterator[str]:
    for key in ("thence", "torch", "transformers"):
        if environment.get(key):
            yield f"{key} {_code(environment[key])}"
    if environment.get("device"):
        yield f"device {_code(environment['device'])}"


def _training(run: RunFiles, recipe: Mapping[str, Any], subject: CardSubject) -> list[str]:
    order = [stage for stage in run.stages if kind_of(stage) != "eval"]
    counted = order[: order.index(subject.stage) + 1] if subject.stage in order else [subject.stage]
    methods = run.environment.get("methods")
    rows, sums = [], list[float | None]()
    for stage in counted:
        last = subject.step if stage == subject.stage else None
        found = next((training for training in run.training if training.stage == stage), None)
        steps = [step for step in found.steps if last is None or step["step"] <= last] if found else []
        taken = StageMetrics(stage, "", tuple(steps))
        flops, tokens = taken.total("flops"), taken.total("trained_tokens")
        sums.append(flops)
        sources = _sources(recipe.get(stage)) or _sources({"data": recipe.get("data")})
        method = methods.get(stage) if isinstance(methods, Mapping) else None
        cells = [_code(stage, cell=True), _code(method, cell=True) if method else "–"]
        cells += [", ".join(_code(source, cell=True) for source in sources) or "–", f"{len(steps):,}"]
        cells += ["–" if tokens is None else f"{tokens:,.0f}", "–" if flops is None else f"{flops:.3g}"]
        rows.append(f"| {' | '.join(cells)} |")
    known = [value for value in sums if value is not None]
    total = f"Together {sum(known):.3g} FLOPs of training." if known and len(known) == len(sums) else ""
    heads = ["| stage | method | data | steps | trained tokens | FLOPs |", "|---|---|---|---:|---:|---:|"]
    return [*heads, *rows, *(["", total] if total else [])]


def _sources(table: Any) -> list[str]:
    """The data sources that a table of the recipe names itself."""
    data = table.get("data") if isinstance(table, Mapping) else None
    found = data.get("source", []) if isinstance(data, Mapping) else []
    return [str(source) for source in (found if isinstance(found, list) else [found])]


def _evaluation(run: RunFiles, subject: CardSubject) -> list[str]:
    own = [cell for cell in run.cells if cell.subject == subject.stage]
    if subject.step is not None or not own:
        return ["The run has no evaluation of these weights."]
    heads = ["| test set | temperature | n | measure | base | this model |", "|---|---:|---:|---|---:|---:|"]
    rows = []
    for column in dict.fromkeys(cell.column for cell in own):
        cell = run.cell(subject.stage, column)
        measure = "mean reward" if run.by_reward(column) else "accuracy, %"
        cells = [_code(column[0], cell=True), f"{column[1]:g}", _size(cell), measure]
        cells += [_level(run, run.cell("base", column)), _level(run, cell)]
        rows.append(f"| {' | '.join(cells)} |")
    note = "In brackets: the 95% interval, which speaks of the choice of problems, not of other seeds. n: problems × "
    return [*heads, *rows, "", f"{note}samples a problem. Temperature 0 is greedy."]


def _size(cell: Measurement | None) -> str:
    if cell is None or cell.problems is None:
        return "–"
    return f"{cell.problems:,} × {cell.samples or 1}"


def _level(run: RunFiles, cell: Measurement | None) -> str:
    if cell is None:
        return "–"
    level = run.level(cell)
    return f"{level.shown} ({level.interval})" if level.interval else level.shown


def _code(value: Any, *, cell: bool = False) -> str:
    """Text of others as a code span, in which nothing is markup; ``cell``: in a table, where a bar ends a cell."""
    text = one_line(_without_home(str(value)))
    text = text.replace("|", "\\|") if cell else text
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _prose(text: str) -> str:
    """A line of text of others with all that could be markup escaped."""
    line = re.sub(r"([\\`*_\[\]<|&~$])", r"\\\1", " ".join(clean(text).split()))
    return re.sub(r"^(\d*)([-+#>=.):])", r"\1\\\2", line)  # a list, a heading, a quotation


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", clean(_without_home(text)).rstrip("\n"), fence]


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _without_home(text: str) -> str:
    """Paths below the home directory with ~ for it: a card is published, and it holds the name of the user."""
    home = str(Path.home())
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text
