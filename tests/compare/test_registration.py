"""A registered design: what is in it, what changes it, and that nobody changes it silently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.compare.small import Quiet, tables
from tests.compare.test_bases import Recorder
from tests.recipes import model_table
from thence.cli import main
from thence.compare import engine
from thence.compare.collect import collect
from thence.compare.design import Registrar, design_of, finished_runs
from thence.compare.folder import mark
from thence.compare.plan import Planner
from thence.compare.recipe import load_comparison
from thence.compare.registration import differences_of, sha256_of
from thence.compare.result import RESULTS, read_results
from thence.errors import DamagedFile, UserError
from thence.toml import to_toml


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**tables(folder), "registered": True, **changes}


def written(folder: Path, **changes: Any) -> str:
    """A comparison's file."""
    file = folder / "mine.toml"
    file.write_text(to_toml(small(folder, **changes)))
    return str(file)


def register(folder: Path, **changes: Any):
    recipe = load_comparison(small(folder, **changes))
    recipe.path().mkdir(parents=True, exist_ok=True)
    mark(recipe.path())
    return Registrar(Planner(recipe, recipe.path())).register()


def kept(folder: Path):
    found = read_results(folder / "comparison").registration
    assert found is not None
    return found


def test_the_same_design_has_the_same_hash_whatever_is_only_for_the_reader(tmp_path: Path) -> None:
    own = small(tmp_path)
    first = sha256_of(design_of(load_comparison(own)))
    shown = {"name": "other", "description": "d", "folder": str(tmp_path / "x"), "sections": [{"kind": "cost"}]}
    arms = {name: {**arm, "title": f"Arm {name}", "note": "n", "group": "g"} for name, arm in own["arms"].items()}
    turned = dict(reversed(list(arms.items())))
    assert sha256_of(design_of(load_comparison({**own, **shown, "arms": turned}))) == first
    whole_numbers = {**own, "sft": {**own["sft"], "epochs": 2.0}}
    assert sha256_of(design_of(load_comparison(whole_numbers))) == first


CHANGES: list[tuple[str, str]] = [
    ("seeds", "seeds"),
    ("budget", "budget.tokens"),
    ("reference", "reference"),
    ("grid", "arms.sft.grid.lr"),
    ("eval", "eval.samples"),
    ("tuning", "tuning.eval.splits.dev.limit"),
    ("base", "bases.small.settings.sft-pretrain.steps"),
    ("contrast", "contrasts"),
]


def changed(folder: Path, what: str) -> dict[str, Any]:
    own = small(folder)
    if what == "seeds":
        own["seeds"] = [0, 1, 2]
    elif what == "budget":
        own["budget"] = {"tokens": 1600}
    elif what == "reference":
        own["reference"] = "rl"
    elif what == "grid":
        own["arms"]["sft"] = {**own["arms"]["sft"], "grid": {"lr": [1e-3, 1e-2, 1e-1]}}
    elif what == "eval":
        own["eval"] = {**own["eval"], "samples": 3}
    elif what == "tuning":
        own["tuning"] = {"eval": {"splits": {"dev": {"split": "dev", "limit": 5}}}}
    elif what == "base":
        own["bases"] = {"small": {**own["bases"]["small"], "settings": {"sft-pretrain.steps": 3}}}
    elif what == "contrast":
        own["contrasts"] = [{"name": "c", "arm": "sft", "other": "broken", "expect": "higher", "primary": True}]
    return own


@pytest.mark.parametrize(("what", "field"), CHANGES)
def test_whatever_decides_what_is_run_or_judged_is_in_the_design(tmp_path: Path, what: str, field: str) -> None:
    before = design_of(load_comparison(small(tmp_path)))
    after = design_of(load_comparison(changed(tmp_path, what)))
    assert sha256_of(before) != sha256_of(after)
    found = [change.field.replace('"', "") for change in differences_of(before, after)]
    assert len(found) == 1 and found[0].startswith(field)


def test_files_count_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    same = [sha256_of(design_of(load_comparison(small(folder)))) for folder in (first, second)]
    assert same[0] == same[1]
    recipe = second / "base.toml"
    recipe.write_text("# a remark\n" + recipe.read_text())
    own = {**small(second), "registered": True}
    recipe.write_text(recipe.read_text().replace("steps = 2", "steps = 3"))
    (change,) = differences_of(design_of(load_comparison(small(first))), design_of(load_comparison(own)))
    assert change.field == "bases.small.recipe" and "base.toml sha256:" in change.new
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "2"}\n')
    own = small(first)
    own["sft"] = {**own["sft"], "data": {"source": [str(rows)]}}
    before = design_of(load_comparison(own))
    rows.write_text('{"question": "1+2?", "answer": "3"}\n')
    (change,) = differences_of(before, design_of(load_comparison(own)))
    assert change.field == "sft.data.source" and "rows.jsonl sha256:" in change.new[0]


def trained(run: Path, weights: str) -> None:
    """What a run leaves, as far as its model is concerned."""
    model = run / "stages" / "sft" / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "model.safetensors").write_text(weights)
    (run / "stages" / "sft" / "done.json").write_text("{}")
    table = {"stages": ["sft"], "model": model_table(run), "data": {"source": ["world:chain"], "limit": 4}}
    (run / "recipe.toml").write_text(to_toml({"name": "run", **table, "sft": {"steps": 1}}))


@pytest.mark.parametrize("path", ["run{seed}:sft", "run1:sft", "run{seed}/stages/sft/model"])
def test_a_base_that_a_run_has_trained_counts_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    designs = []
    for place, weights in (("a", "1"), ("b", "1"), ("b", "2")):
        folder = tmp_path / place
        for seed in (0, 1, 100):
            trained(folder / f"run{seed}", weights if seed == 1 else "0")
        designs.append(design_of(load_comparison(small(folder, bases={"small": {"path": str(folder / path)}}))))
    first, moved, other = designs
    assert differences_of(first, moved) == ()
    (change,) = differences_of(moved, other)
    assert change.field == ("bases.small.path.1" if "{seed}" in path else "bases.small.path")
    monkeypatch.chdir(tmp_path)
    hub = {"small": {"path": "owner/base-{seed}"}}
    assert design_of(load_comparison(small(tmp_path, bases=hub)))["bases"]["small"]["path"] == "owner/base-{seed}"


def test_a_name_that_is_empty_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = small(tmp_path, sft={"lr": 1e-2, "batch": 8, "epochs": 2, "data": {"limit": 16, "template": ""}})
    before = design_of(load_comparison(own))
    (tmp_path / "another").write_text("file")
    assert differences_of(before, design_of(load_comparison(own))) == ()


def test_a_registration_is_written_before_any_run_and_is_not_written_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    assert main(["compare", file, "--register"]) == 0
    said = capsys.readouterr().out
    first = kept(tmp_path)
    assert first.sha256 in said and first.sha256 == sha256_of(design_of(load_comparison(file)))
    assert not (tmp_path / "comparison" / "runs").exists()
    assert main(["compare", file, "--register"]) == 0 and kept(tmp_path) == first
    assert main(["compare", file, "--dry-run"]) == 0
    assert f"the design is the one that was registered {first.time}" in capsys.readouterr().out


def test_a_file_that_does_not_ask_for_it_is_not_registered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", written(tmp_path, registered=False), "--register"]) == 2
    assert "registered = true" in capsys.readouterr().err
    assert collect(Planner(load_comparison(small(tmp_path)), tmp_path / "comparison")).registration is None


@pytest.mark.parametrize("flags", [["--dry-run"], ["--report"], ["--register"], []])
def test_another_design_is_refused_with_the_fields_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    register(tmp_path)
    before = (tmp_path / "comparison" / RESULTS).read_bytes()
    assert main(["compare", written(tmp_path, seeds=[0, 1, 2]), *flags]) == 2
    said = capsys.readouterr().err
    assert "seeds: [0, 1] → [0, 1, 2]" in said and '--amend "REASON"' in said
    assert (tmp_path / "comparison" / RESULTS).read_bytes() == before


def test_leaving_the_flag_out_of_the_file_does_not_undo_a_registration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(tmp_path)
    assert main(["compare", written(tmp_path, registered=False, seeds=[5]), "--dry-run"]) == 2
    assert "seeds: [0, 1] → [5]" in capsys.readouterr().err


def test_an_amendment_is_kept_with_its_reason_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = register(tmp_path)
    file = written(tmp_path, seeds=[0, 1, 2])
    assert main(["compare", file, "--report", "--amend", "more seeds <b>"]) == 0
    (amendment,) = kept(tmp_path).amendments
    assert kept(tmp_path).sha256 == first.sha256 and amendment.sha256 != first.sha256
    assert (amendment.reason, amendment.finished) == ("more seeds <b>", 0)
    assert [(c.field, c.old, c.new) for c in amendment.changes] == [("seeds", [0, 1], [0, 1, 2])]
    said = " ".join(capsys.readouterr().out.split())
    assert "after 0 reported runs: more seeds <b> (seeds: [0, 1] → [0, 1, 2])" in said
    assert re.search(r"design registered .*sha256 [0-9a-f]{64}, amended once", said)
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert page.index("more seeds &lt;b&gt;") < page.index("<section")
    report = json.loads((tmp_path / "comparison" / "report.json").read_text())
    assert report["registration"]["amendments"][0]["reason"] == "more seeds <b>"
    assert main(["compare", file, "--report"]) == 0  # the amended design is the one in force
    assert main(["compare", written(tmp_path), "--report"]) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--report", "--amend", "why"], "is as it was registered"),
        (["--report", "--amend", "  "], "the value is empty"),
        (["--dry-run", "--amend", "why"], "a dry run writes nothing"),
    ],
)
def test_an_amendment_that_amends_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    register(tmp_path)
    assert main(["compare", written(tmp_path), *flags]) == 2
    assert said in capsys.readouterr().err


def test_before_a_registration_there_is_nothing_to_amend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "comparison").mkdir()
    assert main(["compare", written(tmp_path), "--report", "--amend", "why"]) == 2
    assert "nothing is registered yet" in capsys.readouterr().err


def edited(folder: Path, change) -> None:
    path = folder / "comparison" / RESULTS
    plain = json.loads(path.read_text())
    change(plain["registration"])
    path.write_text(json.dumps(plain))


ALTERED = {
    "a field of the design": lambda r: r["design"].update(seeds=[0]),
    "the hash": lambda r: r.update(sha256="0" * 64),
    "a field of an amended design": lambda r: r["amendments"][0]["design"].update(seeds=[9]),
    "what an amendment says it changed": lambda r: r["amendments"][0].update(changes=[]),
    "an amendment taken out": lambda r: r["amendments"].pop(0),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_registration_that_was_changed_by_hand_is_refused(tmp_path: Path, what: str) -> None:
    register(tmp_path)
    for seeds in ([0, 1, 2], [0, 1, 2, 3]):
        Registrar(Planner(load_comparison(small(tmp_path, seeds=seeds)), tmp_path / "comparison"), "more")
    assert len(kept(tmp_path).amendments) == 2
    edited(tmp_path, ALTERED[what])
    with pytest.raises(DamagedFile, match="changed by hand"):
        read_results(tmp_path / "comparison")


JUDGED_BY = {
    "reference": lambda r: r.update(reference="rl"),
    "covariate": lambda r: r["covariate"].update(arm="sft"),
    "contrasts": lambda r: r["contrasts"][0].update(expect="lower"),
    "seeds of the bases": lambda r: r["base_seeds"].update(small=[0]),
    "bases": lambda r: r["bases"].clear(),
}


@pytest.mark.parametrize("what", JUDGED_BY)
def test_results_that_are_judged_otherwise_than_registered_are_refused(tmp_path: Path, what: str) -> None:
    contrasts = [{"name": "c", "arm": "sft", "other": "broken", "expect": "higher", "primary": True}]
    register(tmp_path, contrasts=contrasts, covariate={"arm": "base"})
    assert kept(tmp_path)
    path = tmp_path / "comparison" / RESULTS
    plain = json.loads(path.read_text())
    JUDGED_BY[what](plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(DamagedFile, match=rf"judged by \(.*{what}\) is not"):
        read_results(tmp_path / "comparison")


def test_what_was_finished_before_cannot_be_registered(tmp_path: Path) -> None:
    summary = tmp_path / "comparison" / "runs" / "small" / "seed1" / "sft-00000000" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text("{}")  # of other settings
    mark(tmp_path / "comparison")
    recipe = load_comparison(small(tmp_path))
    assert finished_runs(Planner(recipe, tmp_path / "comparison")) == 1
    with pytest.raises(UserError, match="1 reported run was finished before") as refused:
        engine.compare(recipe, watcher=Quiet())
    assert "new --folder" in refused.value.remedy


def test_a_field_that_a_later_version_adds_is_no_change(tmp_path: Path) -> None:
    from thence.compare.design import changes_since

    first = register(tmp_path)
    older = {key: value for key, value in first.design.items() if key != "contrasts"}
    edited(tmp_path, lambda r: (r["design"].pop("contrasts"), r.update(sha256=sha256_of(older))))
    assert changes_since(kept(tmp_path), load_comparison(small(tmp_path))) == ()
    assert changes_since(kept(tmp_path), load_comparison(changed(tmp_path, "contrast")))


@pytest.mark.slow
def test_the_design_is_registered_when_the_first_reported_run_starts_and_that_is_after_tuning(tmp_path: Path) -> None:
    class Looker(Recorder):
        registered: dict[Any, bool]

        def started(self, job) -> None:
            super().started(job)
            results = tmp_path / "comparison" / RESULTS
            there = results.exists() and read_results(results.parent).registration is not None
            self.seen = [*getattr(self, "seen", []), (job.run, there)]

    own = small(tmp_path, seeds=[0], reference="sft")
    own["arms"] = {name: arm for name, arm in own["arms"].items() if name in ("base", "sft")}
    watcher = Looker()
    result = engine.compare(load_comparison(own), jobs=2, watcher=watcher)
    assert not watcher.failures and result.registration is not None and result.pending == 0
    tuning = [run for run in watcher.runs if run.seed == 100]
    for run, there in watcher.seen:
        assert there == (run.seed == 0 and bool(run.arm))
    first = next(ended for run, ended in watcher.begun if run.arm and run.seed == 0)
    assert set(tuning) <= first
    again = engine.compare(load_comparison(own), jobs=2, watcher=Quiet())
    assert again.registration == result.registration
    with pytest.raises(UserError, match="not the one that was registered"):
        engine.compare(load_comparison({**own, "budget": {"tokens": 1501}}), watcher=Quiet())
    amended = engine.compare(load_comparison({**own, "seeds": [0], "reference": "base"}), amend="why", watcher=Quiet())
    assert amended.registration is not None and amended.registration.amendments[0].finished == 2


def test_a_contrast_without_a_column_is_of_the_headline_whatever_the_order_of_the_splits_becomes(
    tmp_path: Path,
) -> None:
    own = small(tmp_path)
    splits = {"first": {"split": "test", "limit": 4}, "second": {"split": "ood", "limit": 4}}
    contrasts = [{"name": "c", "arm": "sft", "other": "base", "expect": "higher", "primary": True}]
    first, turned = (
        load_comparison({**own, "contrasts": contrasts, "eval": {**own["eval"], "splits": dict(order)}})
        for order in (splits.items(), reversed(splits.items()))
    )
    assert [recipe.contrasts[0].column for recipe in (first, turned)] == ["first", "second"]
    assert sha256_of(design_of(first)) != sha256_of(design_of(turned))


def test_an_arm_that_is_added_with_nothing_but_defaults_is_a_change(tmp_path: Path) -> None:
    register(tmp_path)
    own = small(tmp_path)
    own["arms"] = {**own["arms"], "second-base": {"title": "Base again"}}
    with pytest.raises(UserError, match="second-base"):
        Registrar(Planner(load_comparison(own), tmp_path / "comparison"))
