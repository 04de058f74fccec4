"""Builds the documentation site: the pages of docs/ as static HTML in build/docs. `make docs` runs it.

    python tools/build_site.py [--into FOLDER]

The pages are read as they stand in the repository, where their links work too. They are first copied into a folder for
Sphinx, with their links turned to where the pages lie on the site. The navigation is that of docs/README.md: each of
its headings is a group, each page that a table of it links to is an entry. Every warning of Sphinx is an error, and
then every link and every anchor of the written HTML is followed. The site needs no network.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "tools/site"
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
"""Pages of the site that do not lie in docs/, beside those of the studies."""

_FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(
    r"(?P<code>`+)(?!`).+?(?<!`)(?P=code)(?!`)"  # code within a line comes first, and holds no link
    r"|(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)",
    re.DOTALL,
)


class SiteError(Exception):
    """The site was not built; says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the site. Returns 1 where a page or a link is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "build/docs", help="folder of the site")
    into = parser.parse_args(arguments).into
    try:
        build(into)
    except SiteError as error:
        print(f"the site was not built: {error}", file=sys.stderr)
        return 1
    print(f"{into / 'index.html'}")
    return 0


def build(into: Path) -> None:
    """Write the site into a folder, which is replaced.

    Raises:
        SiteError: a page has no title, Sphinx warns, or a link of the written pages leads nowhere.
    """
    with tempfile.TemporaryDirectory() as place:
        source, made = Path(place) / "source", Path(place) / "site"
        stage(source)
        options = ["-q", "-W", "--keep-going", "-b", "html", "-d", f"{place}/doctrees", "-c", str(SETTINGS)]
        if subprocess.run([sys.executable, "-m", "sphinx", *options, str(source), str(made)]).returncode:
            raise SiteError("Sphinx says above what is wrong")
        if broken := broken_links(made):
            raise SiteError("links lead nowhere:\n" + "\n".join(broken))
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(made, into)


def pages() -> dict[Path, Path]:
    """The pages: where each lies in the repository, and where on the site. Both are relative."""
    inside = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/reports/*.md")]
    found = {page.relative_to(ROOT): page.relative_to(ROOT / "docs") for page in sorted(inside)}
    studies = sorted(page.relative_to(ROOT) for page in ROOT.glob("studies/*/*.md"))
    found |= {page: page for page in [*map(Path, OUTSIDE), *studies]}
    return found | {Path("docs/README.md"): Path("index.md")}


def navigation() -> dict[str, list[Path]]:
    """The groups of docs/README.md with their pages, as they lie in the repository."""
    text = (ROOT / "docs/README.md").read_text()
    groups: dict[str, list[Path]] = {}
    known = pages()
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        links = [link["target"] for link in _LINK.finditer(body) if link["target"]]
        linked = [_target(Path("docs/README.md"), link)[0] for link in links]
        groups[title.strip()] = [page for page in dict.fromkeys(linked) if page in known]
    return groups


def title(page: Path) -> str:
    """The heading of a page of the repository: its first line.

    Raises:
        SiteError: the page does not begin with a heading.
    """
    first = (ROOT / page).read_text().partition("\n")[0]
    if not first.startswith("# "):
        raise SiteError(f"{page}: its first line is no heading ('# ...'), so the page has no title")
    return first[2:].strip()


def stage(source: Path) -> None:
    """Write the pages for Sphinx into a folder."""
    shown = {page for group in navigation().values() for page in group} | {Path("docs/README.md")}
    for page, place in pages().items():
        title(page)  # a page without one stops the build, also where nothing links to it
        text = turned(page, (ROOT / page).read_text(), source)
        if page not in shown:
            text = f"---\norphan: true\n---\n{text}"
        if place == Path("index.md"):
            text += "".join(_toctree(title, group) for title, group in navigation().items())
        (source / place).parent.mkdir(parents=True, exist_ok=True)
        (source / place).write_text(text)


def turned(page: Path, text: str, source: Path) -> str:
    """A page with its links turned to their places on the site. Code stays as it is.

    Args:
        page: where it lies in the repository.
        source: the folder where Sphinx finds the pages.
    """
    known = pages()
    here = (source / known[page]).parent

    def turn(link: re.Match[str]) -> str:
        target = link["target"]
        if target is None or urlsplit(target).scheme or target.startswith("#"):
            return link[0]
        path, anchor = _target(page, target)
        readme = path / "README.md"
        path = readme if readme in known else path
        if path not in known and (ROOT / path).is_dir():
            return f"{link['text']} (`{path}`)" if str(path) not in link["text"] else link["text"]
        place = source / known[path] if path in known else ROOT / path
        text = title(path) if path in known and link["text"] in (path.name, str(path)) else link["text"]
        return f"{link['image']}[{text}]({Path(os.path.relpath(place, here)).as_posix()}{anchor})"

    return _outside_code(text, lambda plain: _LINK.sub(turn, plain))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """A page whose text outside of fenced blocks was changed."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _target(page: Path, target: str) -> tuple[Path, str]:
    """Where a link of a page leads in the repository, and its anchor."""
    path, hash_, anchor = target.partition("#")
    return Path(os.path.normpath(page.parent / path)), f"{hash_}{anchor}"


def _toctree(title: str, group: Sequence[Path]) -> str:
    known = pages()
    names = "\n".join(known[page].with_suffix("").as_posix() for page in group)
    return f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{names}\n```\n"


class _Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                (self.links if tag == "a" else self.loaded).append(value)
            elif name == "id" and value:
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Links of a written site that lead nowhere, or to the network for what a page needs to be shown."""
    read = {}
    for file in sorted(site.rglob("*.html")):
        read[file] = _Page()
        read[file].feed(file.read_text())
    return [found for file, page in read.items() for found in _broken(site, file, page, read)]


def _broken(site: Path, file: Path, page: _Page, read: dict[Path, _Page]) -> Iterator[str]:
    for link in dict.fromkeys([*page.loaded, *page.links]):
        parts = urlsplit(link)
        if parts.scheme or link.startswith("//"):
            if link in page.loaded and parts.scheme != "data":
                yield f"{file.relative_to(site)}: {link}: the page needs the network"
            continue
        target = Path(os.path.normpath(file.parent / unquote(parts.path))) if parts.path else file
        if not target.exists():
            yield f"{file.relative_to(site)}: {link}"
        elif target in read and unquote(parts.fragment) not in read[target].anchors:
            yield f"{file.relative_to(site)}: {link}: the page has no such anchor"


if __name__ == "__main__":
    sys.exit(main())
