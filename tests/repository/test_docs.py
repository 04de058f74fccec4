"""The pages lead somewhere: links exist, the walk of the architecture names files that exist, the README is short."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", *ROOT.glob("studies/*/*.md")]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path, anchor in LINK.findall(text):
        if "://" in path:
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{path} is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path} has no heading #{anchor}"


def test_the_walk_names_each_file_once_and_all_of_them_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    walk = text[text.index("## From a JSONL row") : text.index("### The step in detail")]
    rows = re.findall(r"^\| (`[^|]+) \|", walk, re.MULTILINE)
    named = Counter(name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row))
    assert len(named) > 25 and set(named.values()) == {1}
    for name in set(re.findall(r"`([\w/]+\.py)`", text)):
        assert (ROOT / "src/thence" / name).exists() or (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    if page.name == "CHANGELOG.md":  # it tells of earlier ones
        return
    for name in set(re.findall(r"\b(?:src|tests|benchmarks|tools|docs|examples)/[\w./-]*\w\.(?:py|sh)\b", text)):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name
    for first, second in set(re.findall(r"(?:`|from )thence\.([a-z_]+)\.(\w+)", text)):
        place = ROOT / "src/thence" / first
        source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        module = place / second
        found = module.is_dir() or module.with_suffix(".py").exists() or second in source.read_text()
        assert found, f"thence.{first}.{second}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
