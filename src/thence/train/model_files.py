"""What lies in a model's folder, looked at before transformers opens it: its errors name neither file nor cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thence.errors import RecipeError, UserError
from thence.files import read_json
from thence.recipe.tables import Model
from thence.train.places import find_place
from thence.train.written import check_written

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_WHOLE = "put a whole copy of it back, or give another model"
_GGUF = b"GGUF"

OF_A_MODEL = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "config.json", "*.py", "*.index.json")
OF_A_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.jinja"),
    *("chat_template*", "*.tiktoken"),
)
"""Files of a model, and of its tokenizer, by pattern: what else lies in the folder changes nothing."""


def resolve(path: str) -> str:
    """The folder of ``world:...`` (embedded world) or ``package:...`` (installed package); else the name itself.

    Every model is opened through here: one that thence wrote is refused where it is no longer as it was written.

    Raises:
        RecipeError: no such base, folder or package, and no name that the hub could have; or the hub cannot be reached.
        DamagedFile: a file of a model that thence wrote has changed or is gone.
    """
    place = find_place(path) if path else ""
    if place and not path.startswith(("world:", "package:")):
        check_written(Path(place))
    return place


def check_files(settings: Model) -> None:
    """Make sure that a folder given as a model holds one that the transformers installed here knows.

    Raises:
        RecipeError: no configuration, an adapter alone, a GGUF file that is none, or an unknown architecture.
        DamagedFile: the configuration cannot be read.
    """
    if not settings.path:
        return
    folder = Path(resolve(settings.path))
    if not folder.is_dir():
        return  # a name on the hub
    if settings.gguf_file:
        _check_gguf(folder / settings.gguf_file)
        return
    try:
        config = read_json(folder / _CONFIG, remedy=_WHOLE)
    except FileNotFoundError:
        raise _no_configuration(folder) from None
    _check_architecture(config, folder, settings.trust_remote_code)


def _no_configuration(folder: Path) -> RecipeError:
    quantized = sorted(file.name for file in folder.glob("*.gguf"))
    if quantized:
        remedy = f"name the GGUF file: model.gguf_file = {quantized[0]!r}"
    elif (folder / _ADAPTER).is_file():
        remedy = f"it holds an adapter: merge it into its model (thence merge {folder} FOLDER), and give that folder"
    else:
        remedy = f"give a Hugging Face folder, with {_CONFIG}, weights and tokenizer"
    return RecipeError(f"holds no {_CONFIG}, so it is no model", remedy=remedy, file=folder, field="model.path")


def _check_gguf(file: Path) -> None:
    try:
        with file.open("rb") as content:
            start = content.read(len(_GGUF))
    except OSError as error:
        problem, remedy = f"cannot be read: {error.strerror or error}", "give the name of a file in model.path"
        raise RecipeError(problem, remedy=remedy, file=file, field="model.gguf_file") from None
    if start != _GGUF:
        raise RecipeError(
            "is not a GGUF file: it does not start with 'GGUF'",
            remedy="put a whole copy of it back, or leave model.gguf_file out for a folder of safetensors",
            file=file,
            field="model.gguf_file",
        )


def _check_architecture(config: dict[str, Any], folder: Path, trusted: bool) -> None:
    """Refuse a `model_type` that transformers does not know; with code of its own, only where that may run."""
    import transformers

    kind = config.get("model_type")
    has_code = isinstance(config.get("auto_map"), dict)
    if has_code and trusted:
        return
    if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
        return
    place = {"file": folder / _CONFIG, "field": "model.path"}
    if has_code:
        raise RecipeError(
            f"the architecture {kind!r} is Python code that the model ships",
            remedy="read that code; to run it, set model.trust_remote_code = true",
            **place,
        )
    if kind is None:
        raise UserError("names no model_type, so its architecture is not known", remedy=_WHOLE, **place)
    raise RecipeError(
        f"transformers {transformers.__version__} does not know the architecture {kind!r}",
        remedy="give another model, or install a version of transformers that knows it",
        **place,
    )
