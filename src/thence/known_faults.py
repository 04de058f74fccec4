"""Training faults of other packages that are publicly known, with versions and sources: known_faults.toml, read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

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

    def hits(self, version: str) -> bool:
        """Whether an installed version is affected. A version that is not PEP 440 is not judged."""
        if self.affected is None:
            return False
        try:
            return Version(version) in SpecifierSet(self.affected, prereleases=True)
        except InvalidVersion:
            return False


def load_known_faults() -> tuple[KnownFault, ...]:
    """The known faults that ship with the package."""
    text = (resources.files("thence") / "known_faults.toml").read_text(encoding="utf-8")
    entries = parse_toml(text)["fault"]
    return tuple(
        KnownFault(**entry | {key: tuple(entry.get(key, ())) for key in ("sources", "findings")}) for entry in entries
    )
