"""Text from elsewhere (models, data, servers, file names), before it goes to a terminal or into an error message.

A terminal obeys what it is sent: an escape sequence can clear the screen, change its title or hide what was printed,
and a mark of direction can turn a line around. On a page, where markup is escaped, the same characters are shown by
:func:`visible`.
"""

from __future__ import annotations

import re
import unicodedata

KEPT = frozenset("\n\t")
_OBEYED = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))  # control, format, surrogate, unassigned, separators
_JOINERS = frozenset("\u200c\u200d")  # needed to write Persian, Hindi and emoji; they move no cursor
_MARKS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")  # Arabic, with a glyph
_TO_LOOK_AT = re.compile(r"[^ -~\n\t]")


def clean(text: str) -> str:
    r"""The text with every character that a terminal would obey, or that has no glyph, as ``\x1b`` or ``\u202e``.

    Line ends and tabs stay; the printable text of every script stays. Lone surrogates cannot be encoded, so they are
    written out too. The result can always be printed as UTF-8.
    """
    return _TO_LOOK_AT.sub(lambda found: _written(found[0]), text)


def one_line(text: str, limit: int | None = None) -> str:
    """:func:`clean` with line ends written out too, cut to ``limit`` characters."""
    flat = clean(text).replace("\n", "\\n").replace("\t", "\\t")
    return flat if limit is None or len(flat) <= limit else flat[: max(0, limit - 1)] + "…"


def visible(text: str) -> str:
    """Text for a page: without characters that a page cannot hold or that change how it is read.

    Control characters become their pictures (U+2400 and up), marks of writing direction and all else that has no glyph
    their code points in brackets, and lone surrogates the replacement character. Line ends and tabs stay.
    """
    return _TO_LOOK_AT.sub(lambda found: _pictured(found[0]), text)


def _pictured(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0xD800 <= code <= 0xDFFF or 0x80 <= code < 0xA0:
        return "\ufffd"
    return character if _written(character) == character else f"[U+{code:04X}]"


def _written(character: str) -> str:
    if character in KEPT or character in _JOINERS or character in _MARKS:
        return character
    if unicodedata.category(character) not in _OBEYED:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
