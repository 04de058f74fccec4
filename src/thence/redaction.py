"""Secrets that stand in addresses, commands and environments, taken out before these are kept or printed."""

from __future__ import annotations

import re

HIDDEN = "[hidden]"
_SECRET_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|api[_-]?key|access[_-]?key|auth|credential|signature)[\w.-]*"
)
_USER_INFO = re.compile(r"(?<=://)[^\s/@?#]*:?[^\s/@?#]*@")
_IN_QUERY = re.compile(rf"(?i)([?&;](?:{_SECRET_NAME}|key|sig)=)[^&\s#'\"]+")
_HEADER = re.compile(r"(?i)\b(authorization\s*[:=]\s*(?:bearer|basic)?\s*|bearer\s+)[^\s'\",]+")
_KNOWN = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,})"
)


def redacted(text: str) -> str:
    """The text without user names and passwords of URLs, keys in queries, bearer tokens and keys of known forms."""
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    return _KNOWN.sub(HIDDEN, text)
