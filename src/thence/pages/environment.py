"""Where something was run, as a page says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LABELS = {
    "model": "model",
    "weights": "weights (fingerprint)",
    "parameters": "parameters",
    "dtype": "dtype",
    "endpoint": "server",
    "context": "context, tokens",
    "thence": "thence",
    "git_commit": "git commit",
    "python": "Python",
    "torch": "torch",
    "transformers": "transformers",
    "vllm": "vLLM",
    "platform": "platform",
    "cpu": "CPU",
    "threads": "threads",
    "device": "device",
    "started": "started",
}


def environment_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value of what is known."""
    return [(label, str(environment[key])) for key, label in _LABELS.items() if environment.get(key) not in (None, "")]
