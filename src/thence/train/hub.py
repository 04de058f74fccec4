"""Sends exported files to a repository of the Hugging Face hub. The token is the one of the hub's own login."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thence.errors import UserError, first_line
from thence.redaction import redacted

CARD = "README.md"


def check_repository(name: str) -> None:
    """Raise UserError if this can be no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(
            f"{name!r} cannot be a repository of the hub: {first_line(error)}",
            remedy="give OWNER/NAME",
            field="--push-to-hub",
        ) from None


def push(repository: str, files: Mapping[str, Path], *, exported: Path, public: bool, message: str) -> tuple[str, bool]:
    """Send files to a model repository in one commit. It is made where it is not there.

    A card that the repository has already stays: its owner may have written into it, a licence for example.

    Args:
        repository: OWNER/NAME.
        files: name in the repository -> file.
        exported: the folder or file that was exported, which stays where sending fails.
        public: everyone may see it. A repository that is there keeps what it is.
        message: of the commit.

    Returns:
        The address of the repository, and whether its own card stayed.

    Raises:
        UserError: the hub does not answer or refuses; the repository is public and ``public`` is not set.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        if not public and not api.model_info(repository).private:
            raise UserError(
                f"the repository {repository} is public: everyone would see the model",
                remedy="export to another place with --public, or make the repository private at the hub",
                field="--push-to-hub",
            )
        stays = CARD in files and api.file_exists(repository, CARD)
        sent = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)
            for name, file in files.items()
            if not (stays and name == CARD)
        ]
        api.create_commit(repository, sent, commit_message=message)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many unrelated types: of itself, of httpx, of the system
        raise _refused(repository, exported, public, error) from error
    return address, stays


def _refused(repository: str, exported: Path, public: bool, error: Any) -> UserError:
    # hf upload makes a new repository public unless it is told otherwise
    later = shlex.join(["hf", "upload", repository, str(exported), *([] if public else ["--private"])])
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedies: dict[Any, str] = {
        401: "log in with `hf auth login`, or set HF_TOKEN",
        403: "use a token that may write to it (https://huggingface.co/settings/tokens)",
        404: "check the owner's name, and that the token may write there",
    }
    offline = type(error).__name__ == "OfflineModeIsEnabled"
    remedy = "unset HF_HUB_OFFLINE" if offline else remedies.get(status, "check the connection, and try again")
    return UserError(
        f"the hub did not take {repository}: {redacted(first_line(error))}",
        remedy=f"{remedy}; what was exported is kept, and `{later}` sends it",
        field="--push-to-hub",
    )
