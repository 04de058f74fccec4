"""What both sides of the vLLM engine share beside the form of their messages: names, and the digest of weights.

`child.py` loads this file where thence is not installed, so it needs the standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

PROTOCOL = 3
TOKEN_VARIABLE = "THENCE_VLLM_TOKEN"


def weights_digest(folder: str | Path) -> str:
    """16 hex digits of the sha256 over the names and bytes of a folder's safetensors files."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def weight_files(folder: str | Path) -> list[Path]:
    """A folder's safetensors files in order. Raises FileNotFoundError when there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file in {folder}")
    return files
