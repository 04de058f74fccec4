"""docs/errors.md is what the program says; every bad input there has its exit code, a remedy, and changes nothing."""

from __future__ import annotations

import re

import pytest

from tests.error_cases.cases import THEMES
from tests.error_cases.page import PAGE, SECRET, Outcome, outcomes, page

pytestmark = pytest.mark.slow
TITLES = [case.title for cases in THEMES.values() for case in cases]


@pytest.fixture(scope="module")
def found() -> dict[str, list[Outcome]]:
    """Every case, run once."""
    return outcomes()


@pytest.fixture(scope="module")
def by_title(found: dict[str, list[Outcome]]) -> dict[str, Outcome]:
    return {outcome.case.title: outcome for of_theme in found.values() for outcome in of_theme}


def test_the_page_is_what_the_program_says(found: dict[str, list[Outcome]]) -> None:
    assert page(found) == PAGE.read_text(), "python -m tests.error_cases writes the page"


def test_there_are_many_and_each_has_a_title_of_its_own() -> None:
    assert len(TITLES) == len(set(TITLES)) >= 80


@pytest.mark.parametrize("title", TITLES)
def test_a_bad_input_has_its_exit_code_a_remedy_and_changes_nothing(title: str, by_title: dict[str, Outcome]) -> None:
    outcome = by_title[title]
    assert outcome.code == outcome.case.code, outcome.said
    assert "Traceback" not in outcome.said
    assert bool(re.search(r"^ +remedy: \S", outcome.said, re.MULTILINE)) == outcome.case.remedy, outcome.said
    assert SECRET not in outcome.said and "\x1b" not in outcome.said
    for name, before in outcome.before.items():
        if not outcome.case.writes:
            assert outcome.after.get(name) == before, name
        elif "/" not in name:
            assert outcome.after.get(name) == before, f"{name} is not of the run"
    new = set(outcome.after) - set(outcome.before)
    assert outcome.case.writes or not new, f"a refused command wrote {sorted(new)}"
