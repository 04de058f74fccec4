"""Comparisons: what a recipe may say, which runs it runs, that budgets hold, and that killing one loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare.small import Quiet, tables
from thence.cli import main
from thence.compare.collect import collect
from thence.compare.engine import compare
from thence.compare.plan import Planner
from thence.compare.recipe import load_comparison, shipped_comparisons
from thence.compare.result import RESULTS, Comparison, Run, Spent, read_results, results_json
from thence.compare.same_files import check_same_files
from thence.compare.statistics import statistics
from thence.errors import UserError
from thence.toml import to_toml


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, Quiet]:
    """The comparison, run to its end over two processes."""
    folder = tmp_path_factory.mktemp("compare")
    watcher = Quiet()
    result = compare(load_comparison(tables(folder)), jobs=2, watcher=watcher)
    return folder, result, watcher


def without_times(comparison: Comparison) -> str:
    """The results, but for wall times, places and the environment."""

    def timeless(spent: Spent) -> Spent:
        return replace(spent, seconds=0.0)

    def of(runs: tuple[Run, ...]) -> tuple[Run, ...]:
        return tuple(replace(r, spent=timeless(r.spent), own=timeless(r.own), folder="") for r in runs)

    kept = replace(comparison, runs=of(comparison.runs), tuning_runs=of(comparison.tuning_runs), environment={})
    return results_json(kept)


def test_every_arm_is_measured_from_every_base_with_every_seed(done) -> None:
    _, result, watcher = done
    assert not watcher.failures and not result.failures and result.pending == 0
    found = {(run.arm, run.base, run.seed) for run in result.runs}
    assert found == {(arm.name, "small", seed) for arm in result.arms for seed in (0, 1)}
    assert all(len(m.right) == 5 and m.samples == 2 for run in result.runs for m in run.measured)


def test_no_stage_is_trained_twice(done) -> None:
    folder, _, watcher = done
    # two bases to report and one to tune, two tries of SFT; then six arms for each of two seeds
    assert len(watcher.finished_runs) == 3 + 2 + 12
    models = list((folder / "comparison" / "runs").glob("*/seed0/sft-*/stages/sft/model"))
    assert len(models) == 1


def test_the_setting_that_is_best_on_dev_is_chosen_and_a_fault_is_shown_at_the_same_one(done) -> None:
    _, result, _ = done
    tried = [t for t in result.tries if t.arm == "sft"]
    assert len(tried) == 2 and sum(t.chosen for t in tried) == 1
    best = next(t for t in tried if t.chosen)
    assert best.accuracy == max(t.accuracy for t in tried)
    chosen = {run.arm: run.settings for run in result.runs}
    assert chosen["sft"] == chosen["broken"] == best.settings
    assert {arm.name: arm.tries for arm in result.arms} == {
        "base": 1, "sft": 2, "broken": 2, "same": 2, "sft-then-rl": 2, "rl": 1,
    }  # fmt: skip


def test_an_arm_for_which_the_plan_leaves_nothing_is_refused_before_the_first_run(tmp_path: Path) -> None:
    recipe = load_comparison(tables(tmp_path, budget={"flops": 1e6}))
    with pytest.raises(
        UserError, match=r"by the plan sft from small spends the whole budget of .*left for sft-then-rl"
    ):
        compare(recipe, watcher=Quiet())
    assert not list((tmp_path / "comparison").glob("bases/*/*")) and not (tmp_path / "comparison/runs").exists()


def test_an_arm_ends_at_the_step_nearest_to_the_budget_earlier_stages_included(done) -> None:
    _, result, _ = done
    for run in result.runs:
        if run.arm in ("rl", "sft-then-rl"):
            last = run.own.trained_tokens / run.own.steps
            assert abs(run.spent.trained_tokens - 1500) <= last
        assert run.spent.trained_tokens <= 1500 + 8 * 16


def test_what_was_spent_counts_generated_tokens_and_what_was_really_executed(done) -> None:
    _, result, _ = done
    by_arm = {run.arm: run for run in result.runs if run.seed == 0}
    assert by_arm["base"].spent.rule_flops == 0
    assert by_arm["sft"].own.generated_tokens == 0 < by_arm["rl"].own.generated_tokens
    both = by_arm["sft"].own.rule_flops + by_arm["sft-then-rl"].own.rule_flops
    assert by_arm["sft-then-rl"].spent.rule_flops == pytest.approx(both)
    executed = by_arm["rl"].spent.executed_flops
    assert executed is not None and executed > 0


def test_a_fault_changes_training_and_one_that_loses_nothing_does_not(done) -> None:
    _, result, _ = done
    for seed in (0, 1):
        by_arm = {run.arm: run for run in result.runs if run.seed == seed}
        assert by_arm["same"].curve["loss"] == pytest.approx(by_arm["sft"].curve["loss"], rel=1e-4)
        assert by_arm["broken"].curve["loss"] != pytest.approx(by_arm["sft"].curve["loss"], rel=1e-3)
        assert by_arm["broken"].spent.rule_flops == by_arm["sft"].spent.rule_flops


def test_a_finished_comparison_is_not_run_again(done) -> None:
    folder, result, _ = done
    watcher = Quiet()
    again = compare(load_comparison(tables(folder)), jobs=2, watcher=watcher)
    assert watcher.finished_runs == []
    assert without_times(again) == without_times(result)
    assert again.environment == result.environment  # whoever only reads the results has not made them


def test_an_arm_that_is_changed_is_run_again_and_the_others_are_not(done) -> None:
    folder, _, _ = done
    own = tables(folder)
    arms = {**own["arms"], "rl": {"kind": "rl", "settings": {"lr": 2e-2}}}
    planner = Planner(load_comparison({**own, "arms": arms}), folder / "comparison")
    assert [run.arm for run in planner.runs() if not planner.is_done(run)] == ["rl", "rl"]


def test_kept_results_alone_are_enough_to_repeat_nothing(done, tmp_path: Path) -> None:
    folder, result, _ = done
    (tmp_path / RESULTS).write_bytes((folder / "comparison" / RESULTS).read_bytes())
    watcher = Quiet()
    again = compare(load_comparison({**tables(folder), "folder": str(tmp_path)}), jobs=2, watcher=watcher)
    assert watcher.finished_runs == [] and again.pending == 0
    assert without_times(again) == without_times(result)


@pytest.mark.everything
@pytest.mark.slow
def test_another_arm_on_kept_results_repeats_nothing_but_what_it_is_built_on(done, tmp_path: Path) -> None:
    """Another arm after SFT runs SFT's models, and these their bases."""
    folder, result, _ = done
    (tmp_path / RESULTS).write_bytes((folder / "comparison" / RESULTS).read_bytes())
    own = {**tables(folder), "folder": str(tmp_path)}
    watcher = Quiet()
    own["arms"] = {**own["arms"], "hotter": {"after": "sft", "kind": "rl", "settings": {"temperature": 1.2}}}
    more = compare(load_comparison(own), jobs=2, watcher=watcher)
    assert {(run.arm, run.seed) for run in watcher.finished_runs} == {
        (arm, seed) for arm in ("", "sft", "hotter") for seed in (0, 1)
    }
    assert more.pending == 0 and not watcher.failures
    measured = {(run.arm, run.seed): run.measured for run in more.runs}
    assert all(measured[run.arm, run.seed] == run.measured for run in result.runs)


def test_results_survive_being_written_and_read(done, tmp_path: Path) -> None:
    folder, result, _ = done
    (tmp_path / RESULTS).write_text(results_json(result))
    assert read_results(tmp_path) == result
    assert results_json(read_results(tmp_path)) == results_json(result)
    assert {run.seed for run in result.tuning_runs} == {100} and len(result.tuning_runs) == 2
    assert without_times(read_results(folder / "comparison")) == without_times(result)


def test_results_that_are_not_there_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="thence compare"):
        read_results(tmp_path)


def test_only_and_seeds_leave_out_what_is_not_asked_for(tmp_path: Path) -> None:
    recipe = load_comparison(tables(tmp_path))
    runs = list(Planner(recipe, tmp_path, only=["broken"], seeds=[1]).runs())
    assert {run.arm for run in runs} == {"", "sft", "broken"}  # broken is tuned like sft
    assert {run.seed for run in runs} == {100, 1}


def test_runs_are_not_added_on_files_that_have_changed_since(done) -> None:
    """Old runs and new ones would be set side by side as if they had read the same."""
    folder, _, _ = done
    more, same = (load_comparison(tables(folder, seeds=seeds)) for seeds in ([0, 1, 2], [0, 1]))
    reward, watcher = folder / "own.py", Quiet()
    text = reward.read_text()
    reward.write_text(text + "# another comment\n")
    try:
        with pytest.raises(UserError, match=r"has changed since finished runs(.|\n)*put the file back") as caught:
            compare(more, watcher=watcher)
        assert caught.value.file == str(reward.resolve()) and not watcher.finished_runs
        assert compare(same, watcher=watcher).pending == 0  # no run is left, so nothing is mixed
    finally:
        reward.write_text(text)
    check_same_files(Planner(more, folder / "comparison"))


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_and_ends_with_the_same_numbers(done, tmp_path: Path) -> None:
    _, undisturbed, _ = done
    own = {**tables(tmp_path), "folder": str(tmp_path / "comparison")}
    code = (
        "import json, sys; from thence.compare.engine import compare; from thence.compare.recipe import *;"
        "from thence.compare.live import LiveTable; from rich.console import Console;"
        "compare(load_comparison(json.load(open(sys.argv[1]))), jobs=2, watcher=LiveTable(Console(), 2))"
    )
    (tmp_path / "tables.json").write_text(json.dumps(own))
    command = [sys.executable, "-c", code, str(tmp_path / "tables.json")]
    for wanted in (2, 8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            # os.walk passes over folders that the running comparison removes meanwhile
            if sum("done.json" in files for _, _, files in os.walk(tmp_path / "comparison")) >= wanted:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        assert process.returncode == -signal.SIGKILL
    watcher = Quiet()
    result = compare(load_comparison(own), jobs=2, watcher=watcher)
    assert len(watcher.finished_runs) < 17
    assert without_times(result) == without_times(undisturbed)


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path: Path) -> None:
    own = tables(tmp_path, seeds=[0])
    later = "calls = []\ndef share(prompt, response, answer):\n    calls.append(1)\n"
    later += "    if len(calls) == 1:\n        return 0.0\n"
    (tmp_path / "bad.py").write_text(f"{later}    raise ValueError('no such luck')\n")  # tried once beforehand
    (tmp_path / "deadly.py").write_text(f"import os\n{later}    os._exit(7)\n")
    arms = {
        "base": {},
        # not to the end of the budget: an arm after it would be refused
        "bad": {"kind": "rl", "settings": {"reward": f"{tmp_path / 'bad.py'}:share", "steps": 2}},
        "deadly": {"kind": "rl", "settings": {"reward": f"{tmp_path / 'deadly.py'}:share"}},
        "after-bad": {"after": "bad", "kind": "rl"},
    }
    watcher = Quiet()
    result = compare(load_comparison({**own, "arms": arms, "reference": "base"}), jobs=2, watcher=watcher)
    why = {failure.arm: failure.why for failure in result.failures}
    assert set(why) == {"bad", "deadly", "after-bad"}
    assert "no such luck" in why["bad"] and "code 7" in why["deadly"] and "builds on" in why["after-bad"]
    assert [run.arm for run in result.runs] == ["base"]
    assert result.pending == 3
    (tmp_path / "mine.toml").write_text(to_toml({**own, "arms": arms, "reference": "base"}))
    assert main(["compare", str(tmp_path / "mine.toml"), "--report"]) == 1  # what failed is not forgotten
    assert {failure.arm for failure in read_results(tmp_path / "comparison").failures} == set(why)


def test_two_processes_do_not_run_one_comparison(tmp_path: Path) -> None:
    import fcntl

    recipe = load_comparison(tables(tmp_path))
    (tmp_path / "comparison").mkdir()
    handle = os.open(tmp_path / "comparison" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        compare(recipe, watcher=Quiet())
    os.close(handle)


def test_collecting_an_unfinished_comparison_says_what_is_pending(tmp_path: Path) -> None:
    recipe = load_comparison(tables(tmp_path))
    result = collect(Planner(recipe, tmp_path / "comparison"))
    assert result.runs == () and result.pending == 17


BAD: list[tuple[dict[str, Any], str]] = [
    ({"reference": "none"}, "reference"),
    ({"arms": {"a": {"kind": "sft", "after": "b"}}, "reference": "a"}, "arms.a.after"),
    ({"arms": {"a": {"kind": "sft", "after": "a"}}, "reference": "a"}, "arms.a.after"),
    ({"arms": {"a": {"kind": "sft", "settings": {"lrr": 1}}}, "reference": "a"}, "arms.a: sft.lrr"),
    ({"arms": {"a": {"kind": "sft", "grid": {"lr": [1e-3, -1]}}}, "reference": "a"}, "arms.a: sft.lr"),
    ({"arms": {"a": {"grid": {"lr": [1e-3]}}}, "reference": "a"}, "arms.a.kind"),
    ({"arms": {"a": {"kind": "sft", "grid": {"lr": []}}}, "reference": "a"}, "arms.a.grid"),
    ({"budget": {"flops": 1e9, "tokens": 3}}, "budget"),
    ({"bases": {"small": {}}}, "bases.small"),
    ({"tuning": {"seeds": [1]}}, "tuning.seeds"),
    ({"armz": {}}, "armz"),
]


@pytest.mark.parametrize(("change", "field"), BAD)
def test_a_comparison_that_makes_no_sense_is_refused_with_the_field(tmp_path: Path, change, field: str) -> None:
    with pytest.raises(UserError) as caught:
        load_comparison(tables(tmp_path, **change))
    assert caught.value.field == field and caught.value.remedy


def test_the_shipped_comparisons_can_be_read_and_planned(tmp_path: Path) -> None:
    assert "quick" in shipped_comparisons()
    for name in shipped_comparisons():
        assert list(Planner(load_comparison(name), tmp_path).runs())


def test_the_command_line_plans_refuses_and_reports(done, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = done
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(tables(folder)))
    assert main(["compare", str(file), "--dry-run"]) == 0
    assert "17 runs, 17 of them done" in capsys.readouterr().out
    assert main(["compare", str(file)]) == 0
    out = capsys.readouterr().out
    assert "sft-then-rl" in out and str(folder / "comparison" / "report.html") in out.replace("\n", "")
    assert main(["compare", str(file), "--only", "nothing"]) == 2
    assert "sft-then-rl" in capsys.readouterr().err
    assert main(["compare", str(file), "--seeds", "7"]) == 2
    wrong = tables(folder)
    wrong["arms"]["rl"]["settings"] = {"method": "lufy"}
    file.write_text(to_toml(wrong))
    assert main(["compare", str(file)]) == 2
    assert "did you mean 'luffy'" in capsys.readouterr().err


def test_contrasts_are_judged_from_runs_that_are_there_and_repeat_none(
    done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = done
    copied = tmp_path / "comparison"
    shutil.copytree(folder / "comparison", copied)
    own = tables(folder)
    own["covariate"] = {"arm": "base"}
    own["contrasts"] = [{"name": "bug", "arm": "sft", "other": "broken", "expect": "higher", "primary": True}]
    (tmp_path / "mine.toml").write_text(to_toml(own))
    assert main(["compare", str(tmp_path / "mine.toml"), "--folder", str(copied), "--report"]) == 0
    assert "0 of 1 primary contrasts decided" in " ".join(capsys.readouterr().out.split())
    results = read_results(copied)
    assert results.blocks == (("small", 0), ("small", 1)) and results.pending == 0
    [decision] = statistics(results, 50).decisions.contrasts
    accuracy = {(run.arm, run.seed): run.measured[0].accuracy for run in results.runs}
    assert decision.finished == decision.planned == 2 and decision.outcome == "undecided"
    assert decision.differences["small", 1] == accuracy["sft", 1] - accuracy["broken", 1]


def test_a_python_caller_gets_the_message_of_the_command_line_for_a_wrong_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tables(tmp_path)
    own["arms"]["rl"] = {"kind": "rl", "settings": {"options": {"klx": 1}}}
    file = tmp_path / "comparison.toml"
    file.write_text(to_toml(own))
    assert main(["compare", str(file), "--only", "base"]) == 2  # the arm is not among those that are to run
    with pytest.raises(UserError) as refused:
        compare(load_comparison(own), only=["base"], watcher=Quiet())
    assert str(refused.value) in capsys.readouterr().err
    assert refused.value.field == "arms.rl: rl.options.klx"
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_what_a_later_arm_names_is_tried_before_the_first_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tables(tmp_path)
    own["arms"]["rl"] = {"kind": "rl", "settings": {"reward": "mth"}}
    file = tmp_path / "comparison.toml"
    file.write_text(to_toml(own))
    assert main(["compare", str(file), *flags]) == 2
    assert "arms.rl: rl.reward: no reward is called 'mth'" in capsys.readouterr().err
    assert not (tmp_path / "comparison" / "runs").exists()
    assert not (tmp_path / "comparison" / "bases").exists()
