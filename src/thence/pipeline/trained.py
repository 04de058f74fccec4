"""What a run has trained so far: the model of a stage that is done, or the newest checkpoint of one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thence.errors import UserError
from thence.evaluate.origin import at_step, run_of
from thence.pipeline.folder import RunFolder
from thence.recipe import kind_of, load_recipe
from thence.train.checkpoint import checkpoints, newest_whole


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
    folder = RunFolder(run)
    if step is not None:
        return Trained(*_after(folder, [wanted] if wanted is not None else stages, step), trusted)
    for stage in [wanted] if wanted is not None else reversed(stages):
        if folder.is_done(stage):
            return Trained(folder.stage(stage) / "model", f"the finished model of stage {stage}", trusted)
        found = newest_whole(folder.stage(stage) / "checkpoints")
        if found is not None:
            words = f"the checkpoint after step {found.step} of stage {stage}, which is not finished"
            return Trained(found.folder, words, trusted)
    what = f"stage {wanted} has no checkpoint yet" if wanted else "this run has no checkpoint yet"
    raise UserError(what, remedy="wait for one: checkpoint_every says after how many steps it is written", file=run)


def _after(run: RunFolder, stages: list[str], step: int) -> tuple[Path, str]:
    """The checkpoint after a step of one of the stages, and what it is in words. Raises UserError."""
    there = {name: _steps(run.stage(name) / "checkpoints") for name in stages}
    fitting = [name for name, steps in there.items() if step in steps]
    if len(fitting) > 1:
        raise UserError(
            f"several stages of this run have a checkpoint after step {step}",
            remedy=f"give one of: {', '.join(f'{run.path}:{name}@{step}' for name in fitting)}",
            file=run.path,
        )
    if not fitting:
        known = [f"{run.path}:{name}@{number}" for name, steps in there.items() for number in steps]
        raise UserError(
            f"there is no checkpoint after step {step} of stage {' or '.join(stages) or '(none trains)'}",
            remedy=f"give one of: {', '.join(known) or 'none is there'}; keep_every says which ones stay",
            file=run.path,
        )
    (name,) = fitting
    return there[name][step], f"the checkpoint after step {step} of stage {name}"


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a stage by their step."""
    named = {path.name.removeprefix("step-"): path for path in checkpoints(folder)}
    return {int(number): path for number, path in named.items() if number.isascii() and number.isdigit()}
