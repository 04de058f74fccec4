"""The one Jinja environment: every page extends ``base.html`` and is a single file that loads nothing.

All text is escaped, and passes through :func:`thence.foreign_text.visible` where it is put into the page. The only
scripts are those of this package; their digests stand in the page's content security policy, so no other can run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from thence.foreign_text import visible
from thence.pages.figure import BORDERS, DARK, LIGHT
from thence.pages.samples import components_text

if TYPE_CHECKING:
    from jinja2 import Environment

CONTENTS, SCRIPTS, POLICY = "<!--contents-->", "<!--scripts-->", "<!--policy-->"
"""Where ``base.html`` has room for what depends on the rest of the page; escaped text cannot hold them."""
_LEAST_CONTENTS = 3
"""Sections from which a list of contents is of use."""


def render(kind: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        kind: the folder whose ``page.html`` is filled; a ``page.js`` beside it runs in the page.
        values: what the template names; one that is not given is an error.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    text, contents = _with_contents(_environment().get_template(f"{kind}/page.html").render(**values))
    scripts = _scripts(kind, text)
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    bodies = "\n".join(f'<script type="module">{script}</script>' for script in scripts)
    return text.replace(CONTENTS, contents, 1).replace(POLICY, f"; script-src {digests}", 1).replace(SCRIPTS, bodies, 1)


def _with_contents(text: str) -> tuple[str, str]:
    """The page with a name for every heading of a section, and the list of contents that leads there."""
    found: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        title = match[1]
        slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<[^>]*>|&[^;]*;", "", title).lower()).strip("-") or "section"
        number = 2
        unique = slug
        while unique in found:
            unique, number = f"{slug}-{number}", number + 1
        found[unique] = title
        return f'<h2 id="{unique}">{title}</h2>'

    text = re.sub(r"<h2>(.*?)</h2>", name, text, flags=re.DOTALL)
    if len(found) < _LEAST_CONTENTS:
        return text, ""
    links = "".join(f'<li><a href="#{slug}">{title}</a></li>' for slug, title in found.items())
    return text, f'<nav class="contents" aria-label="Contents"><ul>{links}</ul></nav>'


def _scripts(kind: str, text: str) -> list[str]:
    """The scripts that a page needs: Vega only where there is a chart."""
    names = ["scripts/tables.js"]
    if 'class="chart"' in text:
        names += ["vega/vega.js", "scripts/charts.js"]
    if 'id="held-samples"' in text:
        names.append("scripts/samples.js")
    found = [_file(name) for name in names]
    own = resources.files("thence.pages") / kind / "page.js"
    return [*found, _file(f"{kind}/page.js")] if own.is_file() else found


@cache
def _file(name: str) -> str:
    return (resources.files("thence.pages") / name).read_text(encoding="utf-8").strip()


@cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("thence.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # not Markup, which is escaped already
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.globals.update(light=LIGHT, dark=DARK, borders=BORDERS, components_text=components_text)
    return environment
