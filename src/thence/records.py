"""Files of thence's own (JSON, TOML), read as the records that were written."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict

from thence.errors import DamagedFile, RecipeError
from thence.files import read_json, read_own_toml
from thence.settings.validation import validated

T = TypeVar("T")


class Record:
    """Base of dataclasses that are kept as JSON. When they are read, a key that is none of their fields is refused."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def read_record(path: Path, kind: type[T], *, remedy: str) -> T:
    """A JSON or TOML file that thence wrote, as the record that it was.

    Args:
        kind: a dataclass or a section of settings.
        remedy: what to do where the file is damaged.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it is there and cannot be read, or a field is missing, unknown or of another type.
    """
    plain = (read_own_toml if path.suffix == ".toml" else read_json)(path, remedy=remedy)
    try:
        return validated(kind, plain, strict=False)
    except RecipeError as error:
        where = f"{error.field}: " if error.field else ""
        problem = f"not what thence wrote: {where}{error.problem}"
        raise DamagedFile(problem, remedy=remedy, file=path) from None
