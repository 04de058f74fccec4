"""Writes `docs/trust.md` from `docs/trust.toml` and the figures in `benchmarks/results`. `make trust` runs it.

python tools/trust_page.py
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured yet"
MOST_VALUES = 8  # of a file of figures that has no sentence of its own
_VALUE = re.compile(r"\{([^{}]+)\}")
HEAD = """\
# What thence promises, and how each promise is tested

Each promise has tests that fail when it is broken (`make test` runs them, `make test-all` with all their cases and the
slowest ones) and, if it is also measured, the last
figure. What is trusted and what is not: [SECURITY.md](../SECURITY.md). `make trust` writes this page from
`docs/trust.toml` and `benchmarks/results`.
"""


def main() -> int:
    """Write the page."""
    parts = tomllib.loads((ROOT / "docs/trust.toml").read_text())["part"]
    (ROOT / "docs/trust.md").write_text(page(parts, ROOT / "benchmarks/results"))
    print("docs/trust.md")
    return 0


def page(parts: Sequence[Mapping[str, Any]], results: Path) -> str:
    """The page as Markdown.

    Args:
        parts: those of `docs/trust.toml`.
        results: folder with the figures.
    """
    blocks = [HEAD]
    for part in parts:
        blocks.append(f"## {part['title']}\n")
        blocks += [_promise(promise, results) for promise in part["promise"]]
    return "\n".join(blocks)


def measured(promise: Mapping[str, Any], results: Path) -> str | None:
    """The figure of a promise in words; None: it has none.

    Raises:
        ValueError: the file holds no JSON object.
    """
    if "figure" not in promise:
        return None
    file = results / promise["figure"]
    if not file.exists():
        return NOT_MEASURED
    figures = json.loads(file.read_text())
    if not isinstance(figures, dict):
        raise ValueError(f"{file} is no JSON object")
    try:
        words = _VALUE.sub(lambda found: _shown(_value(figures, found[1])), promise["measured"])
    except KeyError:  # no sentence, or one about values that the file does not have
        words = _plain(figures)
    day = f", {figures['date'][:10]}" if isinstance(figures.get("date"), str) else ""
    return f"{words} (`benchmarks/results/{promise['figure']}`{day})"


def _promise(promise: Mapping[str, Any], results: Path) -> str:
    lines = [f"### {promise['says']}\n"]
    lines += [f"- [`{test.split('::')[1]}`](../tests/{test.split('::')[0]})" for test in promise["tests"]]
    if not promise["tests"]:
        lines.append("- No test in CI holds this; it is measured by a script.")
    figure = measured(promise, results)
    return "\n".join([*lines, *([] if figure is None else [f"- Measured: {figure}"])]) + "\n"


def _value(figures: Mapping[str, Any], path: str) -> Any:
    value: Any = figures
    for name in path.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(path)
        value = value[name]
    return value


def _plain(figures: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    return ", ".join(
        f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in list(numbers.items())[:MOST_VALUES]
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


if __name__ == "__main__":
    sys.exit(main())
