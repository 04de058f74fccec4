"""Files of an evaluation that are damaged: refused, or set aside and sampled again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.damage import damaged, harm, refused, sampled
from tests.evaluate.counting import Counting, settings_of
from tests.evaluate.counting import run as evaluated
from thence.cli import main
from thence.evaluate.store import Store
from thence.evaluate.summary import summarise as numbers_of


@sampled
@damaged
@pytest.mark.parametrize("name", ["environment.json", "evaluation.toml"])
def test_an_evaluation_refuses_its_damaged_files(tmp_path: Path, data: Path, name: str, kind: str) -> None:
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
    data: Path,
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
    data: Path,
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
