"""Files that a user names: read whole, or refused with what they are. Nothing here waits for a pipe or fills memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from thence.errors import RecipeError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of_file(path: Path) -> str | None:
    """What a path is where it is no regular file: a folder, a pipe, a device, a socket; None: a regular file.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: it cannot be looked at.
    """
    try:
        return KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except ValueError as error:  # a NUL in the name
        raise FileNotFoundError(str(error)) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FileNotFoundError(error.strerror) from None
        raise


def read_given(path: Path, what: str, *, most: int, field: str | None = None) -> str:
    """The text of a file that a user names, as UTF-8; a byte order mark at its start is left out.

    Args:
        what: what the file is, for errors.
        most: the largest size in bytes.
        field: the field or flag that names it.

    Raises:
        FileNotFoundError: nothing is there.
        RecipeError: no regular file, too large, not readable, or not UTF-8.
    """
    try:
        kind = kind_of_file(path)
    except (FileNotFoundError, NotADirectoryError):
        if _is_link(path):
            raise RecipeError(
                "a link that leads nowhere", remedy="give the file itself", file=path, field=field
            ) from None
        raise
    except OSError as error:
        is_loop = error.errno == errno.ELOOP
        problem = "a link that leads back to itself" if is_loop else f"cannot be opened: {error.strerror or error}"
        raise RecipeError(problem, remedy="give a file that you may read", file=path, field=field) from None
    if kind is not None:
        raise RecipeError(f"{kind} is no file, and {what} is one", remedy="give a file", file=path, field=field)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise RecipeError(problem, remedy="give a file that you may read", file=path, field=field) from None
    if len(content) > most:
        raise RecipeError(
            f"larger than {most / 2**20:g} MiB, which {what} never is",
            remedy=f"give {what}, not data or weights",
            file=path,
            field=field,
        )
    return _decoded(content, path, field)


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _decoded(content: bytes, path: Path, field: str | None) -> str:
    remedy = "save the file as UTF-8 (iconv -f OLD -t UTF-8 FILE > NEW), and name the new one"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError("the file is UTF-16 text, not UTF-8", remedy=remedy, file=path, line=1, field=field)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"not UTF-8 text: byte 0x{content[error.start]:02x}"
        raise RecipeError(problem, remedy=remedy, file=path, line=line, field=field) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise RecipeError("a binary file, not text", remedy="give a text file", file=path, line=line, field=field)
    return text


def folder_place(path: Path, field: str) -> Path:
    """A path at which a folder is, or can be made.

    Raises:
        RecipeError: a file stands there or above it, or the name cannot be one.
    """
    for place in (path, *path.parents):
        try:
            mode = os.lstat(place).st_mode if place == path else place.stat().st_mode
        except FileNotFoundError:
            if place == path and place.is_symlink():
                raise RecipeError(
                    "a link that leads nowhere", remedy="give another folder", file=place, field=field
                ) from None
            continue
        except NotADirectoryError:
            continue  # the file above it is told when its turn comes
        except (OSError, ValueError) as error:
            problem = f"cannot be a folder: {getattr(error, 'strerror', None) or error}"
            raise RecipeError(problem, remedy="give another folder", file=str(place), field=field) from None
        if not stat.S_ISDIR(mode) and not place.is_dir():
            what = KINDS.get(stat.S_IFMT(mode), "a file")
            raise RecipeError(
                f"a folder is needed here, and this is {what}", remedy="give another folder", file=place, field=field
            )
        break
    return path
