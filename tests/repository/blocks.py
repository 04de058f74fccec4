"""The code of the pages: fenced blocks with their marks, and the commands of thence in them and in the text.

An HTML comment on the line before a block says what a test does with it:

    <!-- run -->               Python that the test runs, in order with the others of its page
    <!-- file: NAME -->        what a reader saves under this name
    <!-- not run: REASON -->   why no test runs it; it must still compile, and what it imports must be there
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "benchmarks/README.md",
        *ROOT.glob("studies/*/*.md"),
        *ROOT.glob("examples/*/*.md"),
    ]
)
GENERATED = {"errors.md", "commands.md"}
"""Pages whose commands their programs have run, or print as forms."""
SHELLS = ("", "sh", "bash", "console", "yaml")
"""Languages of blocks that may hold commands; a block without a language is one or a message."""
_OPENS = re.compile(r"^( *)(`{3,})(\w*) *$")
_MARK = re.compile(r"^ *<!-- (run|file|not run)(?:: (.+?))? -->$")
_CALLS = re.compile(r"^(?:[^#]*?[\s/:(])??thence(?= [a-z-])")
_INLINE = re.compile(r"(?<!`)`(thence\s+[a-z][^`]*)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        line: that of its first line.
        mark: run, file, not run, or empty.
        said: the file's name or the reason.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    said: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of a page in order."""
    lines = (page.read_text() if text is None else text).splitlines()
    found, at = [], 0
    while at < len(lines):
        opened = _OPENS.match(lines[at])
        if not opened:
            at += 1
            continue
        indent, fence, language = opened.groups()
        end = next(k for k in range(at + 1, len(lines)) if lines[k].strip() == fence)
        mark = _MARK.match(lines[at - 1]) if at else None
        body = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end]) + "\n"
        kind, said = (mark[1], mark[2] or "") if mark else ("", "")
        found.append(Block(page, at + 2, language, body, kind, said))
        at = end + 1
    return found


def commands_of(page: Path, text: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every command of thence that a page shows, in blocks and in the text: its place, and its words after `thence`."""
    text = page.read_text() if text is None else text
    for block in blocks_of(page, text):
        lines = re.sub(r"\\\n", "  ", block.text).splitlines() if block.language in SHELLS else []
        for shown in (part for line in lines for part in re.split(r"&&|;", line)):
            if called := _CALLS.match(shown):
                yield block.place, words(shown[called.end() :])
    outside = re.sub(r"^ *(`{3,})\w* *$.*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    for shown in _INLINE.findall(outside):
        yield str(page.relative_to(ROOT)), words(" ".join(shown.split())[len("thence ") :])


def words(text: str) -> list[str]:
    """The arguments of a command, as a shell would give them, up to where the command ends."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found = []
    for word in lexer:
        if set(word) <= set(";|&<>"):
            break
        found.append(word)
    return found
