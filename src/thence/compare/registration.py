"""The design of a comparison as it was registered before the first reported run, and how it was amended later.

The kept records tell whether anybody has changed them: each design stands beside its SHA-256, and each amendment says
which fields it changed. This finds a slip and a change by hand. It is no proof against somebody who writes a new hash
too, so the hash should also stand where it cannot be changed: in a commit, an issue, a message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thence.records import Record


@dataclass(frozen=True)
class FieldChange(Record):
    """A field of a design with its value before and after; None: it was not there."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.old)} → {_short(self.new)}"


@dataclass(frozen=True)
class Amendment(Record):
    """A change of a registered design.

    Args:
        time: when, UTC.
        reason: why, in the words of whoever made it.
        commit: of thence's source tree.
        finished: reported runs that were finished by then.
        changes: the fields that changed.
        design: the design from then on.
        sha256: of this design.
    """

    time: str
    reason: str
    commit: str
    finished: int
    changes: tuple[FieldChange, ...]
    design: Mapping[str, Any]
    sha256: str


@dataclass(frozen=True)
class Registration(Record):
    """A design that was written down before the first reported run.

    Args:
        time: when, UTC.
        commit: of thence's source tree; empty outside a checkout.
        sha256: of the design in its canonical form.
        design: all that decides what is run and how it is judged.
        amendments: later changes, in order.
    """

    time: str
    commit: str
    sha256: str
    design: Mapping[str, Any]
    amendments: tuple[Amendment, ...] = ()

    @property
    def in_force(self) -> Mapping[str, Any]:
        """The design with all amendments."""
        return self.amendments[-1].design if self.amendments else self.design

    @property
    def sha256_in_force(self) -> str:
        """Its hash."""
        return self.amendments[-1].sha256 if self.amendments else self.sha256


def sha256_of(design: Mapping[str, Any]) -> str:
    """64 hex digits of a design's canonical form: JSON, keys sorted, no spaces, whole numbers without a point."""
    text = json.dumps(_plain(design), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    """The fields in which two designs differ, by name. A dotted name holds names with dots in quotes."""
    before, now = dict(_leaves(_plain(old))), dict(_leaves(_plain(new)))
    fields = sorted({*before, *now})
    # a bool is no number here, though True == 1 in Python
    changed = [name for name in fields if json.dumps(before.get(name)) != json.dumps(now.get(name))]
    return tuple(FieldChange(name, before.get(name), now.get(name)) for name in changed)


def what_was_altered(registration: Registration) -> str:
    """What in a kept registration does not fit the rest of it; empty: nothing."""
    if sha256_of(registration.design) != registration.sha256:
        return f"the registered design is not the one of its hash {registration.sha256[:12]}"
    before = registration.design
    for number, amendment in enumerate(registration.amendments, start=1):
        if sha256_of(amendment.design) != amendment.sha256:
            return f"the design of amendment {number} is not the one of its hash {amendment.sha256[:12]}"
        if differences_of(before, amendment.design) != amendment.changes:
            return f"the fields of amendment {number} are not those in which the designs before and after it differ"
        before = amendment.design
    return ""


def what_is_not_registered(
    design: Mapping[str, Any],
    reference: str,
    covariate: Mapping[str, Any],
    contrasts: Sequence[Mapping[str, Any]],
    seeds: Mapping[str, Sequence[int]],
) -> str:
    """Which of the fields that kept results are judged by is not the registered one; empty: none.

    A design says nothing of fields that a later version has added, so only those that it has are compared.

    Args:
        design: in force.
        seeds: of each base.
    """
    shared = design.get("seeds")
    planned = {base: table.get("seeds", shared) for base, table in design.get("bases", {}).items()}
    held = {"reference": reference, "covariate": covariate, "contrasts": list(contrasts), "seeds of the bases": seeds}
    asked = {"covariate": {}, "contrasts": [], **design, "seeds of the bases": planned}
    return next((name for name, value in held.items() if not _has(_plain(value), _plain(asked.get(name)))), "")


def _has(held: Any, asked: Any) -> bool:
    """Whether a value is the one asked for, or a table with all its fields."""
    if isinstance(asked, Mapping) and isinstance(held, Mapping) and asked:
        return all(_has(held.get(key), value) for key, value in asked.items())
    if isinstance(asked, list) and isinstance(held, list):
        return len(asked) == len(held) and all(map(_has, held, asked))
    return asked is None or json.dumps(held) == json.dumps(asked)


def _plain(value: Any) -> Any:
    """Values that JSON has: whole floats as integers, what is not finite as text, tuples as lists, no null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value if value - value == 0 else str(value)
    return value


def _leaves(table: Mapping[str, Any], under: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = under + quoted(key)
        if isinstance(value, Mapping):
            found += _leaves(value, f"{name}.")
        else:
            found.append((name, value))
    return found


def quoted(key: str) -> str:
    """A key as a dotted name holds it."""
    return f'"{key}"' if "." in key else key


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
