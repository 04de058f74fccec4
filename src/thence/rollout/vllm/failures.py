"""What went wrong in vLLM, in words of the user: from its exception, its exit code or the end of its log."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from thence.errors import UserError
from thence.foreign_text import one_line
from thence.redaction import redacted
from thence.rollout.vllm.settings import CHILD, INSTALL, PYTHON_VARIABLE

TAIL_LINES = 12
_LESS_MEMORY = "give it less work at a time (vllm.max_rows, vllm.kv_cache_gb, vllm.max_model_len) or a smaller dtype"

# Pattern of vLLM's or torch's message, and the remedy. The first that fits is taken.
_KNOWN = (
    (
        r"max seq len|larger than the available KV cache|No available memory for the cache blocks",
        "the cache for keys and values is too small: raise vllm.kv_cache_gb or lower vllm.max_model_len",
    ),
    (
        r"out of memory|can't allocate memory|MemoryError|Available memory on node|Free memory on device",
        f"there is too little memory: {_LESS_MEMORY}",
    ),
    (r"No module named 'vllm'|ImportError", f"{INSTALL}: vllm.python or {PYTHON_VARIABLE}"),
    (r"max_model_len .* is greater than|derived max_model_len", "lower vllm.max_model_len to what the model allows"),
    (r"rchitectures? .* (is|are) not supported|not supported for now", "use the native sampler for this model"),
    (r"a message of .* can be sent", "ask for fewer prompts, or shorter ones, at a time"),
    (r"wrong token", "give thence and the server the same token"),
    (r"\bbusy:", "wait until the server's other client is done, or start another server on another port"),
    (r"other weights", "push weights before sampling, and let no other run use the same server"),
)


class EngineFailed(UserError):
    """vLLM ended, hangs, or says what it should not; another one may do better."""


def failure(problem: str, *, log: Path | None, detail: str = "", code: int | None = None) -> EngineFailed:
    """An error with the remedy that fits, and the end of the log.

    Args:
        problem: what happened, the start of a sentence.
        log: where vLLM's output went; None: to the terminal of a server.
        detail: vLLM's own message.
        code: how the process ended, negative for a signal; None: it has not.
    """
    ending = "" if code is None else f" ({_ending(code)})"
    first = one_line(redacted(detail.strip().splitlines()[0]), 400) if detail.strip() else ""
    tail = _tail(log)
    shown = f"\n  end of its log:\n{tail}" if tail else ""
    return EngineFailed(
        f"{problem}{ending}{': ' + first if first else ''}{shown}", remedy=_remedy(detail or tail, code, log)
    )


def _remedy(text: str, code: int | None, log: Path | None) -> str:
    for pattern, remedy in _KNOWN:
        if re.search(pattern, text):
            return remedy
    if code == -signal.SIGKILL:
        return f"the system kills what needs too much memory: {_LESS_MEMORY}; then run the same command again"
    where = "the log" if log is not None else "the terminal of the server"
    return f"look at {where}; try {CHILD} --port PORT by hand; or use the native sampler"


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _tail(log: Path | None) -> str:
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return "\n".join(
        "    " + one_line(redacted(line), 300) for line in [line for line in lines if line.strip()][-TAIL_LINES:]
    )
