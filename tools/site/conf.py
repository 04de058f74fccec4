"""Settings of Sphinx for the documentation site. `tools/build_site.py` runs it."""

from __future__ import annotations

import tomllib
from pathlib import Path

_PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]

project = "thence"
release = _PROJECT["version"]
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_static"]

# the anchors that GitHub gives to headings, so that a link works on both
myst_heading_anchors = 6

html_theme = "furo"
html_title = f"thence {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["token-weight.js"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
templates_path = []
# the plain highlighter: a block is a shell session, a message or a file, and says so itself
highlight_language = "none"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
