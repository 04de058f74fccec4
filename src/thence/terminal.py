"""The one console that thence draws with: its tables, bars and styles; foreign text has no effect.

Square brackets and colons mean nothing in a string (no markup, no emoji), and every character that a terminal would
obey is written out before it is styled. For styled text of our own: ``rich.text.Text`` or ``Text.from_markup``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

from thence.foreign_text import clean
from thence.redaction import redacted


class CleanConsole(Console):
    """A rich console whose text passes through :func:`thence.redaction.redacted` and :func:`thence.foreign_text.clean`.

    Args:
        verbatim: leave out ``redacted``: for what a model or a data set says, which is shown as it is.
    """

    def __init__(self, *, verbatim: bool = False, **options: Any):
        super().__init__(**options)
        self._verbatim = verbatim

    @property
    def file(self) -> IO[str]:
        """The stream beneath the guard of :mod:`thence.streams`: the escapes that come now are our own."""
        file = super().file
        while (beneath := getattr(file, "rich_proxied_file", None) or getattr(file, "beneath", None)) is not None:
            file = beneath
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render with every piece of text cleaned; control codes that rich itself makes stay."""
        if isinstance(renderable, str):
            renderable = clean(renderable if self._verbatim else redacted(renderable))
        elif isinstance(renderable, Text):
            if not self._verbatim and (said := redacted(renderable.plain)) != renderable.plain:
                renderable = Text(said, renderable.style)
            renderable = cleaned(renderable)
        for segment in super().render(renderable, options):
            if segment.control or (said := clean(segment.text)) == segment.text:
                yield segment
            else:
                yield Segment(said, segment.style)


def make_console(*, verbatim: bool = False, **options: Any) -> CleanConsole:
    """The console of a command, see :class:`CleanConsole`. Further options are rich's."""
    return CleanConsole(verbatim=verbatim, **{"markup": False, "emoji": False, "highlight": False, **options})


def cleaned(text: Text) -> Text:
    """A styled text, cleaned, with its styles."""
    if clean(text.plain) == text.plain:
        return text
    bad = [at for at, character in enumerate(text.plain) if clean(character) != character]
    parts = text.divide(sorted({cut for at in bad for cut in (at, at + 1)}))
    whole = text.blank_copy()
    for part in parts:
        said = clean(part.plain)
        if said == part.plain:
            whole.append_text(part)
        else:
            styles = [span.style for span in part.spans]
            shown = Text(said, part.style)
            for style in styles:
                shown.stylize(style)
            whole.append_text(shown)
    return whole


@contextmanager
def logging_to(shown: Console, level: int = logging.INFO) -> Iterator[None]:
    """Print what thence logs on a console for the time being."""
    logger = logging.getLogger("thence")
    handler = RichHandler(console=shown, show_path=False, show_time=False, markup=False)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
