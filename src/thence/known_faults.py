"""Known training faults of other packages, with versions and sources: known_faults.toml, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from thence.toml import parse_toml


@dataclass(frozen=True, slots=True)
class KnownFault:
    """One entry of known_faults.toml; the file says what the fields mean."""

    id: str
    package: str
    level: str
    fault: str
    symptom: str
    settings: str
    remedy: str
    confirmed: str
    sources: tuple[str, ...]
    affected: str | None = None
    findings: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def hits(self, version: str) -> bool:
        """Whether an installed version is affected. A version that is not PEP 440 is not judged."""
        if self.affected is None:
            return False
        try:
            return Version(version) in SpecifierSet(self.affected, prereleases=True)
        except InvalidVersion:
            return False

    def could_be(self, options: Mapping[str, Any]) -> bool:
        """Whether a case with these options has the settings of the fault; what it does not say is no obstacle."""
        return all(options.get(name, values[0]) in values for name, values in self.options.items())


def load_known_faults() -> tuple[KnownFault, ...]:
    """The known faults that ship with the package."""
    text = (resources.files("thence") / "known_faults.toml").read_text(encoding="utf-8")
    entries = parse_toml(text)["fault"]
    lists = ("sources", "findings", "adapters")
    return tuple(KnownFault(**entry | {key: tuple(entry.get(key, ())) for key in lists}) for entry in entries)
