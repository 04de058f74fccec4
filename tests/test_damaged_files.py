"""Files of thence's own that are damaged: refused with their place and a remedy that works, never overwritten."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.compare.comparisons import make_comparison
from tests.evaluate.test_eval import Counting, data, settings_of  # noqa: F401 - data is a fixture
from tests.evaluate.test_eval import run as evaluated
from tests.pipeline.test_pipeline import Recipes, metrics, recipes, weights  # noqa: F401 - fixtures
from tests.recipes import changed, file_recipe
from thence.cli import main
from thence.compare.result import RESULTS, read_results, to_json, write_results
from thence.compare.summary import read_summary, summarise
from thence.errors import DamagedFile, UserError
from thence.evaluate.store import Store
from thence.evaluate.summary import summarise as numbers_of
from thence.files import read_json, write_over
from thence.files import to_json as plain_json
from thence.jsonl import BadLine, read_lines, repair_lines, stream_lines
from thence.pages.run.page import write_page
from thence.pipeline.run import run
from thence.toml import to_toml
from thence.train.model import load_model

Damage = Callable[[bytes], bytes]


def conflict(content: bytes) -> bytes:
    lines = content.split(b"\n")
    middle = len(lines) // 2
    return b"\n".join([*lines[:middle], b"<<<<<<< HEAD", *lines[middle:]])


DAMAGE: dict[str, Damage] = {
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: b"\x5b" + content[1:],
    "emptied": lambda content: b"",
    "conflict": conflict,
    "object": lambda content: b"{}",
    "number": lambda content: b"3",
    "list": lambda content: b"[]",
    "numbers": lambda content: b"[1, 2, 3]",
    "latin-1": lambda content: content[:5] + b"\xe9" + content[5:],
    "nested": lambda content: b"[" * 100_000,
    "zeros": lambda content: bytes(len(content)),
}
damaged = pytest.mark.parametrize("kind", DAMAGE)
sampled = pytest.mark.matrix(5)  # each case runs a command; five are quick


def harm(file: Path, kind: str) -> bytes:
    """Damage a file. Returns what it holds then."""
    content = DAMAGE[kind](file.read_bytes())
    file.write_bytes(content)
    return content


def refused(act: Callable[[], object], file: Path, kind: str) -> DamagedFile:
    """The act is refused with the file, with a line where there is one, and the file stays as it is."""
    content = file.read_bytes()
    with pytest.raises(DamagedFile) as caught:
        act()
    assert caught.value.file is not None and Path(caught.value.file).resolve() == file.resolve()
    assert caught.value.line is not None or kind not in ("conflict", "latin-1")
    assert caught.value.remedy and not caught.value.remedy.startswith(("remove", "delete", "--restart"))
    assert file.read_bytes() == content
    return caught.value


# Comparisons.


@pytest.fixture
def comparison(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with six runs' results and nothing else, and the command that reports it."""
    made = make_comparison({"sft": 0.0, "rl": 0.5}, seeds=3)
    named = tuple(replace(r, folder=f"runs/{r.arm}-{r.seed}") for r in made.runs)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / RESULTS).write_text(to_json(replace(made, runs=named)))
    tables = {
        "name": "trial",
        "reference": "sft",
        "seeds": [0, 1, 2],
        "bases": {"rich": {"path": "world:chain/rich"}},
        "data": {"source": ["world:chain"]},
        "eval": {"reward": "exact"},
        "arms": {"sft": {"kind": "sft"}, "rl": {"kind": "rl"}},
    }
    (tmp_path / "c.toml").write_text(to_toml(tables))
    return folder, ["compare", str(tmp_path / "c.toml"), "--folder", str(folder)]


@sampled
@damaged
@pytest.mark.parametrize("flags", [["--report"], ["--dry-run"], []])
def test_damaged_results_are_never_overwritten(
    comparison: tuple[Path, list[str]], kind: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = comparison
    content = harm(folder / RESULTS, kind)
    assert main([*command, *flags]) == 2
    said = capsys.readouterr().err
    assert str(folder / RESULTS) in said and "Traceback" not in said and "put a whole copy" in said
    assert (folder / RESULTS).read_bytes() == content
    refused(lambda: write_results(folder, make_comparison({"sft": 0.0})), folder / RESULTS, kind)


def test_results_of_another_comparison_are_kept_beside_the_new_ones(comparison: tuple[Path, list[str]]) -> None:
    folder, command = comparison
    before = read_results(folder)
    main([*command, "--report"])  # other settings than those of the six runs
    assert len(read_results(folder).runs) == 0
    (folder / f"{RESULTS}.before-1").rename(folder / RESULTS)
    assert read_results(folder) == before


def test_the_study_is_not_judged_from_damaged_results_and_keeps_its_own(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "studies" / "embedded-world", tmp_path / "study")
    content = harm(tmp_path / "study" / RESULTS, "conflict")
    for arguments in ([], ["--kept", str(tmp_path / "new")]):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "study" / "judge.py"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and f"{RESULTS}:" in done.stderr and "Traceback" not in done.stderr
        assert (tmp_path / "study" / RESULTS).read_bytes() == content
        assert not (tmp_path / "new" / RESULTS).exists()


# Runs.


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path]:
    """A run whose evaluation has still to be done, over a trained stage."""
    made = Recipes(tmp_path_factory.mktemp("finished"))
    recipe = made(["sft", "eval"], eval={"reward_right_from": 0.1})
    return recipe, run(recipe)


@pytest.fixture
def one(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of the finished run, and its recipe."""
    recipe, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return {**recipe, "folder": str(tmp_path / "run")}, tmp_path / "run"


def reopened(folder: Path) -> None:
    """The evaluation is not done yet, but its measurements are kept."""
    (folder / "stages" / "eval" / "done.json").unlink()


OF_A_RUN = (
    "environment.json",
    "ground.json",
    "stages/sft/ground.json",
    "stages/sft/done.json",
    "stages/eval/ground.json",
    "stages/eval/done.json",
    "stages/eval/evaluation/evaluation.toml",
    "stages/eval/evaluation/environment.json",
)


@sampled
@damaged
@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_run_refuses_its_damaged_files_and_the_remedy_works(
    one: tuple[dict[str, Any], Path], name: str, kind: str
) -> None:
    recipe, folder = one
    if name != "stages/eval/done.json":
        reopened(folder)
    harm(folder / name, kind)
    error = refused(lambda: run(recipe), folder / name, kind)
    assert "rename" in error.remedy
    if kind in ("cut", "number"):  # the remedy is the same for all kinds
        before = weights(folder, "sft")
        moved = folder / name
        if "evaluation" in moved.parts:  # a store is measured again as a whole
            moved = moved.parent
        assert str(moved) in error.remedy or "rename it" in error.remedy
        moved.rename(moved.with_name(f"{moved.name}.aside"))
        run(recipe)
        assert (folder / "stages" / "eval" / "result.json").exists()
        assert all(value.equal(before[key]) for key, value in weights(folder, "sft").items())


@pytest.mark.parametrize("lines", ["samples", "grades"])
def test_damaged_lines_of_a_runs_evaluation_are_made_again(one: tuple[dict[str, Any], Path], lines: str) -> None:
    recipe, folder = one
    reopened(folder)
    stage = folder / "stages" / "eval"
    before = {name: (stage / name).read_bytes() for name in ("samples.jsonl", "result.json")}
    (file,) = (stage / "evaluation" / lines).glob("*.jsonl")
    file.write_bytes(b'{"problem": 3}\n' + file.read_bytes().split(b"\n", 1)[1])
    run(recipe)
    assert {name: (stage / name).read_bytes() for name in before} == before
    assert file.with_name(f"{file.name}.damaged").read_bytes() == b'{"problem": 3}\n'


def test_a_changed_note_of_a_model_does_not_set_aside_the_stage_that_was_trained_on_it(tmp_path: Path) -> None:
    recipe = changed(file_recipe(tmp_path), {"stages": ["sft", "rl"], "rl.steps": 1})
    folder = run(recipe)
    done = folder / "stages" / "sft" / "done.json"
    noted = json.loads(done.read_text())["model"]
    done.write_text(done.read_text().replace(noted, f"{int(noted, 16) ^ 1:016x}"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DamagedFile) as refused:
        run(recipe)
    assert refused.value.file == str(done)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@sampled
@damaged
def test_a_damaged_recipe_in_a_run_folder_is_refused(one: tuple[dict[str, Any], Path], kind: str) -> None:
    recipe, folder = one
    content = harm(folder / "recipe.toml", kind)
    with pytest.raises(UserError, match="is not as thence wrote it") as caught:
        run(recipe)
    assert caught.value.file == str(folder / "recipe.toml")
    assert (folder / "recipe.toml").read_bytes() == content


@sampled
@damaged
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "generation_config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_written_model_is_refused(one: tuple[dict[str, Any], Path], name: str, kind: str) -> None:
    recipe, folder = one
    reopened(folder)
    content = harm(folder / "stages" / "sft" / "model" / name, kind)
    with pytest.raises(UserError):
        run(recipe)
    assert (folder / "stages" / "sft" / "model" / name).read_bytes() == content


@sampled
@damaged
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_with_a_damaged_file_is_opened_with_an_error_for_the_user(
    one: tuple[dict[str, Any], Path], name: str, kind: str
) -> None:
    import torch

    from thence.recipe import Model

    _, folder = one
    model = folder / "stages" / "sft" / "model"
    harm(model / name, kind)
    with pytest.raises(UserError) as caught:
        load_model(Model(path=str(model)), torch.device("cpu"))
    assert str(model) in str(caught.value)
    assert name != "config.json" or kind == "object" or caught.value.file == str(model / name)


@sampled
@damaged
def test_every_report_of_a_damaged_run_is_written_and_says_so(one: tuple[dict[str, Any], Path], kind: str) -> None:
    _, folder = one
    for name in ("recipe.toml", "environment.json", "metrics.jsonl", "stages/eval/result.json"):
        harm(folder / name, kind)
    harm(folder / "stages" / "eval" / "samples.jsonl", kind)
    assert "cannot be read" in write_page(folder).read_text() or kind in ("object", "emptied")


# Lines.

BAD_LINES = {
    "not JSON": b'{"stage": "sft", "st',
    "not UTF-8": b'{"stage": "sft", "step": 1, "x": "\xff"}',
    "object": b"{}",
    "number": b"3",
    "list": b"[1]",
    "step of text": b'{"stage": "sft", "step": "1"}',
    "step of bool": b'{"stage": "sft", "step": true}',
    "stage of number": b'{"stage": 1, "step": 1}',
    "conflict": b"<<<<<<< HEAD",
    "nested": b"[" * 100_000,
    "two in one": b'{"stage": "sft", "step": 1}{"stage": "sft", "step": 2}',
}


@sampled
@pytest.mark.parametrize("place", [0, 4, 7])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_damaged_line_costs_itself_alone_on_resume(
    recipes: Recipes,  # noqa: F811
    kind: str,
    place: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from thence.pipeline.folder import RunFolder

    folder = RunFolder(Path(recipes([])["folder"]))
    folder.path.mkdir(parents=True)
    lines = [json.dumps({"stage": "sft", "step": step, "loss": 1 / step}).encode() for step in range(1, 9)]
    lines[place] = BAD_LINES[kind]
    folder.metrics.write_bytes(b"".join(line + b"\n" for line in lines))
    folder.rewind("sft", 8)
    assert [line["step"] for line in metrics(folder.path)] == [s for s in range(1, 9) if s != place + 1]
    assert (folder.path / "metrics.jsonl.damaged").read_bytes() == BAD_LINES[kind] + b"\n"
    assert f"{folder.metrics}:{place + 1}" in caplog.text
    assert "1 damaged line set aside" in write_page(folder.path).read_text()


def test_a_run_with_a_damaged_first_line_goes_on(
    recipes: Recipes,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import thence.pipeline.run as running

    recipe = recipes(["sft"], sft={"checkpoint_every": 1, "steps": 3})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "publish_model", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        run(recipe)
    file = Path(recipe["folder"]) / "metrics.jsonl"
    file.write_bytes(b"{}\n" + file.read_bytes().split(b"\n", 1)[1])
    assert [line["step"] for line in metrics(run(recipe))] == [2, 3]


@pytest.mark.parametrize("tail", [b'{"a": 2', b"", b'{"a": 2}'])
def test_a_torn_last_line_is_dropped_and_a_whole_one_without_its_end_is_kept(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "l.jsonl"
    file.write_bytes(b'{"a": 1}\n\r\n' + tail)
    repair_lines(file)
    assert [row["a"] for row in read_lines(file).values] == ([1, 2] if tail.endswith(b"}") else [1])
    assert file.read_bytes().endswith(b"}\n") and not file.with_name("l.jsonl.damaged").exists()


def test_zeros_that_a_power_cut_left_are_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "l.jsonl"
    file.write_bytes(b'{"a": 1}\n' + bytes(40))
    repair_lines(file)
    assert file.read_bytes() == b'{"a": 1}\n'
    assert file.with_name("l.jsonl.damaged").read_bytes() == bytes(40) + b"\n"


def test_large_files_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "l.jsonl"
    file.write_bytes(b'{"a": 1}\n3\n{"a": 2}\n')
    lines = stream_lines(file)
    assert next(lines) == (1, {"a": 1})
    assert isinstance(next(lines), BadLine) and next(lines) == (3, {"a": 2})


def test_samples_are_shown_though_lines_are_damaged(
    one: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = one
    file = folder / "stages" / "eval" / "samples.jsonl"
    file.write_bytes(b"{}\n3\n\xff\n" + file.read_bytes())
    assert main(["sample", str(folder)]) == 0
    assert all(f"{file}:{line}" in caplog.text for line in (1, 2, 3))


# Evaluations.


@sampled
@damaged
@pytest.mark.parametrize("name", ["environment.json", "evaluation.toml"])
def test_an_evaluation_refuses_its_damaged_files(tmp_path: Path, data: Path, name: str, kind: str) -> None:  # noqa: F811
    settings = settings_of(data)
    store = evaluated(tmp_path / "e", settings, Counting())
    harm(store.folder / name, kind)
    kind = "cut" if name == "evaluation.toml" and kind == "conflict" else kind
    refused(lambda: evaluated(store.folder, settings, Counting()), store.folder / name, kind)
    refused(lambda: numbers_of(store), store.folder / name, kind)
    assert main(["sample", str(store.folder)]) == (2 if name == "evaluation.toml" else 0)


@sampled
@damaged
def test_damaged_keys_of_problems_are_written_anew_and_kept_beside(
    tmp_path: Path,
    data: Path,  # noqa: F811
    kind: str,
) -> None:
    settings = settings_of(data)
    store = evaluated(tmp_path / "e", settings, Counting())
    file = store.folder / "problems.json"
    whole, content = file.read_bytes(), harm(file, kind)
    error = refused(lambda: numbers_of(store), file, kind)
    assert "again" in error.remedy
    evaluated(store.folder, settings, Counting())
    assert file.read_bytes() == whole and (store.folder / "problems.json.damaged-1").read_bytes() == content


@sampled
@pytest.mark.parametrize("bad", [b"{}", b"3", b"\xff\xfe", b'{"problem": 3}', b"<<<<<<< HEAD", b"[" * 100_000])
@pytest.mark.parametrize("name", ["samples", "grades"])
def test_a_damaged_sample_or_grade_is_set_aside_and_made_again(
    tmp_path: Path,
    data: Path,  # noqa: F811
    name: str,
    bad: bytes,
) -> None:
    settings = settings_of(data)
    store = evaluated(tmp_path / "e", settings, Counting())
    file = store.folder / name / "sums.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([bad, *lines[1:9], bad, *lines[10:]]) + b"\n")
    assert numbers_of(store).missing == 2
    rest = Counting()
    evaluated(store.folder, settings, rest)
    assert len(rest.asked) == (2 if name == "samples" else 0)
    assert numbers_of(store).missing == 0 and len(Store(store.folder).samples("sums")) == 18
    assert file.with_name("sums.jsonl.damaged").read_bytes() == (bad + b"\n") * 2


# Summaries of compared runs.


@sampled
@damaged
def test_a_damaged_summary_is_refused_and_made_again_once_renamed(one: tuple[dict[str, Any], Path], kind: str) -> None:
    _, folder = one
    whole = summarise(folder)
    harm(folder / "summary.json", kind)
    refused(lambda: read_summary(folder), folder / "summary.json", kind)
    (folder / "summary.json").rename(folder / "summary.json.aside")
    assert read_summary(folder) is None and summarise(folder) == whole == read_summary(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "stages/eval/samples.jsonl"])
def test_a_summary_is_not_made_of_files_that_lack_lines(one: tuple[dict[str, Any], Path], name: str) -> None:
    _, folder = one
    content = (folder / name).read_bytes()
    for harmed in (b"{}\n" + content.split(b"\n", 1)[1], b"".join(content.splitlines(keepends=True)[:-1])):
        (folder / name).write_bytes(harmed)
        with pytest.raises(DamagedFile) as caught:
            summarise(folder)
        assert caught.value.file == str(folder / name)
    assert not (folder / "summary.json").exists()


# The reader itself.


@sampled
@damaged
def test_one_reader_refuses_every_kind(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "f.json"
    file.write_text(plain_json({"a": [1, 2], "b": "text"}, indent=1))
    harm(file, kind)
    refused(lambda: read_json(file, remedy="r", shape=lambda value: value["a"]), file, kind)


def test_a_file_made_from_others_keeps_the_unreadable_one_before_it(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    write_over(file, "{}")
    write_over(file, '{"a": 1}')
    file.write_text("{<<<")
    write_over(file, '{"a": 2}')
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.json.damaged-1"]
    assert (tmp_path / "f.json.damaged-1").read_text() == "{<<<"
