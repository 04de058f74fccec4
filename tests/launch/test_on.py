"""``--on``: what may stand there, what it goes with, and a machine without Ray. Nothing here needs Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thence.cli import main
from thence.cli.on_ray import arguments_of
from thence.compare.needs import LIBRARIES, Asked, needs_of
from thence.errors import UserError
from thence.launch import facts
from thence.launch.base import Needs
from thence.launch.cluster import LOCAL, address_of


@pytest.mark.parametrize(
    ("on", "address"),
    [
        ("ray", LOCAL),
        ("ray:local", LOCAL),
        ("ray:auto", "auto"),
        ("ray:10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray:ray://head:10001", "ray://head:10001"),
        ("ray:[::1]:6379", "[::1]:6379"),
    ],
)
def test_addresses(on: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address_of(on) == address


def test_without_an_address_that_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address_of("ray") == "10.0.0.1:6379" and address_of("ray:auto") == "auto"


@pytest.mark.parametrize(
    "on", ["", "slurm", "ray:", "ray:head", "ray:head:port", "ray:head:99999", "ray:ray://", "rays"]
)
def test_other_places_are_refused(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError) as told:
        address_of(on)
    assert told.value.field == "--on" and "HOST:PORT" in told.value.remedy


@pytest.mark.parametrize("flag", ["--cores", "--gpus", "--memory-gb", "--restarts"])
def test_flags_of_a_cluster_are_refused_without_one(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", flag, "1"]) == 2
    assert f"{flag}: it goes with --on" in capsys.readouterr().err
    if flag != "--restarts":
        assert main(["compare", "quick", flag, "1"]) == 2
        assert f"{flag}: it goes with --on" in capsys.readouterr().err


def test_ranks_without_a_cluster_and_a_dry_run_on_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--ranks", "2"]) == 2
    assert "--ranks: it is for --dry-run" in capsys.readouterr().err
    assert main(["run", "quickstart", "--on", "ray", "--dry-run"]) == 2
    assert "--on: a dry run starts no ranks" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["compare", "quick"], ["run", "quickstart"]])
def test_without_ray_the_command_says_how_to_install_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "--folder", str(tmp_path / "f"), "--on", "ray"]) == 2
    assert 'ray is not installed\n  remedy: install it: pip install "thence[ray]"' in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_a_command_line_is_made_again_from_its_fields() -> None:
    fields = {"sft.lr": "1e-4", "data.source": '["a b"]', "rl.system": ""}
    said = ["r.toml", "--sft.lr=1e-4", '--data.source=["a b"]', "--rl.system="]
    assert arguments_of("r.toml", fields) == said


def test_needs_are_what_was_asked_or_what_is_planned() -> None:
    recipe = {
        "stages": ["sft"],
        "model": {"path": "world:chain/rich"},
        "data": {"source": ["world:chain"], "limit": 8},
        "sft": {"steps": 1, "batch": 8, "micro_batch_tokens": 512},
    }
    asked = needs_of(recipe, Path("/"), Asked(2, 0.5, 3))
    assert asked == Needs(2, 0.5, 3_000_000_000)
    assert needs_of(recipe, Path("/"), Asked(2, 0, 0)).memory is None
    small = needs_of(recipe, Path("/"), Asked(1, 0)).memory
    large = needs_of({**recipe, "sft": {**recipe["sft"], "micro_batch_tokens": 65536}}, Path("/"), Asked(1, 0)).memory
    assert small is not None and large is not None and LIBRARIES < small < large
    assert needs_of({**recipe, "model": {"path": "not/there"}}, Path("/"), Asked(1, 0)).memory is None
    assert Needs(1, 0, 5).cover(Needs(1, 0, 4)) and Needs(1, 0, 5).cover(Needs(1))
    assert not Needs(1, 0, 5).cover(Needs(1, 0, 6)) and not Needs(1, 1).cover(Needs(1))


def test_what_a_node_has_is_told_by_the_program_alone() -> None:
    """As it is sent to a node: as text, where nothing of thence may be installed."""
    import json

    source = Path(facts.__file__).read_text()
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["software"] == facts.software()
    without = subprocess.run([sys.executable, "-S", "-I", "-c", source], capture_output=True, text=True, check=True)
    assert json.loads(without.stdout)["software"]["thence"] == "missing"


def test_a_folder_is_shared_where_a_word_is_read_and_an_answer_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "SEES_AFTER", 0.1)
    probe, answer = tmp_path / "probe", tmp_path / "answer"
    assert "No such file" in facts.sees(str(probe), "word", str(answer))
    probe.write_text("other")
    assert facts.sees(str(probe), "word", str(answer)) == "it sees another file there"
    probe.write_text("word")
    assert facts.sees(str(probe), "word", str(answer)) == "" and answer.read_text() == "word"
    assert "it cannot write there" in facts.sees(str(probe), "word", str(tmp_path / "absent" / "answer"))
