"""Problems for the tests of evaluations."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evaluate.answering_server import Server
from tests.evaluate.asking import Evaluation
from tests.evaluate.suite_files import AIME, AMC, ARC, luffy_row, write_lines


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six problems in a file of one's own."""
    file = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def evaluation(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thence.evaluate.endpoint.LONGEST_WAIT", 0.01)
    return Evaluation(server, tmp_path)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A folder with small files of the same layout as the real ones."""
    rows = [luffy_row("math", "What is $x$?", r"\frac{1}{2}", 0)]
    rows += [luffy_row("aime", text, answer, i) for i in range(32) for text, answer in AIME.items()]
    rows += [luffy_row("amc", text, answer, i) for i in range(32) for text, answer in AMC.items()]
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "valid.all.parquet")
    pq.write_table(pa.Table.from_pylist([luffy_row("arc_c", *ARC, 0)]), folder / "valid.arc_c.parquet")
    lines = [
        {"question": "48 clips, then half of it. How many?", "answer": "48/2=<<48/2=24>>24\n#### 1,072"},
        {"question": "Two and two?", "answer": "2+2=4\n#### 4"},
    ]
    write_lines(folder / "test.jsonl", lines)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Play the package datasets with these rows; returns the list of what was asked for."""

    def play(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        class Rows(list):
            @property
            def column_names(self) -> list[str]:
                return list(self[0])

            def select_columns(self, names: list[str]) -> Rows:
                return Rows({name: row[name] for name in names} for row in self)

        def load_dataset(name: str, config: str | None = None, *, split: str) -> Rows:
            asked.append((name, config, split))
            return Rows(rows)

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    return play


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()
