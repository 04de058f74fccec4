"""Files of JSON lines with torn, zeroed and bad lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from thence.jsonl import BadLine, read_lines, repair_lines, stream_lines


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
