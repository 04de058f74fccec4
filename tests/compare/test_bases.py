"""Bases of a comparison: their own settings and seeds, values tuned on another base, and runs block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compare.small import Quiet, tables
from thence.cli import main
from thence.compare.collect import origin_of
from thence.compare.engine import compare
from thence.compare.plan import PlannedRun, Planner, Selection, pretraining_tables
from thence.compare.preflight import refuse_what_cannot_run
from thence.compare.recipe import load_comparison
from thence.compare.result import RESULTS, Comparison, read_results
from thence.errors import UserError
from thence.toml import to_toml


def with_bases(folder: Path, **changes: Any) -> dict[str, Any]:
    """The small comparison with a base that is only tuned on, and two that use its values."""
    own = tables(folder, **changes)
    recipe = str(folder / "base.toml")
    own["bases"] = {
        "middle": {"recipe": recipe, "seeds": []},
        "weak": {"recipe": recipe, "settings": {"sft-pretrain.steps": 1}, "seeds": [3], "tuned_on": "middle"},
        "strong": {
            "recipe": recipe,
            "settings": {"data.source": ["world:chain?wrong=0.5"], "data.limit": 24},
            "seeds": [4],
            "tuned_on": "middle",
        },
    }
    return own


class Recorder(Quiet):
    """Keeps in which order runs begin, and which had ended by then."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[PlannedRun, set[PlannedRun]]] = []

    def started(self, job) -> None:
        self.begun.append((job.run, set(self.finished_runs)))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, Recorder]:
    folder = tmp_path_factory.mktemp("bases")
    watcher = Recorder()
    arms = {name: arm for name, arm in tables(folder)["arms"].items() if name in ("sft", "base")}
    recipe = load_comparison(with_bases(folder, arms=arms, reference="sft", budget={"tokens": 1500}))
    return folder, compare(recipe, jobs=2, watcher=watcher), watcher


@pytest.mark.slow
def test_a_base_has_its_own_seeds_and_one_with_none_is_only_tuned_on(done) -> None:
    _, result, watcher = done
    assert not watcher.failures and result.pending == 0
    assert {(run.arm, run.base, run.seed) for run in result.runs} == {
        (arm, base, seed) for arm in ("base", "sft") for base, seed in (("weak", 3), ("strong", 4))
    }
    assert {(run.base, run.seed) for run in result.tuning_runs} == {("middle", 100)}
    assert dict(result.base_seeds) == {"middle": (), "weak": (3,), "strong": (4,)} and result.seeds == (3, 4)


@pytest.mark.slow
def test_values_that_were_tuned_on_another_base_are_used(done) -> None:
    _, result, _ = done
    assert {t.base for t in result.tries} == {"middle"} and len(result.tries) == 2
    best = next(t.settings for t in result.tries if t.chosen)
    assert [run.settings for run in result.runs if run.arm == "sft"] == [best, best]


@pytest.mark.slow
def test_settings_reach_the_pretraining_and_make_other_bases(done) -> None:
    folder, result, _ = done
    recipe = load_comparison(with_bases(folder))
    made = {name: pretraining_tables(recipe, PlannedRun("", name, 3)) for name in recipe.bases}
    assert [made[name]["sft-pretrain"]["steps"] for name in made] == [2, 1, 2]
    assert made["strong"]["data"]["source"] == ["world:chain?wrong=0.5"] and made["strong"]["data"]["limit"] == 24
    assert origin_of(recipe.bases["strong"]) == "world:chain?wrong=0.5"
    right = {run.base: run.measured for run in result.runs if run.arm == "base"}
    assert right["weak"] != right["strong"]


@pytest.mark.slow
def test_runs_go_block_by_block_and_a_pretraining_fills_the_gap_before(done) -> None:
    folder, _, watcher = done
    recipe = load_comparison(with_bases(folder, seeds=[7]))
    recipe = recipe.model_copy(update={"bases": {**recipe.bases, "middle": recipe.bases["middle"].model_copy()}})
    reported = [run for run in Selection(recipe).runs() if run.seed != 100]
    assert [run.base for run in reported] == ["weak"] * 7 + ["strong"] * 7
    assert reported[0] == PlannedRun("", "weak", 3) and reported[7] == PlannedRun("", "strong", 4)
    begun = [run for run, _ in watcher.begun]
    assert begun[:2] == [PlannedRun("", "middle", 100), PlannedRun("", "weak", 3)]  # two processes, nothing else to do
    at = next(ended for run, ended in watcher.begun if run == PlannedRun("", "strong", 4))
    assert PlannedRun("sft", "weak", 3) not in at  # the next base is made while arms of the block before still run


def test_blocks_are_ordered_by_seed_and_then_by_base(tmp_path: Path) -> None:
    own = tables(tmp_path)
    recipe = str(tmp_path / "base.toml")
    own["bases"] = {"a": {"recipe": recipe}, "b": {"recipe": recipe, "seeds": [1, 9]}, "c": {"recipe": recipe}}
    assert load_comparison(own).blocks() == [("a", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1), ("b", 9)]


@pytest.mark.slow
def test_kept_results_of_a_block_need_no_pretraining(done, tmp_path: Path) -> None:
    folder, _, _ = done
    (tmp_path / RESULTS).write_bytes((folder / "comparison" / RESULTS).read_bytes())
    own = {**with_bases(folder, reference="sft"), "folder": str(tmp_path)}
    own["arms"] = {name: arm for name, arm in own["arms"].items() if name in ("sft", "base")}
    own["bases"]["new"] = {**own["bases"]["weak"], "seeds": [5]}
    planner = Planner(load_comparison(own), tmp_path)
    assert planner.to_run() == [PlannedRun(arm, "new", 5) for arm in ("", "base", "sft")]


def test_the_selection_of_a_base_brings_the_tuning_that_it_uses(tmp_path: Path) -> None:
    recipe = load_comparison(with_bases(tmp_path))
    runs = list(Selection(recipe, bases=["weak"]).runs())
    assert {(run.base, run.seed) for run in runs} == {("middle", 100), ("weak", 3)}
    runs = list(Selection(recipe, only=["base"], seeds=[4]).runs())
    assert [(run.arm, run.base) for run in runs] == [("", "strong"), ("base", "strong")]


def test_bases_that_are_made_alike_are_tried_once_with_all_arms(tmp_path: Path, monkeypatch) -> None:
    from thence.pipeline import preflight

    tried: list[tuple[list[str], int]] = []
    monkeypatch.setattr(preflight, "preflight", lambda recipe, *_, **__: tried.append((recipe.stages, 1)) or [])
    monkeypatch.setattr(preflight, "refuse", lambda found: None)
    planner = Planner(load_comparison(with_bases(tmp_path)), tmp_path)
    refuse_what_cannot_run(planner, list(planner.runs()))
    assert [stages for stages, _ in tried].count(["sft-pretrain"]) == 3  # every base has data of its own
    assert [stages for stages, _ in tried].count(["eval"]) == 1


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("weak", {"tuned_on": "midle"}, "bases.weak.tuned_on", "there is no such base"),
    ("weak", {"tuned_on": "weak"}, "bases.weak.tuned_on", "which is itself"),
    ("weak", {"tuned_on": "strong"}, "bases.weak.tuned_on", "tuned on another itself"),
    ("weak", {"seeds": []}, "bases.weak.seeds", "no run starts from it"),
    ("weak", {"seeds": [3, 3]}, "bases.weak.seeds", "given twice"),
    ("weak", {"seeds": [100]}, "tuning.seeds", "tuned on and reported"),
    ("weak", {"settings": {"sft-pretrain.stepz": 1}}, "bases.weak.settings.sft-pretrain.stepz", "unknown key"),
    ("weak", {"settings": {"sft-pretrain.steps": 0}}, "bases.weak.settings.sft-pretrain.steps", "at least 1"),
    ("weak", {"settings": {"sft.steps": 3}}, "bases.weak.settings.sft.steps", "nothing would change"),
    ("weak", {"settings": {"eval.samples": 3}}, "bases.weak.settings.eval.samples", "nothing would change"),
    ("weak", {"settings": {"data": {"limit": 3}}}, "bases.weak.settings.data", "a whole table"),
    ("weak", {"settings": {"data.seed": 3}}, "bases.weak.settings.data.seed", "the comparison sets it"),
    ("weak", {"recipe": None, "path": "world:chain/rich"}, "bases.weak", "settings are changes to a recipe"),
]


@pytest.mark.parametrize(("base", "change", "field", "said"), BAD)
def test_a_base_that_makes_no_sense_is_refused(tmp_path: Path, base: str, change, field: str, said: str) -> None:
    own = with_bases(tmp_path)
    own["bases"][base] = {key: value for key, value in {**own["bases"][base], **change}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        load_comparison(own)
    assert caught.value.field == field and said in caught.value.problem and caught.value.remedy


def test_a_comparison_without_a_block_is_refused(tmp_path: Path) -> None:
    own = with_bases(tmp_path)
    own["bases"] = {"middle": own["bases"]["middle"]}
    with pytest.raises(UserError, match="nothing would be reported"):
        load_comparison(own)


def test_parameters_of_the_world_that_its_split_does_not_know_are_found_before_the_first_run(tmp_path: Path) -> None:
    own = with_bases(tmp_path)
    own["bases"]["strong"]["settings"] = {"data.source": ["world:chain?slip=0.5"]}
    planner = Planner(load_comparison(own), tmp_path)
    with pytest.raises(UserError, match="changes nothing in the split 'train'") as caught:
        refuse_what_cannot_run(planner, planner.to_run())
    assert str(caught.value.field).startswith("bases.strong")


def test_a_dry_run_shows_tuning_and_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(with_bases(tmp_path)))
    assert main(["compare", str(file), "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    headings = [line for line in said if not line.startswith("    ")]
    assert headings[:-1] == ["tuning", "block: weak, seed 3", "block: strong, seed 4"]
    assert headings[-1].startswith("17 runs, 0 of them done; 2 blocks, 0 of them whole")
    assert main(["compare", str(file), "--dry-run", "--seeds", "4", "--bases", "weak"]) == 2
    assert "they are [3]" in capsys.readouterr().err
    assert main(["compare", str(file), "--dry-run", "--seeds", "4", "--only", "base"]) == 0
    assert "2 runs, 0 of them done; 1 blocks" in capsys.readouterr().out


@pytest.mark.slow
def test_the_results_are_read_back_with_the_seeds_of_every_base(done) -> None:
    folder, result, _ = done
    assert read_results(folder / "comparison") == result
    assert result.seeds_of("weak") == (3,) and result.blocks == (("weak", 3), ("strong", 4))
