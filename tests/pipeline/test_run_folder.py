"""A run folder is thence's own by its marker; nothing that thence did not write is ever removed or written over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import thence.pipeline.owned as owned
from tests.folders import THESIS, content, write
from tests.recipes import Tables, changed
from tests.runs import stop_in_rl
from thence.cli import main
from thence.errors import UserError
from thence.pipeline.run import run
from thence.toml import to_toml


@pytest.fixture
def short(tables: Tables) -> Tables:
    """One SFT stage of one step."""
    return changed(tables, {"stages": ["sft"]})


@pytest.mark.parametrize("restart", [["--restart"], []], ids=["restart", "resume"])
@pytest.mark.parametrize("inside", [True, False], ids=["in the folder", "from within"])
def test_a_folder_that_holds_a_recipe_and_a_thesis_is_no_run(
    short: Tables, tmp_path: Path, restart: list[str], inside: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place = tmp_path / "p"
    write(place / "recipe.toml", to_toml({key: value for key, value in short.items() if key != "folder"}))
    write(place / "thesis.txt")
    write(place / "sub" / "notes.txt")
    before = content(place)
    if inside:
        monkeypatch.chdir(place)
    folder = "." if inside else str(place)
    assert main(["run", str(place / "recipe.toml"), "--folder", folder, *restart]) == 2
    assert content(place) == before
    assert not (place / ".lock").exists()
    said = capsys.readouterr().err
    assert "recipe.toml, sub, thesis.txt" in said and "give another --folder" in said
    assert "remove" not in said and "delete" not in said


@pytest.mark.parametrize("restart", [True, False])
def test_a_recipe_alone_is_no_run_and_is_not_written_over(short: Tables, tmp_path: Path, restart: bool) -> None:
    text = "# mine\n" + to_toml({key: value for key, value in short.items() if key != "folder"})
    recipe = write(tmp_path / "p" / "recipe.toml", text)
    with pytest.raises(UserError, match=r"holds other things: recipe\.toml"):
        run(recipe, {"folder": str(tmp_path / "p")}, restart=restart)
    assert content(tmp_path / "p") == {"recipe.toml": text.encode()}


PLACES = (
    *("thesis.txt", "report.html.bak", "recipe.toml.bak", "runs/thesis.txt", "stages/thesis.txt", "stages/mine/thesis"),
    *("stages/sft/thesis.txt", "stages/sft/model/thesis.txt", "stages/sft/checkpoints/thesis.txt"),
    *("stages/sft/checkpoints/best/model.safetensors", "stages/sft/model/sub/thesis"),
    *("stages/eval/evaluation/thesis.txt", "stages/eval/evaluation/samples/thesis.txt"),
)


@pytest.mark.parametrize("place", PLACES)
def test_beginning_anew_in_a_run_that_holds_other_things_is_refused_and_removes_nothing(
    finished: Tables, place: str
) -> None:
    folder = Path(finished["folder"])
    write(folder / place)
    before = content(folder)
    with pytest.raises(UserError, match="did not write") as error:
        run(finished, restart=True)
    assert place.split("/thesis")[0].split("/model.safe")[0] in str(error.value)
    assert content(folder) == before


def test_a_run_with_notes_in_it_is_resumed_and_the_notes_stay(
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_in_rl(tables, monkeypatch)
    folder = Path(tables["folder"])
    notes = [folder / "notes.txt", folder / "stages" / "sft" / "model" / "README.md", folder / "stages/rl/notes.txt"]
    for note in notes:
        write(note)
    run(tables)
    assert [note.read_text() for note in notes] == [THESIS] * 3


def test_a_note_in_a_checkpoint_folder_outlives_the_checkpoint(short: Tables) -> None:
    run(changed(short, {"stages": ["sft", "sft-more"]}))
    folder = Path(short["folder"])
    note = write(folder / "stages" / "sft" / "checkpoints" / "step-000001" / "thesis.txt")
    run(changed(short, {"stages": ["sft", "sft-more"]}))
    assert note.read_text() == THESIS
    assert not list(folder.glob("stages/sft/checkpoints/step-*/*.safetensors"))


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("place", ["stages", "stages/sft", "stages/sft/model", "metrics.jsonl", "recipe.toml"])
def test_a_link_in_the_place_of_a_file_of_the_run_is_not_followed(
    finished: Tables, tmp_path: Path, place: str, restart: bool
) -> None:
    link, outside = Path(finished["folder"]) / place, tmp_path / "outside"
    link.rename(outside)
    link.symlink_to(outside)
    before = content(tmp_path)
    with pytest.raises(UserError, match="a link stands where"):
        run(finished, restart=restart)
    assert content(tmp_path) == before


def test_a_link_to_a_run_is_that_run(finished: Tables, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(finished["folder"])
    run({**finished, "folder": str(tmp_path / "link")}, restart=True)
    assert (Path(finished["folder"]) / "stages" / "sft" / "done.json").exists()
    assert (tmp_path / "link").is_symlink()


def test_beginning_anew_removes_all_that_thence_wrote_and_nothing_else(finished: Tables) -> None:
    folder = Path(finished["folder"])
    write(folder / "stages" / "sft" / "checkpoints" / ".writing-000007" / "model.safetensors")
    write(folder / "stages" / "sft" / ".model-writing" / "config.json")
    write(folder / "metrics.jsonl.damaged-1")
    write(folder / ".report.html.new")
    assert main(["report", str(folder)]) == 0
    run(changed(finished, {"stages": ["eval"]}), restart=True)
    left = {name for name in content(folder)}
    assert left == {
        *(".thence-run.json", "recipe.toml", "environment.json", "ground.json", "progress.json", "plan.json"),
        *("stages/eval/ground.json", "stages/eval/done.json", "stages/eval/result.json", "stages/eval/samples.jsonl"),
        *(f"stages/eval/evaluation/{name}" for name in ("evaluation.toml", "environment.json", "problems.json")),
        *("stages/eval/evaluation/samples/test-0.6.jsonl", "stages/eval/evaluation/grades/test-0.6.jsonl"),
    }


def test_beginning_anew_that_is_killed_is_completed_by_the_next_start(
    finished: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, removed = Path(finished["folder"]), []
    original = Path.unlink

    def dying(self: Path, missing_ok: bool = False) -> None:
        removed.append(self)
        if len(removed) == 4:
            raise KeyboardInterrupt
        original(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", dying)
        run(changed(finished, {"sft.lr": 5e-4}), restart=True)
    again = run(changed(finished, {"sft.lr": 5e-4}))
    assert (again / "stages" / "eval" / "done.json").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((folder / "metrics.jsonl").read_text())["lr"] == 5e-4


def test_a_recipe_that_was_edited_in_the_run_is_neither_believed_nor_written_over(
    finished: Tables, tmp_path: Path
) -> None:
    kept_recipe = Path(finished["folder"]) / "recipe.toml"
    edited = kept_recipe.read_text().replace("lr = 0.001", "lr = 0.5")
    assert edited != kept_recipe.read_text()
    kept_recipe.write_text(edited)
    for restart in (False, True):
        with pytest.raises(UserError, match=r"recipe\.toml"):
            run(kept_recipe, {"folder": finished["folder"]}, restart=restart)
        assert kept_recipe.read_text() == edited
    kept_recipe.rename(tmp_path / "mine.toml")  # the remedy
    with pytest.raises(UserError, match=r"sft\.lr was 0\.001, now 0\.5"):
        run(tmp_path / "mine.toml", {"folder": finished["folder"]})
    run(finished)
    assert "lr = 0.001" in kept_recipe.read_text()


def test_the_recipe_that_a_run_has_kept_can_be_given_to_it(finished: Tables) -> None:
    folder = Path(finished["folder"])
    before = (folder / "recipe.toml").read_text()
    assert main(["run", str(folder / "recipe.toml"), "--folder", str(folder)]) == 0
    assert main(["run", str(folder / "recipe.toml"), "--folder", str(folder), "--restart"]) == 0
    place = f'folder = "{folder}"'
    assert [place if line.startswith("folder = ") else line for line in before.splitlines()] == (
        (folder / "recipe.toml").read_text().splitlines()
    )


def test_a_run_of_the_version_before_is_known_by_its_recipe_and_environment(finished: Tables) -> None:
    folder = Path(finished["folder"])
    (folder / ".thence-run.json").unlink()
    run(finished)
    assert (folder / ".thence-run.json").exists()
    (folder / ".thence-run.json").unlink()
    write(folder / "thesis.txt")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        run(finished, restart=True)
    (folder / "thesis.txt").unlink()
    run(changed(finished, {"sft.lr": 5e-4}), restart=True)
    assert json.loads((folder / "metrics.jsonl").read_text())["lr"] == 5e-4


def test_a_recipe_of_the_users_own_in_a_run_of_the_version_before_is_kept(finished: Tables) -> None:
    folder = Path(finished["folder"])
    (folder / ".thence-run.json").unlink()
    mine = "# my own words\n" + (folder / "recipe.toml").read_text()
    write(folder / "recipe.toml", mine)
    run(finished)
    assert (folder / "recipe.toml").read_text() == mine
    with pytest.raises(UserError, match=r"recipe\.toml"):
        run(finished, restart=True)
    assert (folder / "recipe.toml").read_text() == mine


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}', "\x00\xff"])
def test_a_damaged_marker_is_said_and_its_remedy_works(finished: Tables, text: str, tmp_path: Path) -> None:
    marker = Path(finished["folder"]) / ".thence-run.json"
    marker.write_text(text)
    before = content(Path(finished["folder"]))
    for restart in (True, False):
        with pytest.raises(UserError) as error:
            run(finished, restart=restart)
        assert str(marker) in str(error.value)
        assert content(Path(finished["folder"])) == before
    marker.rename(tmp_path / "elsewhere")
    run(finished)


def test_a_marker_without_anything_else_is_a_run_that_has_just_begun(short: Tables) -> None:
    run(short)
    folder = Path(short["folder"])
    for path in folder.iterdir():
        if path.name != ".thence-run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(short)
    assert (folder / "stages" / "sft" / "done.json").exists()


def test_a_run_killed_while_it_writes_its_marker_goes_on(short: Tables) -> None:
    write(Path(short["folder"]) / "..thence-run.json.writing", '{"format": 1')
    folder = run(short)
    assert (folder / "stages" / "sft" / "done.json").exists()
    assert not (folder / "..thence-run.json.writing").exists()


def test_the_marker_is_the_first_file_of_a_run(short: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    original = os.replace

    def noted(self: Path, target: Path) -> Path:
        written.append(Path(target).name)
        original(self, target)
        return Path(target)

    monkeypatch.setattr(Path, "replace", noted)
    run(short)
    assert written[0] == owned.MARKER


def test_a_report_is_written_into_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "p" / "recipe.toml", 'stages = ["eval"]\n[model]\npath = "m"\n')
    write(tmp_path / "p" / "report.csv")
    before = content(tmp_path)
    assert main(["report", str(tmp_path / "p")]) == 2
    assert content(tmp_path) == before
    assert "no run at" in capsys.readouterr().err


def test_a_refused_evaluation_leaves_nothing_in_a_folder_of_others(tmp_path: Path) -> None:
    from thence.evaluate.run import evaluate
    from thence.evaluate.store import Settings

    write(tmp_path / "p" / "thesis.txt")
    with pytest.raises(UserError, match="holds no evaluation"):
        evaluate(Settings(model="m", suite="s", tasks={}), {}, tmp_path / "p", lambda: pytest.fail("opened"))
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["thesis.txt"]
