"""`thence serve` in a real browser: the list of pages, a page that grows, and nobody else asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pages.browser import chromium, visit
from tests.pages.served.test_server import known_run
from thence.pages.served.server import PageServer
from thence.pages.served.shelf import Shelf

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: install one, or name it in THENCE_BROWSER")
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server, and the run that it shows."""
    run = known_run(tmp_path / HOSTILE, steps=3)
    with PageServer(Shelf((run,)), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", run
        server.shutdown()
        thread.join()


def test_the_list_leads_to_a_page_that_grows_with_its_run(browser: Any, served: tuple[str, Path]) -> None:
    address, run = served
    with visit(browser, address) as found:
        assert HOSTILE in found.text("body"), "a hostile name stays text"
        found.page.get_by_role("link").first.click()
        page = found.page.frame_locator("#page")
        page.get_by_text("3 steps").first.wait_for()
        with (run / "metrics.jsonl").open("a") as file:
            line = {"stage": "rl", "kind": "rl", "step": 4, "reward": 0.7, "seconds": 1.0}
            file.write(json.dumps(line) + "\n")
        page.get_by_text("4 steps").first.wait_for()
        assert found.said == []
        assert found.requests and all(asked.startswith(address) for asked in found.requests)


@pytest.mark.slow
def test_a_page_that_is_switched_to_stay_stays(browser: Any, served: tuple[str, Path]) -> None:
    address, run = served
    with visit(browser, f"{address}show/0") as found:
        page = found.page.frame_locator("#page")
        page.get_by_text("3 steps").first.wait_for()
        found.page.get_by_label("update").uncheck()
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "rl", "kind": "rl", "step": 4, "reward": 0.7, "seconds": 1.0}) + "\n")
        found.page.wait_for_timeout(2500)
        assert page.get_by_text("3 steps").count() and not page.get_by_text("4 steps").count()
        found.page.get_by_label("update").check()
        page.get_by_text("4 steps").first.wait_for()
