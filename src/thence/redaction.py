"""Secrets that stand in addresses, commands and environments, taken out before these are kept or printed.

Three things tell a secret: its form (`hf_...`, `sk-...`, a password before the `@` of an address), the name that it is
given under (`--api-key`, `HF_TOKEN=`, `Authorization:`), and that it is the value of an environment variable with such
a name. Host, path, flag and name stay, so that what is kept can still be read.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN = "[hidden]"
SHORTEST = 8  # characters of an environment's secret that is looked for anywhere in a text

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LAST = re.compile(
    "password|passwd|passphrase|passcode|pwd|secrets?|token|apikey|credentials?|authorization|auth|cookie|pat"
)
_RUN_TOGETHER = ("password", "passwd", "passphrase", "apikey", "apitoken", "accesstoken", "accesskey", "secretkey")
_OF_KEYS = re.compile(
    "api|access|secret|private|account|auth|encryption|license|subscription|signing|client|shared|storage|service|"
    "admin|master|deploy"
)
# words before "token" where it is a piece of text, and no password
_OF_TEXT = re.compile(
    "eos|bos|pad|unk|sep|cls|mask|stop|end|eot|start|begin|image|video|audio|special|think|tool|next|last|first|new|"
    "prompt|response|per|each|every|text|word|sub|byte|prefix|suffix|middle|fim|boi|eoi|vocab|sentinel|any|one|a|the|"
    "of|that|this|no|unexpected|invalid|unknown|trained|is|by"
)
_PROSE = re.compile("none|null|true|false|is|was|for|not|the|a|and|or|of|to|in|on|no|must|has|here|with|remedy:")

# a path made of an address has one slash; limits on lengths keep hostile text from taking long
_USER_INFO = re.compile(r"(?<=:/)(/?)(?:[^\s/?#'\"<>]{0,500}@|[^\s/@:?#'\"<>]{0,100}:(?!\d+[/?#])[^\s@'\"<>]{0,200}@)")
_BARE_USER_INFO = re.compile(
    r"(?<![\w:/@.+-])(?!mailto:)[\w.+-]+:[^\s/@:'\"]+@(?=(?:[\w-]+\.)*[\w-]+(?::\d{2,5}\b|/|\.[a-z]{2,}\b))"
)
_CURL_USER = re.compile(r"(?<!\S)(-u|--user)([ =]+)(['\"]?)[^\s:'\"]+:[^\s'\"]+")
_IN_QUERY = re.compile(r"([?&;#])([\w.~%-]+)=([^&\s#'\"<>]+)")
_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:key|token|secret|auth)|api-key)"
    r"(['\"]?\s*[:=,]\s*+)(?!['\"]?\[hidden\])(?:(['\"])(?:(?!\3).)+|[^'\"\r\n]+)"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)(?=[\w.~+/=-]*[\d.=+/])[\w.~+/=-]{6,}|\b(bearer)(\s+)[\w.~+/=-]{16,}")
_VALUE = r"(?P<value>(?P<q>['\"])(?:(?!(?P=q)).)*|[^\s&;,'\")}\]]+)"
_GIVEN = re.compile(rf"(?<![\w.-])(?P<name>-{{0,2}}[A-Za-z_][\w.-]*)(?P<gap> ?=(?!=) ?){_VALUE}")
_QUOTED_NAME = re.compile(rf"(?P<name>(?P<n>['\"])[\w. -]+(?P=n))(?P<gap>\s*[:=]\s*){_VALUE}")
_AFTER_COLON = re.compile(rf"(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)(?P<gap>:\s+){_VALUE}")
_FLAG = re.compile(
    r"(?<![\w.-])(?P<name>--?[A-Za-z][\w.-]*)(?P<gap>['\"]?,?\s+)"
    r"(?P<value>(?P<q>['\"])(?:(?!(?P=q)).)*|[^\s'\",]+)"
)
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:sk|pk|rk)-(?=[\w-]*\d)[\w-]{16,}|(?:sk|rk)_(?:live|test)_\w{10,}|hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|xox[abeprs]-[\w-]{10,}|xapp-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|gsk_[A-Za-z0-9]{16,}|r8_[A-Za-z0-9]{16,}"
    r"|nvapi-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{16,}|dapi[0-9a-f]{32}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
    r")"
)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_WEBHOOK = re.compile(r"(hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/)[\w/-]+")


def redacted(text: str) -> str:
    """The text without passwords, tokens and keys, each replaced by ``[hidden]``; the rest stands as it was."""
    text = _without_literals(text)
    text = _PRIVATE_KEY.sub(rf"\1{HIDDEN}\2", text)
    text = _WEBHOOK.sub(rf"\1{HIDDEN}", text)
    text = _USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = _BARE_USER_INFO.sub(f"{HIDDEN}@", text)
    text = _CURL_USER.sub(rf"\1\2\3{HIDDEN}", text)
    text = _IN_QUERY.sub(_query, text)
    text = _HEADER.sub(lambda found: f"{found[1]}{found[2]}{found[3] or ''}{HIDDEN}", text)
    text = _BEARER.sub(lambda found: f"{found[1] or found[3]}{found[2] or found[4]}{HIDDEN}", text)
    for pattern in (_GIVEN, _QUOTED_NAME, _FLAG, _AFTER_COLON):
        text = pattern.sub(_named, text)
    return _KNOWN.sub(HIDDEN, text)


def redacted_values(value: Any, name: str = "") -> Any:
    """A plain value (of JSON or TOML) with its secrets hidden; a value under a secret's name is always hidden."""
    if isinstance(value, Mapping):
        return {key: redacted_values(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_values(inner, name) for inner in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else redacted(value)
    return value


def as_typed(argv: Sequence[str]) -> list[str]:
    """The words of a command line as the user typed them, given ``sys.argv``: that has a file in the first place."""
    program = Path(argv[0])
    if program.name == "__main__.py":  # python -m PACKAGE
        return ["python", "-m", program.parent.name, *argv[1:]]
    return [program.name, *argv[1:]]


def redacted_command(argv: Sequence[str]) -> str:
    """A command line as one would type it, without its secrets."""
    words: list[str] = []
    hide = False
    for word in argv:
        if hide and not word.startswith("--"):
            words.append(HIDDEN)
            hide = False
            continue
        flag, equals, value = word.partition("=")
        hide = not equals and word.startswith("-") and is_secret_name(word.lstrip("-"))
        if equals and value and is_secret_name(flag.lstrip("-")):
            words.append(f"{flag}={HIDDEN}")
        else:
            words.append(redacted(word))
    return redacted(shlex.join(words))


def is_secret_name(name: str) -> bool:
    """Whether a flag, variable, field or header of this name holds a secret: `api_key`, `HF_TOKEN`, `dbPassword`.

    `max_tokens`, `tokenizer`, `eos_token`, `author` and `key_variable` do not.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    while words and words[-1].isdigit():
        words.pop()
    if not words:
        return False
    *before, last = words
    if last == "token":
        return not before or not _OF_TEXT.fullmatch(before[-1])
    if last in ("key", "keys"):
        return bool(before) and _OF_KEYS.fullmatch(before[-1]) is not None
    if last == "pass":
        return bool(before) and name.isupper()
    if last in ("value", "id") and before and before[-1] in ("secret", "password"):
        return last == "value"
    return _LAST.fullmatch(last) is not None or last.endswith(_RUN_TOGETHER)


def _query(found: re.Match[str]) -> str:
    name = found[2]
    secret = is_secret_name(name) or name.lower() in ("key", "sig", "signature", "pass", "pw", "code")
    secret = secret or name.lower().endswith(("-signature", "_signature"))
    return f"{found[1]}{name}={HIDDEN}" if secret else found[0]


def _named(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    bare = value.strip("'\"")
    if (
        not bare
        or bare.startswith(HIDDEN[:-1])
        or _PROSE.fullmatch(bare.lower())
        or not is_secret_name(name.strip("'\"-"))
    ):
        return found[0]
    spaced = found.re is _GIVEN and " " in found["gap"] and not found["q"]
    if (spaced or found.re is _AFTER_COLON) and not _is_like_a_secret(name, bare):
        return found[0]
    if found.re is _FLAG and (bare.startswith("--") or (not name.startswith("--") and len(name) < 4)):
        return found[0]
    return f"{name}{found['gap']}{found['q'] or ''}{HIDDEN}"


def _is_like_a_secret(name: str, value: str) -> bool:
    """After a colon or " = " stands prose or code too ("unexpected token: foo").

    A compound name, or letters with digits, tell a secret.
    """
    if "_" in name or "-" in name or name.lower().startswith(("pass", "pwd", "secret", "apikey")):
        return True
    if value.startswith(("<", "[")):  # a special token of a tokenizer
        return False
    return len(value) >= SHORTEST and any(map(str.isdigit, value)) and any(map(str.isalpha, value))


def _without_literals(text: str) -> str:
    """The text without the values of this process's secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value in text and is_secret_name(name) and not value.startswith("/"):
            text = text.replace(value, HIDDEN)
    return text
