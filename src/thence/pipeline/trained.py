"""What a run has trained so far: the model of a stage that is done, or the newest checkpoint of one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thence.errors import UserError
from thence.evaluate.origin import run_of
from thence.pipeline.folder import RunFolder
from thence.recipe import kind_of, load_recipe
from thence.train.checkpoint import newest_whole


@dataclass(frozen=True)
class Trained:
    """Weights on disk, and in words which they are. ``trust_remote_code`` is what the run's recipe says."""

    folder: Path
    words: str
    trust_remote_code: bool = False


def find_trained(name: str) -> Trained:
    """The weights that a name stands for.

    Args:
        name: a run's folder or its name under ``runs/`` (the last stage that has trained something), ``RUN:STAGE``, or
            the folder of a checkpoint or model.

    Raises:
        UserError: the run has no such stage, or has trained nothing yet.
    """
    run, wanted = run_of(name)
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
    for stage in [wanted] if wanted is not None else reversed(stages):
        if folder.is_done(stage):
            return Trained(folder.stage(stage) / "model", f"the finished model of stage {stage}", trusted)
        found = newest_whole(folder.stage(stage) / "checkpoints")
        if found is not None:
            words = f"the checkpoint after step {found.step} of stage {stage}, which is not finished"
            return Trained(found.folder, words, trusted)
    what = f"stage {wanted} has no checkpoint yet" if wanted else "this run has no checkpoint yet"
    raise UserError(what, remedy="wait for one: checkpoint_every says after how many steps it is written", file=run)
