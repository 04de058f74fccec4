"""What a command says while PyTorch and transformers are imported, which takes 5 to 25 seconds on a cold machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from thence.streams import before_next_output

SLOW = {"torch": "PyTorch", "transformers": "transformers"}
"""Packages that take seconds, and their names."""
LISTS = ("methods", "doctor", "schema")


@contextmanager
def loading_shown(arguments: Sequence[str]) -> Iterator[None]:
    """Say on standard error which slow package is imported, as soon as it is.

    On a terminal the line stays until something else is written, and then goes away. Elsewhere there is one plain line
    for the whole command, and none from a command that only lists. With --quiet or --json nothing is said, nor by any
    rank but the first.
    """
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    silent = "--quiet" in own or ("--json" in own and own[0] != "audit")  # there it is a file to write
    if silent or os.environ.get("RANK", "0") != "0":
        yield
        return
    loaded = any(name in sys.modules for name in SLOW)  # by whoever called main: what is left takes no time
    finder = _Finder(lines=arguments[0] not in LISTS and not loaded)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.meta_path.remove(finder)
        finder.clear()


class _Finder:
    """Is asked for every module that is not imported yet, and has the slow ones told when they begin and end."""

    def __init__(self, lines: bool) -> None:
        self.within, self.told, self.shown = False, not lines, ""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if self.within or package not in SLOW:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader, SLOW[package])
        return spec

    def _watch(self, loader: Any, title: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader is as it was for everybody else
            self.within = True
            self._say(f"loading {title} ...")
            try:
                execute(module)
            finally:
                self.within = False

        loader.exec_module = exec_module

    def _say(self, text: str) -> None:
        stream: Any = sys.stderr
        if hasattr(stream, "rich_proxied_file"):  # a live picture is on the screen, and says what happens
            return
        stream = getattr(stream, "stream", stream)  # carriage returns are taken out above it
        if stream.isatty():
            self.clear()
            self.shown = text
            _write(stream, text)
            before_next_output(self.clear)
        elif not self.told:
            self.told = True
            _write(stream, f"{text}\n")

    def clear(self) -> None:
        """Take the line off the terminal."""
        text, self.shown = self.shown, ""
        if text:
            _write(getattr(sys.stderr, "stream", sys.stderr), f"\r{' ' * len(text)}\r")


def _write(stream: Any, text: str) -> None:
    with suppress(OSError):  # the command finds out, if it has something to say
        stream.write(text)
        stream.flush()
