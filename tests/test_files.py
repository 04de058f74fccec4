"""One reader refuses every kind of damage, and a file made from others keeps the unreadable one."""

from __future__ import annotations

from pathlib import Path

from tests.damage import damaged, harm, refused, sampled
from thence.files import read_json, write_over
from thence.files import to_json as plain_json


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
