"""Writes src/thence/pages/vega/: Vega, Vega-Lite and Vega-Embed as one script for pages. `make vega` runs it.

    python tools/vega_bundle.py

The script comes out of the package vl-convert-python, in the version that constraints.txt pins, and needs no network.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import vl_convert

FOLDER = Path(__file__).resolve().parent.parent / "src" / "thence" / "pages" / "vega"
SNIPPET = "window.vegaEmbed = vegaEmbed;"
"""All that a page calls."""


def bundle() -> str:
    """The script, an ES module. Raises ValueError where it could end the element that holds it."""
    text = vl_convert.javascript_bundle(SNIPPET)
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("the bundle cannot stand in a page: it holds an end tag or the beginning of a comment")
    return text


def versions() -> str:
    """Which versions the script holds, a line each."""
    lite = vl_convert.get_vegalite_versions()[-1]
    return (
        f"Vega {vl_convert.get_vega_version()}\nVega-Lite {lite}\nVega-Embed {vl_convert.get_vega_embed_version()}\n"
        f"from vl-convert-python {metadata.version('vl-convert-python')}\n"
    )


def main() -> int:
    """Write the script and its versions."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "vega.js").write_text(bundle(), encoding="utf-8")
    (FOLDER / "VERSIONS").write_text(versions(), encoding="utf-8")
    print(versions(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
