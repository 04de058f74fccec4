"""The documentation site: all pages are on it, links are turned, and what is wrong stops the build."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import build_site


def test_every_page_of_docs_is_in_the_navigation() -> None:
    shown = {page for group in build_site.navigation().values() for page in group}
    pages = {page.relative_to(ROOT) for page in ROOT.glob("docs/*.md")} - {Path("docs/README.md")}
    assert len(pages) > 20 and not pages - shown
    assert len(build_site.navigation()) >= 3


def test_every_page_begins_with_its_title(tmp_path: Path) -> None:
    assert len({build_site.title(page) for page in build_site.pages()}) > 40
    (page := tmp_path / "table.md").write_text("| a |\n| --- |\n# not the first line\n")
    with pytest.raises(build_site.SiteError, match=r"table.md: its first line is no heading"):
        build_site.title(page)


def test_links_lead_to_where_pages_and_files_lie_on_the_site(tmp_path: Path) -> None:
    text = "\n".join(
        [
            "[running.md](running.md#install) [here](#top) [web](https://example.org/a.md)",
            "[how](../CONTRIBUTING.md) [bench](../benchmarks/README.md#on-a-gpu) ![picture](token-weights.svg)",
            "[code](../src/thence/files.py) [folder](../examples/own_method) `[a](running.md)`",
            "```",
            "[block](running.md)",
            "```",
        ]
    )
    source = tmp_path / "source"
    lines = build_site.turned(Path("docs/python.md"), text, source).splitlines()
    assert lines[0] == "[Running](running.md#install) [here](#top) [web](https://example.org/a.md)"
    assert lines[1].startswith("[how](CONTRIBUTING.md) [bench](benchmarks/README.md#on-a-gpu) ![picture](")
    found = re.findall(r"\]\(([^)]+)\)", "\n".join(lines[1:3]))
    assert [(source / link).resolve() for link in found[2:4]] == [
        ROOT / "docs/token-weights.svg",
        ROOT / "src/thence/files.py",
    ]
    assert lines[2].endswith("folder (`examples/own_method`) `[a](running.md)`")
    assert lines[3:] == ["```", "[block](running.md)", "```"]


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="#gone"></a><a href="b.html#end"></a><a href="c.html"></a>'
        '<a href="https://example.org"></a><script src="https://example.org/x.js"></script><img src="b.png">'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#top"></a><h2 id="start"></h2>')
    assert build_site.broken_links(tmp_path) == [
        "a.html: https://example.org/x.js: the page needs the network",
        "a.html: b.png",
        "a.html: #gone: the page has no such anchor",
        "a.html: b.html#end: the page has no such anchor",
        "a.html: c.html",
    ]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_its_links_lead_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    assert build_site.main(["--into", str(site)]) == 0, capfd.readouterr().err
    for page, place in build_site.pages().items():
        written = (site / place.with_suffix(".html")).read_text()
        assert build_site.title(page).split("`")[0].split("'")[0] in written, page
    index = (site / "index.html").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f'href="{page.stem}.html"' in index, page.name
    # what is wrong stops the build, and the site that was there stays
    turned = build_site.turned
    monkeypatch.setattr(build_site, "turned", lambda *given: turned(*given) + "\n[gone](#no-such-heading)\n")
    assert build_site.main(["--into", str(site)]) == 1
    assert "no-such-heading" in capfd.readouterr().err
    assert (site / "index.html").read_text() == index
