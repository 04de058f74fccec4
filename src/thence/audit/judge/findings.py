"""What the audit can say, in words for somebody who has never read the paper: findings.toml, read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from thence.toml import parse_toml


@dataclass(frozen=True)
class FindingText:
    """One thing that can be found.

    Args:
        title: its name.
        meaning: what it does to training, one sentence.
        remedy: what to change, one sentence.
        says: the fault as a clause, "... was asked for, but in 2 cases <says>".
    """

    title: str
    meaning: str
    remedy: str
    says: str = ""


CATALOGUE: Mapping[str, FindingText] = {
    key: FindingText(**texts)
    for key, texts in parse_toml((resources.files("thence.audit.judge") / "findings.toml").read_text("utf-8")).items()
}
"""By id."""
