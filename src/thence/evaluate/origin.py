"""Which model a user means: a folder, a hub name, an embedded base, a GGUF file, or what a run has trained."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from thence.errors import UserError
from thence.names import as_name
from thence.recipe import Model, load_recipe
from thence.redaction import redacted
from thence.settings.validation import validated
from thence.train.model_files import OF_A_MODEL, OF_A_TOKENIZER
from thence.train.places import find_place
from thence.train.run_models import BASE, model_of_run, run_of

BLOCKS, BLOCK_BYTES = 64, 65_536


def find_model(name: str, gguf_file: str | None = None) -> tuple[Model, str | None]:
    """The model that a name stands for.

    Args:
        name: a run's folder or its name under `runs/` (its last trained model), `RUN:STAGE` (`RUN:base` is where the
            run started from), `RUN@STEP` or `RUN:STAGE@STEP` (a checkpoint), a Hugging Face folder or hub name,
            `world:...`, `package:...`, or a GGUF file.
        gguf_file: name of a GGUF file inside a folder or package.

    Returns:
        The model's settings as in a recipe, and the stage of the run whose model it is (None: no run).

    Raises:
        UserError: the run has no such stage or checkpoint, or no trained model yet; its settings cannot be read.
    """
    run, stage = run_of(name)
    if run is not None:
        settings = load_recipe(run / "recipe.toml").model
        if stage == BASE:
            return settings, BASE
        found = model_of_run(name)
        assert found is not None
        return Model(path=str(found[0]), trust_remote_code=settings.trust_remote_code), found[1]
    if gguf_file is None and name.endswith(".gguf"):
        folder, _, gguf_file = name.rpartition("/")
        name = folder or "."
    return validated(Model, {"path": name, "gguf_file": gguf_file}, "model"), None


def files_digest(model: Model) -> str | None:
    """16 hexadecimal digits of the files of a model: of their names, sizes and 64 evenly spread blocks of 64 kB each.

    So a folder that was trained into again is told from what it was, without opening the model.

    Returns:
        None where the model is not in a folder of this machine.
    """
    try:
        folder = Path(find_place(model.path or ""))
    except UserError:  # which whoever opens the model says
        return None
    patterns = (model.gguf_file,) if model.gguf_file else (*OF_A_MODEL, *OF_A_TOKENIZER, "generation_config.json")
    found = {file for pattern in patterns for file in folder.glob(pattern)} if folder.is_dir() else set()
    files = sorted(file for file in found if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for start in sorted({size * i // BLOCKS for i in range(BLOCKS)}):
                opened.seek(start)
                digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()[:16] if files else None


def short_name(name: str) -> str:
    """A name for a folder: the last parts of a path or hub name, without characters that paths do not like."""
    bare = redacted(name).removeprefix("package:").rstrip("/")
    kept = bare if ":" in bare and not bare.startswith("/") else "-".join(Path(bare).parts[-2:])
    return as_name(kept) if re.search(r"[A-Za-z0-9_]", kept) else "model"
