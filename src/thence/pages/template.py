"""The one Jinja environment: every page extends ``base.html`` and is a single file that loads nothing.

All text is escaped, and passes through :func:`thence.foreign_text.visible` where it is put into the page.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from thence.foreign_text import visible
from thence.pages.figure import DARK, LIGHT, SVG_DASHES

if TYPE_CHECKING:
    from jinja2 import Environment


def render(kind: str, **values: Any) -> str:
    """A page as HTML.

    Args:
        kind: the folder whose ``page.html`` is filled.
        values: what the template names; one that is not given is an error.

    Raises:
        jinja2.UndefinedError: the template names a value that was not given.
    """
    return _environment().get_template(f"{kind}/page.html").render(**values)


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
    environment.globals.update(light=LIGHT, dark=DARK, dashes=SVG_DASHES)
    return environment
