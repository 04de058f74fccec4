"""Which model a user means: a folder, a hub name, an embedded base, a GGUF file, or what a run has trained."""

from __future__ import annotations

import re
from pathlib import Path

from thence.errors import UserError
from thence.names import as_name
from thence.recipe import Model, load_recipe
from thence.redaction import redacted
from thence.settings.validation import validated
from thence.train.run_marker import is_run

BASE = "base"


def find_model(name: str, gguf_file: str | None = None) -> tuple[Model, str | None]:
    """The model that a name stands for.

    Args:
        name: a run's folder or its name under `runs/` (its last trained model), `RUN:STAGE` (`RUN:base` is where the
            run started from), a Hugging Face folder or hub name, `world:...`, `package:...`, or a GGUF file.
        gguf_file: name of a GGUF file inside a folder or package.

    Returns:
        The model's settings as in a recipe, and the stage of the run whose model it is (None: no run).

    Raises:
        UserError: the run has no such stage or no trained model yet; a run's settings cannot be read; a checkpoint
            (``RUN@STEP``) is named, which is no model's folder yet.
    """
    if at_step(name) is not None:
        raise UserError(
            f"{name!r} is a checkpoint, and this takes a model's folder",
            remedy=f"make one: thence export {name} FOLDER, then give FOLDER",
        )
    run, stage = run_of(name)
    if run is not None:
        return _trained(run, stage)
    if gguf_file is None and name.endswith(".gguf"):
        folder, _, gguf_file = name.rpartition("/")
        name = folder or "."
    return validated(Model, {"path": name, "gguf_file": gguf_file}, "model"), None


def short_name(name: str) -> str:
    """A name for a folder: the last parts of a path or hub name, without characters that paths do not like."""
    bare = redacted(name).removeprefix("package:").rstrip("/")
    kept = bare if ":" in bare and not bare.startswith("/") else "-".join(Path(bare).parts[-2:])
    return as_name(kept) if re.search(r"[A-Za-z0-9_]", kept) else "model"


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


def _trained(run: Path, stage: str | None) -> tuple[Model, str | None]:
    recipe = load_recipe(run / "recipe.toml")
    if stage == BASE:
        return recipe.model, BASE
    trained = [name for name in recipe.stages if (run / "stages" / name / "model").is_dir()]
    wanted = stage or (trained[-1] if trained else None)
    if wanted not in trained:
        listed = ", ".join([f"{run}:{name}" for name in [BASE, *trained]])
        problem = f"stage {stage!r} of this run has no model" if stage else "this run has no trained model yet"
        raise UserError(problem, remedy=f"give one of: {listed}", file=run)
    path = run / "stages" / wanted / "model"
    settings = Model(path=str(path), trust_remote_code=recipe.model.trust_remote_code)
    return settings, wanted
