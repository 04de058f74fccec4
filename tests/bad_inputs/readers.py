"""Data files: JSON lines and Parquet with their bytes damaged, or rows of the wrong shape."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.recipes import ROWS
from thence.toml import to_toml

from .damage import damaged
from .ground import Ground, evaluation_of
from .harness import Case

SHAPES: list[Any] = [3, None, [], [1], "text", True, {}, {"prompt": 3}, {"prompt": "a"}, {"completion": "b"}]
SHAPES += [{"prompt": None, "completion": None, "answer": None}, {"prompt": [], "completion": {}}, {"messages": 3}]
SHAPES += [{"messages": []}, {"messages": [3]}, {"messages": [{"role": "user"}]}, {"messages": {"role": "user"}}]
SHAPES += [{"messages": [{"role": 3, "content": []}]}, {"prompt": {"a": {"b": 1}}, "completion": "x"}, {"": ""}]
SHAPES += [{"prompt": "a", "completion": [[[[]]]]}, {"prompt": True, "completion": "b", "answer": "b"}]
RAW = [b'{"prompt": "a", "completion": "b"', b"[" * 100_000, b'{"prompt": "\\ud800", "completion": "b"}']
RAW += [b"{]}", b"NaN"]


def bad_jsonl(ground: Ground, folder: Path, rng: Random) -> Case:
    """A file of JSON lines with its bytes damaged, or with one line of another shape."""
    lines = [json.dumps(row).encode() for row in ROWS]
    if rng.random() < 0.5:
        how, raw = damaged(b"\n".join(lines) + b"\n", rng)
        nonsense = not _all_objects(raw)
    else:
        odd = rng.choice([*RAW, *(json.dumps(shape).encode() for shape in SHAPES)])
        lines.insert(rng.randrange(len(lines) + 1), odd)
        nonsense = odd != b'{"prompt": "a"}'  # a prompt alone may stand among others: RL counts it as without an answer
        how, raw = f"a line {odd[:50]!r}", b"\n".join(lines) + b"\n"
    name = rng.choice(["rows.jsonl", "rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
    (folder / name).write_bytes(raw)
    return Case(_reading(ground, folder, name, rng), f"{name}: {how}", nonsense)


def bad_parquet(ground: Ground, folder: Path, rng: Random) -> Case:
    """A Parquet file with its bytes damaged, or with columns of other types."""
    if rng.random() < 0.7:
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "whole.parquet")
        how, raw = damaged((folder / "whole.parquet").read_bytes(), rng)
        (folder / "whole.parquet").unlink()
        (folder / "rows.parquet").write_bytes(raw)
        nonsense = raw[:4] != b"PAR1" or raw[-4:] != b"PAR1"
    else:
        columns = rng.choice(
            [
                {"prompt": pa.array([1, 2]), "completion": pa.array([b"\xff", b"x"])},
                {"prompt": pa.array([None, None]), "completion": pa.array([None, None])},
                {"prompt": pa.array([[1], [2]]), "completion": pa.array([{"a": 1}, {"a": 2}])},
                {"zzz": pa.array([1.0, float("nan")])},
                {"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())},
                {"messages": pa.array([[{"role": "user"}], []])},
            ]
        )
        pq.write_table(pa.table(columns), folder / "rows.parquet")
        how, nonsense = f"columns {list(columns)} of {[str(c.type) for c in columns.values()]}", True
    return Case(_reading(ground, folder, "rows.parquet", rng), f"rows.parquet: {how}", nonsense)


def _reading(ground: Ground, folder: Path, name: str, rng: Random) -> list[str]:
    """A command that reads the file."""
    if rng.random() < 0.3:
        argv = evaluation_of(ground.folder, folder / "eval")
        argv[argv.index("--suite") + 1] = name
        return argv
    tables = {**ground.tables, "folder": str(folder / "run"), "data": {"source": [str(folder / name)]}}
    (folder / "recipe.toml").write_text(to_toml(tables))
    return ["run", "recipe.toml", "--dry-run"] if rng.random() < 0.7 else ["run", "recipe.toml"]


def _all_objects(raw: bytes) -> bool:
    """Whether every line is an object, there is one, and no byte is out of place; by the standard library alone."""
    try:
        rows = [json.loads(line) for line in raw.decode("utf-8-sig").split("\n") if line.strip()]
    except ValueError:
        return False
    return bool(rows) and all(isinstance(row, dict) for row in rows)
