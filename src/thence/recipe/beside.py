"""Relative paths in a recipe's file: they start where the file lies, and not where the command was started.

What a run writes (`folder`) starts at the current folder, and so do paths in flags and in Python. The recipe that a run
keeps is read as the run wrote it. Nothing here imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thence.settings.toml_file import TomlFile

log = logging.getLogger(__name__)
_PATHS = {"source", "template", "path", "tokenizer", "reward", "environment"}
"""Fields that name a file or a folder, in [model], [data] and every table of a stage or of a test set."""
_OF_OTHERS = {"columns", "config_overrides", "init", "options", "template_variables", "vllm"}
"""Tables whose names are not thence's."""
_NO_PATHS = ("world:", "package:", "/", "~")
_MADE_BY_A_RUN = ("environment.json", ".thence-run.json")


def beside(file: TomlFile) -> dict[str, Any]:
    """The tables of a recipe's file with relative paths that hold from the current folder.

    A name that is no file beside the recipe stays as it is: it is one of the hub or of a module. A file of the current
    folder is taken where none lies beside the recipe, which the log says.
    """
    folder = file.path.parent
    if folder in (Path(), Path.cwd()) or any((folder / name).is_file() for name in _MADE_BY_A_RUN):
        return file.tables
    return {name: _moved(value, folder) if isinstance(value, Mapping) else value for name, value in file.tables.items()}


def _moved(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and name not in _OF_OTHERS:
            moved = _moved(value, folder)
            found[name] = {_path(key, folder): weight for key, weight in moved.items()} if name == "rewards" else moved
        elif name in _PATHS and isinstance(value, str) and name != "source":
            found[name] = _path(value, folder)
        elif name in _PATHS and isinstance(value, list):
            found[name] = [_path(each, folder) if isinstance(each, str) else each for each in value]
        else:
            found[name] = value
    return found


def _path(name: str, folder: Path) -> str:
    if not name or name.startswith(_NO_PATHS):
        return name
    file, colon, rest = name, "", ""
    if ":" in name and not _is_there(folder / name):  # FILE.py:FUNCTION, RUN:STAGE
        file, colon, rest = name.partition(":")
    run = file.rpartition("@")[0] or file  # RUN@STEP
    if any(_is_there(folder / each) for each in (file, run)):
        return str(folder / file) + colon + rest
    if _is_there(Path(file)) or _is_there(Path(run)):
        log.warning("%s is not beside the recipe (%s): the one in the current folder is taken", file, folder)
        return name
    # what can be nothing but a file is named where it was looked for
    return str(folder / file) + colon + rest if _is_file_name(file) else name


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return False


def _is_file_name(name: str) -> bool:
    suffixes = (".jsonl", ".json", ".ndjson", ".gz", ".parquet", ".pq", ".jinja", ".py", ".gguf")
    return name.startswith(("./", "../")) or name.lower().endswith(suffixes)
