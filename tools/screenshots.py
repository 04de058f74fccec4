"""Writes docs/img/: pages as a browser shows them, at 1280 and 390 pixels, light and dark.

    python tools/screenshots.py                      # the pages of an evaluation, an audit and the kept study
    python tools/screenshots.py NAME=PAGE.html ...   # pages of your own, such as those of runs

It needs Chromium. A picture is the first screen of a page, or with NAME=PAGE.html#PART the part of that id.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "img"
SIZES = ((1280, 900), (390, 844))


def main(pages: list[str]) -> int:
    """Write four pictures of every page."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        photograph(pages or made_pages(Path(folder)))
    return 0


def made_pages(folder: Path) -> list[str]:
    """Pages that need no long run: an evaluation of a shipped base, a made-up audit, the kept study."""
    from tests.audit.made_reports import dropping
    from thence.cli import main as thence
    from thence.pages.audit.page import write_page

    write_page(dropping(), folder / "audit.html")
    asked = ["eval", "world:chain/rich", "--suite", "embedded", "--limit", "100", "--samples", "2"]
    if thence([*asked, "--folder", str(folder / "evaluation")]) != 0:
        raise SystemExit("the evaluation for its picture failed; its message stands above")
    study = ROOT / "studies" / "embedded-world" / "report.html"
    return [
        f"evaluation={folder / 'evaluation' / 'report.html'}",
        f"audit={folder / 'audit.html'}",
        f"comparison={study}#methods-at-equal-flops",
    ]


def photograph(pages: list[str]) -> None:
    """Four pictures of every page."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
