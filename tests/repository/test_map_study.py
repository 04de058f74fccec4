"""The study of studies/map: its files belong together, and its look at responses is right about them."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from thence.compare.result import Comparison, read_results
from thence.compare.statistics import statistics
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
        (
            [(0.2, 0.1, 0.3), (0.0, -0.2, 0.1), (-0.1, -0.2, 0.1)],
            "higher",
            "not told apart",
        ),  # one third proves nothing
        ([(0.2, 0.1, 0.3), (-0.4, -0.5, -0.3), (-0.1, -0.4, 0.1)], "higher", "depends on skill"),
        ([(-0.3, -0.4, -0.2), (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)], "higher", "refuted on average"),
        ([(0.0, -0.01, 0.01), (0.0, -0.02, 0.02), (0.0, -0.01, 0.01)], "no higher", "holds"),
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


@pytest.mark.parametrize("name", ["claims", "tables", "diagnostic", "figure"])
def test_nothing_is_looked_at_before_all_runs_are_finished(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, finished = script(name), read_results(MAP / "pilot")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "read_results", lambda path: replace(finished, pending=3))
    out = ["--out", str(tmp_path / "claims.csv")] if name == "claims" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(MAP / "pilot"), *out])
    with pytest.raises(SystemExit, match=r"3 runs are not finished, and \w+ are\s+looked at once"):
        module.main()
    assert not list(tmp_path.iterdir())


def piloted() -> Comparison:
    """The pilot with the covariate and the contrasts of the study, as far as it has their arms."""
    study, pilot = tomllib.loads((MAP / "study.toml").read_text()), read_results(MAP / "pilot")
    arms = {arm.name for arm in pilot.arms}
    contrasts = [
        c
        for c in study["contrasts"]
        if {c["arm"], *([c["other"]] if isinstance(c["other"], str) else c["other"])} <= arms
    ]
    return replace(pilot, covariate=study["covariate"], contrasts=tuple(contrasts))


def test_the_tables_say_what_each_contrast_decided_and_where_the_order_turns() -> None:
    tables, found = script("tables"), statistics(piloted(), replicates=20)
    counts = {"responses": 10, "tokens": 300, "mistakes": {"step left out": 4}}
    counts |= {"habits": {"written, split products": 8}, "right": {"written, split products": 2}}
    strong = {**counts, "mistakes": {"step left out": 8}}
    lines = [
        {"base": base, "seed": seed, "entropy": 0.25, "in-distribution": of, "out-of-distribution": of}
        for base, seed in found.comparison.blocks
        for of in [strong if base == "none" else counts]  # not one of the better half
    ]
    arms = [arm.name for arm in found.comparison.arms]
    text = tables.written(found, dict.fromkeys(arms, lines))
    verdict = "| primary | higher | +22.1 [+12.9, +30.8] | 0.031 | 1 | 8 | **held** |"
    assert f"| Correct SFT beats SFT with the published bugs {verdict}" in text
    assert "| SFT, then RL | 13.4 | 1.6 | 87.6 | 66.0 | 88.9 | 86.2 | 75.8 | 84.0 |" in text  # by level
    turned = next(line for line in text.splitlines() if line.startswith("| RL | in distribution |"))
    assert turned.endswith("| none in the range not ruled out: [below 0, 8], [46, above 62] |"), turned
    assert "| SFT | 40.0 | 80.0 | 25.0 | 30 | 40.0 | 80.0 | 25.0 | 30 | 0.25 |" in text
    with pytest.raises(SystemExit, match=r"habits.json lacks sft from .*: run habits.py"):
        tables.written(found, {**dict.fromkeys(arms, lines), "sft": lines[:-1]})


@pytest.mark.parametrize("new", [1, 4])
def test_the_interval_for_new_blocks_holds_as_many_as_it_says(new: int) -> None:
    replicated, random = script("replicated"), np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        skill = random.uniform(0, 0.7, 30 + new)
        values = 0.2 - 0.5 * skill**2 + random.normal(0, 0.1, 30 + new)
        should = replicated.expected(skill[new:].tolist(), values[new:].tolist(), skill[:new].tolist())
        inside += should.low <= values[:new].mean() <= should.high
    assert 930 <= inside <= 970


def test_a_replication_of_the_same_blocks_has_their_differences(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replicated, pilot = script("replicated"), read_results(MAP / "pilot")
    monkeypatch.setattr(replicated, "HERE", tmp_path)
    monkeypatch.setattr(replicated, "KEPT", MAP / "pilot")
    monkeypatch.setattr(replicated, "read_results", lambda folder: pilot)
    monkeypatch.setattr(sys, "argv", ["replicated.py"])
    replicated.main()
    lines = (tmp_path / "replication.md").read_text().splitlines()
    found = next(line for line in lines if line.startswith("| SFT, then RL less RL alone | top"))
    accuracy = {run.arm: run.measured[0].accuracy for run in pilot.runs if run.base == "top"}
    assert found.split("|")[-3].strip() == f"{100 * (accuracy['sft-then-rl'] - accuracy['rl']):+.1f}"
    assert sum("seed" in line for line in lines) == 4 * len(pilot.blocks)
    means = [line.split("|")[-3].strip() for line in lines if f"| mean of {len(pilot.blocks)} |" in line]
    single = [float(line.split("|")[-3]) for line in lines if line.startswith("| SFT, then RL less RL alone |")]
    assert len(means) == 4 and float(means[2]) == pytest.approx(np.mean(single[:-1]), abs=0.1)


def test_a_comparison_beside_the_study_is_told_by_level_and_beside_rl_alone() -> None:
    beside, pilot = script("beside"), read_results(MAP / "pilot")
    column = pilot.columns[0]
    rows = {line.split("|")[1].strip(): line for line in beside.section(pilot, column).splitlines()}
    of = {(run.arm, run.base): run.measured[0].accuracy for run in pilot.runs}
    levels = [base for base, _ in pilot.blocks]
    cells = [cell.strip() for cell in rows["SFT, then RL"].split("|")[2:-1]]
    assert cells[:-1] == [f"{100 * of['sft-then-rl', level]:.1f}" for level in levels]
    mean = sum(of["sft-then-rl", level] - of["rl", level] for level in levels) / len(levels)
    assert cells[-1].startswith(f"{100 * mean:+.1f} [")
    assert rows["RL"].rstrip(" |").endswith("-")
    assert beside.solved(replace(pilot.runs[0].measured[0], right=[0, 1, 2, 0], samples=2)) == 0.5


def test_other_demonstrations_are_told_beside_those_of_the_study() -> None:
    beside, kept = script("beside"), read_results(MAP / "demonstrations")
    column = next(column for column in kept.columns if column.split == "in-distribution")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in beside.paired(kept, column).splitlines()]
    cells = {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
    of = {(run.arm, run.base, run.seed): run.measured[0].accuracy for run in kept.runs}
    assert kept.runs[0].measured[0].column == column and len(kept.blocks) == 9

    def mean(one: str, other: str) -> str:
        differences = [of[one, *block] - of[other, *block] for block in kept.blocks]
        return f"{100 * sum(differences) / len(differences):+.1f} ["

    assert cells["SFT, then RL less SFT, then RL of the study"]["hasty"].startswith(
        mean("sft-then-rl-hasty", "sft-then-rl")
    )
    of_same = cells["SFT, then RL less LUFFY, of the same demonstrations"]
    assert of_same["wrong"].startswith(mean("sft-then-rl-wrong", "luffy-wrong"))
    assert of_same["256"] == "-"  # there is no such arm
    assert {
        cell
        for line in beside.paired(read_results(MAP / "pilot"), column).splitlines()[2:]
        for cell in line.split("|")[2:-1]
    } == {" - "}


def test_other_settings_are_told_beside_the_study_by_level() -> None:
    beside, half = script("beside"), read_results(MAP / "half")
    lines = beside.leads({"study": read_results(MAP), "half": half}, "out-of-distribution").splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == ["faint", "fair", "good", "top"]
    column = next(place for place, m in enumerate(half.runs[0].measured) if m.column.split == "out-of-distribution")
    of = {(run.arm, run.base): run.measured[column].accuracy for run in half.runs}
    assert cells["good"][1] == f"{100 * (of['sft-then-rl', 'good'] - of['rl', 'good']):+.1f}"
    leads = [float(cell[0]) for cell in cells.values()]
    assert leads == sorted(leads, reverse=True)  # of the study: the better the base, the worse


def test_bases_are_grouped_by_the_problems_that_no_sample_solves() -> None:
    diagnostic, pilot = script("diagnostic"), read_results(MAP / "pilot")
    bases = {f"{base}/seed{seed}": {"accuracy": 0.2, "never_solved": 0.4} for base, seed in pilot.blocks}
    bases["none/seed900"] = {"accuracy": 0.0, "never_solved": 1.0}
    bases["top/seed907"] = {"accuracy": 0.6, "never_solved": 0.0}
    lines = diagnostic.table(pilot, bases).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| 90 to 100", "1", "0"],
        ["| 30 to 60", "6", "20"],
        ["| 0 to 10", "1", "60"],
    ]
    assert lines[2].split(" | ")[3] == "+13 (+13 to +13)" and lines[4].split(" | ")[3] == "-2 (-2 to -2)"


def test_a_base_that_is_gone_is_not_left_out_of_the_diagnostic(tmp_path: Path) -> None:
    diagnostic, out = script("diagnostic"), tmp_path / "diagnostic.json"
    out.write_text(json.dumps({"low/seed3": {"accuracy": 0.2, "never_solved": 0.4}}))
    assert list(diagnostic.all_measured(tmp_path, [("low", 3)], out)) == ["low/seed3"]
    with pytest.raises(SystemExit, match="the base low/seed4 is not there"):
        diagnostic.all_measured(tmp_path, [("low", 3), ("low", 4)], out)
    begun = tmp_path / "bases" / "low" / "seed4-01234567" / "stages" / "sft-pretrain"
    begun.mkdir(parents=True)
    assert diagnostic.base_of(tmp_path, ("low", 4)) is None  # it is being pretrained
    (begun / "done.json").write_text("{}")
    assert diagnostic.base_of(tmp_path, ("low", 4)) == begun.parents[1]


def test_responses_that_were_counted_stay_when_their_folders_are_gone(tmp_path: Path) -> None:
    habits, out = script("habits"), tmp_path / "habits.json"
    run = {"arm": "sft", "base": "low", "seed": 3, "folder": "runs/low/seed3/sft-01234567"}
    (tmp_path / "results.json").write_text(json.dumps({"runs": [run]}))
    with pytest.raises(SystemExit, match="sft from low, seed 3 is not there"):
        habits.merged(tmp_path, out)
    kept = {"base": "low", "seed": 3, "entropy": 0.5}
    out.write_text(json.dumps({"sft": [kept]}))
    assert habits.merged(tmp_path, out) == {"sft": [kept]}
