"""What a run has trained, by name: ``RUN``, ``RUN:STAGE``, ``RUN@STEP``, ``RUN:STAGE@STEP``, wherever a model is named.

The model of a finished stage lies in the run. That of a checkpoint is written beside the checkpoints when it is first
asked for (``stages/NAME/exported``), as ``thence export`` or ``thence merge`` writes it.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from thence.errors import UserError
from thence.locks import held
from thence.recipe import Recipe, kind_of, load_recipe
from thence.train.checkpoint import MANIFEST, checkpoints, newest_whole
from thence.train.run_marker import is_run

log = logging.getLogger(__name__)
BASE = "base"
EXPORTED = "exported"
"""The folder beside a stage's checkpoints that holds models made from them."""
PATIENCE = 24 * 3600.0  # seconds that another process may take to write a large model


def run_of(name: str) -> tuple[Path | None, str | None]:
    """The folder of the run and the stage that a name means: a run's folder, its name under `runs/`, or `RUN:STAGE`."""
    for whole, stage in ((name, None), tuple(name.rsplit(":", 1)) if ":" in name else (name, None)):
        for folder in (Path(whole).expanduser(), Path("runs") / whole):
            # a model's own folder may hold a recipe of other programs
            if is_run(folder) or ((folder / "recipe.toml").is_file() and not (folder / "config.json").is_file()):
                return folder, stage
    return None, None


def at_step(name: str) -> int | None:
    """The step of ``RUN@STEP`` or ``RUN:STAGE@STEP``; None of any other name.

    Raises:
        UserError: a folder or run has that name as a whole, and the part before the @ is a run too.
    """
    before, _, number = name.rpartition("@")
    if not before or not (number.isascii() and number.isdigit()) or run_of(before)[0] is None:
        return None
    found, stage = run_of(name)  # of RUN:STAGE@STEP it finds the run, with "STAGE@STEP" as stage
    if Path(name).expanduser().exists() or (found is not None and stage is None):
        raise UserError(
            f"{name!r} is a folder, and could also be step {number} of the run {before}",
            remedy="rename the folder, or give the folder of the checkpoint: stages/NAME/checkpoints/step-NNNNNN",
        )
    return int(number)


@dataclass(frozen=True)
class Trained:
    """Weights on disk, and in words which they are. ``trust_remote_code`` is what the run's recipe says."""

    folder: Path
    words: str
    trust_remote_code: bool = False


def find_trained(name: str) -> Trained:
    """The weights that a name stands for.

    Args:
        name: a run's folder or its name under ``runs/`` (the last stage that has trained something), ``RUN:STAGE``,
            ``RUN@STEP`` or ``RUN:STAGE@STEP`` (the checkpoint after a step), or the folder of a checkpoint or model.

    Raises:
        UserError: the run has no such stage or checkpoint, or has trained nothing yet; the name could mean two things.
    """
    step = at_step(name)
    run, wanted = run_of(name if step is None else name.rpartition("@")[0])
    if run is None:
        folder = Path(name).expanduser()
        kind = "checkpoint" if (folder / "state.json").is_file() else "model"
        return Trained(folder, f"the {kind} {folder}")
    recipe = load_recipe(run / "recipe.toml")
    trusted = recipe.model.trust_remote_code
    stages = [stage for stage in recipe.stages if kind_of(stage) != "eval"]
    if wanted is not None and wanted not in stages:
        raise UserError(
            f"this run has no training stage {wanted!r}",
            remedy=f"give one of: {', '.join(f'{run}:{stage}' for stage in stages) or 'a run that trains'}",
            file=run,
        )
    if step is not None:
        return Trained(*_after(run, [wanted] if wanted is not None else stages, step), trusted)
    for stage in [wanted] if wanted is not None else reversed(stages):
        if _is_done(run, stage):
            return Trained(_place(run, stage) / "model", f"the finished model of stage {stage}", trusted)
        found = newest_whole(_place(run, stage) / "checkpoints")
        if found is not None:
            words = f"the checkpoint after step {found.step} of stage {stage}, which is not finished"
            return Trained(found.folder, words, trusted)
    what = f"stage {wanted} has no checkpoint yet" if wanted else "this run has no checkpoint yet"
    raise UserError(what, remedy="wait for one: checkpoint_every says after how many steps it is written", file=run)


def _after(run: Path, stages: list[str], step: int) -> tuple[Path, str]:
    """The checkpoint after a step of one of the stages, and what it is in words. Raises UserError."""
    there = {name: _steps(_place(run, name) / "checkpoints") for name in stages}
    fitting = [name for name, steps in there.items() if step in steps]
    if len(fitting) > 1:
        raise UserError(
            f"several stages of this run have a checkpoint after step {step}",
            remedy=f"give one of: {', '.join(f'{run}:{name}@{step}' for name in fitting)}",
            file=run,
        )
    if not fitting:
        known = [f"{run}:{name}@{number}" for name, steps in there.items() for number in steps]
        raise UserError(
            f"there is no checkpoint after step {step} of stage {' or '.join(stages) or '(none trains)'}",
            remedy=f"give one of: {', '.join(known) or 'none is there'}; keep_every says which ones stay",
            file=run,
        )
    (name,) = fitting
    return there[name][step], f"the checkpoint after step {step} of stage {name}"


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a stage by their step."""
    named = {path.name.removeprefix("step-"): path for path in checkpoints(folder)}
    return {int(number): path for number, path in named.items() if number.isascii() and number.isdigit()}


def base_of_run(name: str) -> str | None:
    """The name of the model that a run started from, of ``RUN:base``; None: no run, or its model has no name alone.

    A model with changed settings, a GGUF file or random weights is more than a name.
    """
    run, stage = run_of(name)
    if run is None or stage != BASE:
        return None
    settings = load_recipe(run / "recipe.toml").model
    return None if settings.gguf_file or settings.config_overrides else settings.path


def model_of_run(name: str) -> tuple[Path, str] | None:
    """The folder of the model that a name means, and the stage that trained it; None: the name is none of a run's.

    Args:
        name: as for :func:`find_trained`. A run alone means the last stage that has left a model.

    Raises:
        UserError: the run has no such model, or no such checkpoint; the folder of the run cannot be written.
    """
    step = at_step(name)
    run, wanted = run_of(name if step is None else name.rpartition("@")[0])
    if run is None:
        return None
    recipe = load_recipe(run / "recipe.toml")
    if step is not None:
        checkpoint = find_trained(name).folder
        return exported(checkpoint, trust_remote_code=recipe.model.trust_remote_code), checkpoint.parent.parent.name
    trained = [stage for stage in recipe.stages if (_place(run, stage) / "model").is_dir()]
    stage = wanted or (trained[-1] if trained else None)
    if stage in trained:
        return _place(run, str(stage)) / "model", str(stage)
    listed = [f"{run}:{each}" for each in trained] + _checkpoints_of(run, recipe, wanted)
    problem = f"stage {stage!r} of this run has no model" if stage else "this run has no trained model yet"
    raise UserError(problem, remedy=f"give one of: {', '.join([f'{run}:{BASE}', *listed])}", file=run)


def exported(checkpoint: Path, *, trust_remote_code: bool = False) -> Path:
    """The model of a checkpoint as a Hugging Face folder beside it, written when it is first asked for.

    Its name follows from the checkpoint's content, so a step that was trained anew gets a folder of its own. Of several
    processes that ask at once, one writes it.

    Raises:
        UserError: it cannot be written there.
        DamagedFile: a file of the checkpoint is not as it was written.
    """
    from thence.train.adapted import merge_checkpoint
    from thence.train.export import check_source, export
    from thence.train.state import stored

    check_source(checkpoint)
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:8]
    place = checkpoint.parent.parent / EXPORTED / f"{checkpoint.name}-{digest}"
    if (place / MANIFEST).is_file():
        return place
    try:
        with held(place.parent, "writes a model here", wait=PATIENCE):
            if not (place / MANIFEST).is_file():
                log.info("the model of %s is written to %s, once", checkpoint, place)
                if any(".lora_A." in name for name in stored(checkpoint)):
                    merge_checkpoint(checkpoint, place)
                else:
                    export(checkpoint, place, trust_remote_code=trust_remote_code)
    except PermissionError as error:
        raise UserError(
            f"the model of this checkpoint cannot be written beside it: {error.strerror}",
            remedy=f"write it elsewhere, and give that folder: thence export {checkpoint} FOLDER",
            file=checkpoint,
        ) from None
    return place


def _place(run: Path, stage: str) -> Path:
    return run / "stages" / stage


def _is_done(run: Path, stage: str) -> bool:
    return (_place(run, stage) / "done.json").is_file()


def _checkpoints_of(run: Path, recipe: Recipe, wanted: str | None) -> list[str]:
    """The names of all checkpoints of a stage, or of all."""
    trained = [name for name in recipe.stages if kind_of(name) != "eval"]
    stages = [wanted] if wanted in trained else trained
    return [f"{run}:{name}@{step}" for name in stages for step in _steps(_place(run, name) / "checkpoints")]
