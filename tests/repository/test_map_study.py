"""The study of studies/map: its files belong together, and its look at responses is right about them."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from thence.compare.result import read_results
from thence.data.worlds.chain import problems

MAP = Path(__file__).parents[2] / "studies" / "map"


def script(name: str) -> ModuleType:
    """A script of the study as a module."""
    spec = importlib.util.spec_from_file_location(f"map_{name}", MAP / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_comparisons_beside_the_study_are_those_that_variants_writes() -> None:
    made = script("variants").made_from(tomllib.loads((MAP / "study.toml").read_text()))
    assert len(made) == 7
    for comparison in made:
        file = MAP / f"{comparison['name'].removeprefix('map-')}.toml"
        assert tomllib.loads(file.read_text()) == comparison, f"{file.name}: run python studies/map/variants.py"


def test_no_seed_of_a_comparison_beside_the_study_is_one_of_the_study() -> None:
    study = tomllib.loads((MAP / "study.toml").read_text())
    own = {seed for base in study["bases"].values() for seed in base["seeds"]} | set(study["tuning"]["seeds"])
    for comparison in script("variants").made_from(study):
        others = {seed for base in comparison["bases"].values() for seed in base["seeds"]}
        assert others and not others & own


@pytest.mark.parametrize("split", ["train", "ood"])
def test_an_expert_makes_no_mistake_and_its_habit_is_found(split: str) -> None:
    habits = script("habits")
    found = {}
    for problem in problems(split, 400, seed=3):
        said = problem.demonstration.removesuffix("$")
        assert habits.mistake_of(problem.prompt, said) == "", (problem.prompt, said)
        found.setdefault(habits.habit_of(said.partition("#")[0]), said)
    assert set(found) == {"head", "terse", "written", "written, split products", "slow"}


@pytest.mark.parametrize(
    ("response", "mistake"),
    [
        ("47a+8=55b-3=52c*6=12#12", ""),
        ("47a+8=55b-3=52c*6:00+12=12#12", ""),
        ("47a+8=55c*6=30#30", "step left out"),
        ("47a+8=55b-3=52#52", "step left out"),
        ("47a+8=55b-3=52c*6=13#13", "wrong product"),
        ("47a+8=56b-3=53c*6=18#18", "wrong sum or difference"),
        ("47a+8=55b-3=52c*6=12d+1=13#13", "steps too many"),
        ("47a+8=55b-3=52c*6=12#21", "another last value"),
        ("47a+8=55b-3=52c*6=12", "another last value"),
        ("#13", "in the head"),
    ],
)
def test_the_first_mistake_of_a_response_is_named(response: str, mistake: str) -> None:
    assert script("habits").mistake_of("47a+8b-3c*6?", response) == mistake


@pytest.mark.parametrize(
    ("thirds", "expect", "verdict"),
    [
        ([(0.3, 0.2, 0.4), (0.2, 0.1, 0.3), (0.2, 0.1, 0.3)], "higher", "holds"),
        ([(0.3, 0.2, 0.4), (0.2, 0.1, 0.3), (0.0, -0.1, 0.1)], "higher", "holds on average"),
        ([(0.5, 0.4, 0.6), (0.3, 0.2, 0.4), (-0.2, -0.3, -0.1)], "higher", "depends on skill"),
        ([(-0.3, -0.4, -0.2), (-0.2, -0.3, -0.1), (-0.2, -0.3, -0.1)], "higher", "refuted"),
        ([(0.0, -0.1, 0.1), (0.0, -0.1, 0.1), (0.0, -0.1, 0.1)], "higher", "not told apart"),
        ([(0.0, -0.1, 0.1), (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)], "no higher", "not refuted"),
        ([(0.3, 0.2, 0.4), (0.2, 0.1, 0.3), (0.2, 0.1, 0.3)], "no higher", "refuted"),
    ],
)
def test_a_claim_is_said_to_hold_where_all_thirds_of_skill_say_so(
    thirds: list[tuple[float, float, float]], expect: str, verdict: str
) -> None:
    claims = script("claims")
    parts = [claims.Part(20, *third) for third in thirds]
    whole = claims.Part(60, *(sum(values) / 3 for values in zip(*thirds, strict=True)))
    assert claims.verdict_of(claims.Claim("it is", "sft", ("rl",), "dev", expect), whole, parts) == verdict


def test_claims_are_not_looked_at_before_all_runs_are_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    claims, finished = script("claims"), read_results(MAP / "pilot")
    monkeypatch.setattr(claims, "read_results", lambda path: replace(finished, pending=3))
    monkeypatch.setattr(sys, "argv", ["claims.py", str(MAP / "pilot"), "--out", str(tmp_path / "claims.csv")])
    with pytest.raises(SystemExit, match="3 runs are not finished, and claims are looked at once"):
        claims.main()
    assert not list(tmp_path.iterdir())


def test_responses_that_were_counted_stay_when_their_folders_are_gone(tmp_path: Path) -> None:
    habits, out = script("habits"), tmp_path / "habits.json"
    run = {"arm": "sft", "base": "low", "seed": 3}
    (tmp_path / "results.json").write_text(json.dumps({"runs": [run]}))
    with pytest.raises(SystemExit, match="sft from low, seed 3 is not there"):
        habits.merged(tmp_path, out)
    kept = {"base": "low", "seed": 3, "entropy": 0.5}
    out.write_text(json.dumps({"sft": [kept]}))
    assert habits.merged(tmp_path, out) == {"sft": [kept]}
