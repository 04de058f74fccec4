"""Where a model's name leads: the embedded world, an installed package, a folder, or the hub."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from functools import lru_cache
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from thence.errors import RecipeError, UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d[\d_.]*(?:[eE][+-]?\d+)?|0x[0-9a-fA-F]+|nan|inf|true|false)")
CONNECT_SECONDS = 5.0
LONGEST_HUB_NAME = 96


def find_place(path: str, field: str = "model.path") -> str:
    """The folder of ``world:...`` (embedded world), ``package:...`` (installed package) or ``RUN:STAGE@STEP`` (what a
    run has trained); else the name itself.

    Raises:
        RecipeError: no such base, package or folder, and no name that the hub could have.
        UserError: a run that has no such model.
    """
    if path.startswith("world:"):
        return _base(path, field)
    if path.startswith("package:"):
        return _package(path.removeprefix("package:"), field)
    if (trained := _of_run(path, field)) is not None:
        return trained
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            return str(place)
        is_other = place.exists()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        is_other = False
    if is_other:
        raise RecipeError(
            "a file is no model's folder",
            remedy="give the folder that holds it; of a GGUF file, name it in model.gguf_file",
            file=place,
            field=field,
        )
    if (
        not path.strip()
        or place.is_absolute()
        or len(path) > 96
        or not _HUB_NAME.fullmatch(path)
        or _NUMBER.fullmatch(path)
    ):
        raise RecipeError(
            f"there is no folder {path!r}, and no model on the hub has such a name",
            remedy="give a Hugging Face folder, a hub name (owner/name), RUN:STAGE, world:chain/rich or package:NAME",
            field=field,
        )
    if not _is_reachable() and not _is_kept(path):
        raise RecipeError(
            f"there is no folder {path!r}, and the Hugging Face hub cannot be reached",
            remedy="give a folder, or run where the network is; HF_ENDPOINT names another hub",
            field=field,
        )
    return str(place)


def _of_run(path: str, field: str) -> str | None:
    from thence.train.run_models import BASE, base_of_run, model_of_run

    try:
        if path.endswith(f":{BASE}") and (base := base_of_run(path)) is not None:
            return find_place(base, field)
        found = model_of_run(path)
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return None
    except UserError as error:
        if error.field is None:
            error.rename_field(field)
        raise
    return None if found is None else str(found[0])


def _base(path: str, field: str) -> str:
    folder = Path(str(resources.files("thence.data.worlds"))) / "bases"
    # a folder without weights holds the tokenizer that the bases are pretrained with
    known = {f"world:{p.parent.name.replace('-', '/', 1)}": p.parent for p in sorted(folder.glob("*/tokenizer.json"))}
    if path not in known:
        models = (name for name, place in known.items() if (place / "config.json").is_file())
        raise RecipeError(f"no base {path!r}", remedy=f"use one of {', '.join(models)}", field=field)
    return str(known[path])


def _package(package: str, field: str) -> str:
    try:
        spec = importlib.util.find_spec(package) if all(part.isidentifier() for part in package.split(".")) else None
    except (ImportError, ValueError):  # what is above it is not there, or is no package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package} is not installed",
            remedy=f"pip install {package.replace('_', '-')}" if package.isidentifier() else "give a package's name",
            field=field,
        )
    return str(next(iter(spec.submodule_search_locations)))


def _is_reachable() -> bool:
    """Whether something answers where the hub should be. With a proxy, only a request could tell."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy")):
        return True  # offline, transformers says at once what it has not kept
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    return _answers(address.hostname or "huggingface.co", port)


@lru_cache(maxsize=4)
def _answers(host: str, port: int) -> bool:
    """Whether something listens there: asked once, since an answer may take as long as CONNECT_SECONDS."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _is_kept(name: str) -> bool:
    """Whether the hub's cache holds the model's configuration."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "tokenizer.json"))
