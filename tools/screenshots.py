"""Writes docs/img/: pages as a browser shows them, at 1280 and 390 pixels, light and dark.

    python tools/screenshots.py NAME=PAGE.html ...

It needs Chromium. A picture is the first screen of a page, or with NAME=PAGE.html#PART the part of that id.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "img"
SIZES = ((1280, 900), (390, 844))


def main(pages: list[str]) -> int:
    """Write four pictures of every page."""
    sys.path.insert(0, str(ROOT))
    from playwright.sync_api import sync_playwright

    from tests.pages.browser import chromium, visit

    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for given in pages:
            name, _, place = given.partition("=")
            path, _, part = place.partition("#")
            for width, height in SIZES:
                for scheme in ("light", "dark"):
                    look = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
                    with visit(browser, Path(path), part, **look) as found:
                        found.page.wait_for_timeout(200)
                        found.page.screenshot(path=FOLDER / f"{name}-{width}-{scheme}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
