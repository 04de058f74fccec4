"""The shape of vLLM's messages. A malformed message is reported at once, not as an error of thence later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

from thence.rollout.native import Response

LARGEST_TOKEN = 2**31


def checked_ready(about: dict[str, Any]) -> dict[str, Any]:
    """What vLLM says about itself. Raises ValueError."""
    for name in ("dtype", "model"):
        if not isinstance(about.get(name), str):
            raise ValueError(f"its {name} is {_short(about.get(name))}")
    if not _whole(about.get("max_model_len"), 1):
        raise ValueError(f"its max_model_len is {_short(about.get('max_model_len'))}")
    checked_stamp(about.get("stamp"))
    return about


def checked_stamp(stamp: Any) -> list[Any]:
    """Version and digest of weights. Raises ValueError."""
    version, digest = stamp if isinstance(stamp, list) and len(stamp) == 2 else (None, None)
    if not _whole(version, -1) or not isinstance(digest, str):
        raise ValueError(f"a stamp of weights that is {_short(stamp)}")
    return [version, digest]


def checked_probe(reply: dict[str, Any], length: int) -> list[float]:
    """Log-probabilities of the probe's tokens. Raises ValueError."""
    checked_stamp(reply.get("stamp"))
    logps = reply.get("probe_logps")
    if not isinstance(logps, list) or len(logps) != length or not all(map(_number, logps)):
        raise ValueError(f"the probe's log-probabilities are {_short(logps)}")
    return [float(value) for value in logps]


def checked_response(message: dict[str, Any], left: set[int], limits: Sequence[int]) -> tuple[int, Response]:
    """The number and the response of a message that says it is done.

    Args:
        left: numbers of the responses that have not come yet.
        limits: most tokens of each response.

    Raises:
        ValueError: a number that was not asked for or has come; too many tokens, or none; no token ids, numbers of
            log-probabilities.
    """
    number, ids, logps = message["done"], message.get("token_ids"), message.get("logps")
    if not _whole(number, 0) or number not in left:
        raise ValueError(f"a response of number {_short(number)}, which is not awaited")
    checked_stamp(message.get("stamp"))
    if not isinstance(ids, list) or not all(_whole(token, 0) and token < LARGEST_TOKEN for token in ids):
        raise ValueError(f"token ids that are {_short(ids)}")
    if not 0 < len(ids) <= limits[number]:
        raise ValueError(f"a response of {len(ids)} tokens, asked for were 1 to {limits[number]}")
    if not isinstance(logps, list) or not all(isinstance(value, (int, float)) for value in logps):
        raise ValueError(f"log-probabilities that are {_short(logps)}")
    return number, Response(ids, logps, cast(Literal["stop", "length"], message.get("finish")))


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    try:
        return repr(value)[:60]
    except (RecursionError, ValueError):  # deep nesting; a number of thousands of digits
        return "too deeply nested to show"
