"""200 bad inputs from a seed: no traceback, no nonsense accepted, no change by a refusal; and that this can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

import thence.cli
from tests.bad_inputs import harness
from tests.bad_inputs.flags import bad_flags
from tests.bad_inputs.ground import Ground, make_ground
from tests.bad_inputs.harness import campaign, counted, one
from tests.bad_inputs.kinds import KINDS

QUICK = {name: make for name, make in KINDS.items() if name != "comparison-folder"}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield make_ground(tmp_path_factory.mktemp("bad") / "ground", with_comparison=False)
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


@pytest.mark.slow
def test_200_bad_inputs_are_refused_or_survived(ground: Ground, tmp_path: Path) -> None:
    result = counted(campaign(QUICK, ground, tmp_path, range(200), seed=1))
    assert result["cases"] == 200
    new = [failed for failed in result["failures"] if not failed["known"]]
    assert not new, "\n".join(f"{f['reproduce']}: {f['input']}: {f['wrong']}" for f in new)


def test_a_case_is_the_same_again(ground: Ground, tmp_path: Path) -> None:
    first = one(KINDS, "recipe-field", 3, ground, tmp_path, seed=7)
    assert first == one(KINDS, "recipe-field", 3, ground, tmp_path, seed=7)


def _flag_cases(ground: Ground, folder: Path) -> set[str]:
    done = campaign({"flags": bad_flags}, ground, folder, range(30), seed=0, tell=lambda text: None)
    failures = counted(done)["failures"]
    return {wrong.split(":")[0] for failed in failures for wrong in failed["wrong"]}


def put_in_place_of(monkeypatch: pytest.MonkeyPatch, command: str, act: Callable[..., int]) -> None:
    """Let a command be something else, which takes its command line unread."""
    real = thence.cli._command
    monkeypatch.setattr(thence.cli, "_command", lambda name: act if name == command else real(name))


def test_an_exception_that_nobody_explains_is_found(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise KeyError("mutant")

    put_in_place_of(monkeypatch, "sample", broken)
    assert _flag_cases(ground, tmp_path) == {"blamed on thence"}


def test_accepted_nonsense_is_found(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place_of(monkeypatch, "report", lambda argv: 0)
    assert _flag_cases(ground, tmp_path) == {"nonsense was accepted"}


def test_a_refusal_that_changes_a_file_is_found(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(argv: object) -> int:
        Path("recipe.toml").write_text("")
        return 2

    put_in_place_of(monkeypatch, "run", writes)
    assert _flag_cases(ground, tmp_path) == {"refused, but changed on disk"}


def test_a_process_that_would_end_is_found(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(argv: object) -> int:
        raise RuntimeError("left")

    monkeypatch.setattr(harness, "main", leaves)
    assert _flag_cases(ground, tmp_path) == {"escaped"}
