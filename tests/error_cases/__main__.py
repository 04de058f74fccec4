"""Write docs/errors.md; with names of themes: print these."""

from __future__ import annotations

import sys

from .cases import THEMES
from .page import PAGE, outcomes, page

only = [theme for theme in THEMES if theme in sys.argv[1:]]
found = outcomes(only or tuple(THEMES))
for outcome in (one for theme in found.values() for one in theme):
    if outcome.code != outcome.case.code:
        print(f"{outcome.case.title}: exit code {outcome.code}, expected {outcome.case.code}", file=sys.stderr)
if only:
    print(page(found))
else:
    PAGE.write_text(page(found))
    print(f"{PAGE}: {sum(map(len, found.values()))} cases")
