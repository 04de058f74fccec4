"""A headless Chromium for tests, and what a page did in it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    """The system's Chromium; ``THENCE_BROWSER`` names another."""
    named = os.environ.get("THENCE_BROWSER")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Visit:
    """An open page, and all that it said or asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        """The text of the first element that fits."""
        return self.page.locator(selector).first.inner_text()


def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for what a page does after a click: charts, opened details and links act a moment later."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"the page did not do this within {seconds} seconds"
        time.sleep(0.02)


@contextmanager
def visit(browser: Any, path: Path | str, anchor: str = "", **look: Any) -> Iterator[Visit]:
    """Open a page as a user would, wait until its scripts are done, and close it.

    Args:
        browser: of playwright.
        path: the page: a file, or an address.
        anchor: what follows ``#``.
        look: of the context: viewport, color_scheme and so on.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **look})
    page = context.new_page()
    page.set_default_timeout(5000)
    found = Visit(page)
    page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (found.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: found.requests.append(request.url))
    try:
        address = path if isinstance(path, str) else path.resolve().as_uri()
        page.goto(address + (f"#{anchor}" if anchor else ""))
        if page.locator(".chart").count():
            page.wait_for_selector("html[data-charts=drawn]", state="attached")
        if page.locator("#held-samples").count():
            page.wait_for_selector("html[data-samples=shown]", state="attached")
        yield found
    finally:
        context.close()
