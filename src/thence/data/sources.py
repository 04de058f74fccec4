"""Where rows come from: JSONL and Parquet files, and Hugging Face data sets, each as numbered rows."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.data.problems import RowProblem
from thence.errors import DataError, UserError
from thence.given_files import kind_of_file
from thence.wording import json_kind

NumberedRow = tuple[int, dict[str, Any] | RowProblem]

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True, slots=True)
class DataTable:
    """A data set as numbered rows.

    Attributes:
        name: what errors call it: the path, or the hub name with its split.
        group: the name its rows are reported under unless they carry a `data_source`.
        columns: the names of all its columns; None where only reading the rows tells (JSONL).
        rows: (number counted from 1, row); a row that could not be read is a `RowProblem` in its place.
    """

    name: str
    group: str
    columns: tuple[str, ...] | None
    rows: Iterator[NumberedRow]


def open_table(name: str, *, split: str, wanted: Collection[str], others: bool = False) -> DataTable:
    """Open a file, a folder or a hub data set.

    Args:
        name: path of a .jsonl/.json/.ndjson (.gz too) or .parquet file; else a folder written by `datasets` or holding
            data files, or a hub name, with `:config` after it where the data set has configurations.
        split: the split of a folder or hub data set; files have none.
        wanted: the columns that matter; others are not loaded where the format allows it.
        others: load the other columns too, but for pictures, sounds and raw bytes.

    Raises:
        UserError: the file does not exist or the data set cannot be loaded.
        DataError: the file is damaged.
    """
    path = Path(name).expanduser()
    lowered = path.name.lower()
    known = lowered.endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)
    if path.is_file() and not known:
        raise UserError(
            "unknown kind of data file",
            remedy=f"give a file ending in one of {', '.join(JSON_SUFFIXES + PARQUET_SUFFIXES)}",
            file=path,
        )
    if not path.exists() and (known or name.startswith(("/", "./", "../", "~"))):
        raise UserError(
            "no such file",
            remedy="check the path: in a recipe's file it starts where that file lies, elsewhere at the current folder",
            file=path,
        )
    if (kind := _kind(path)) not in (None, "a folder"):
        raise UserError(f"{kind} is no data file", remedy="write the rows to a file, and give that", file=path)
    if path.is_dir() and known:
        raise UserError(
            "a folder that is named like a file", remedy="give the file in it, or rename the folder", file=path
        )
    if path.is_file():
        group = path.name[: path.name.index(".", 1)] if "." in path.name[1:] else path.name
        if lowered.endswith(PARQUET_SUFFIXES):
            return _parquet_table(path, group, wanted, others)
        return DataTable(str(path), group, None, _json_rows(path))
    return _hub_table(name, path, split, wanted, others)


def _kind(path: Path) -> str | None:
    try:
        return kind_of_file(path)
    except OSError:  # nothing there, or a name that no file can have: a name on the hub, perhaps
        return None


def _json_rows(path: Path) -> Iterator[NumberedRow]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _json_row(line)
    except (EOFError, zlib.error, OSError) as error:
        raise _damaged(path, number, error) from error


def _damaged(path: Path, rows_read: int, error: Exception) -> DataError:
    return DataError(f"damaged here: {error}", remedy="download or write the file again", file=path, line=rows_read + 1)


def _json_row(line: bytes) -> dict[str, Any] | RowProblem:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RowProblem(None, f"not UTF-8 (byte {error.start + 1} of the line)", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        if line.strip() == b"[":
            return _json_array()
        return RowProblem(None, f"not JSON: {error.msg} (column {error.colno})", "write one JSON object a line")
    except (ValueError, RecursionError) as error:
        return RowProblem(None, f"not usable JSON: {error}", "write one JSON object a line")
    if isinstance(row, list):
        return _json_array()
    if not isinstance(row, dict):
        return RowProblem(None, f"expected a JSON object, found {json_kind(row)}", "write one JSON object a line")
    return row


def _json_array() -> RowProblem:
    return RowProblem(None, "a JSON array, not one object a line", "convert it: jq -c '.[]' data.json > data.jsonl")


def _parquet_table(path: Path, group: str, wanted: Collection[str], others: bool) -> DataTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        columns = tuple(column for column in schema.names if column != "__index_level_0__")
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: {error}", remedy="download or write the file again", file=path
        ) from error
    plain = {field.name for field in schema if "binary" not in str(field.type)} if others else set[str]()
    kept = [column for column in columns if column in wanted or column in plain]
    return DataTable(str(path), group, columns, _parquet_rows(path, kept))


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, number, error) from error


def _batch_rows(batch: Any) -> list[dict[str, Any]] | list[dict[str, Any] | RowProblem]:
    try:
        return _with_short_numbers(batch).to_pylist()
    except UnicodeDecodeError:
        return [_parquet_row(batch.slice(position, 1)) for position in range(batch.num_rows)]


def _with_short_numbers(batch: Any) -> Any:
    """Columns of half and single precision with the shortest number that rounds to theirs: 0.1, not 0.10000000149."""
    import pyarrow as pa

    for place, field in enumerate(batch.schema):
        if pa.types.is_float16(field.type) or pa.types.is_float32(field.type):
            shortest = [None if x is None else float(str(x)) for x in _scalars(batch.column(place))]
            batch = batch.set_column(place, field.name, pa.array(shortest, pa.float64()))
    return batch


def _scalars(column: Any) -> Any:
    """NumPy scalars of a column in its own precision; None where it is null."""
    values, valid = column.to_numpy(zero_copy_only=False), column.is_valid().to_pylist()
    return [value if ok else None for value, ok in zip(values, valid, strict=True)]


def _parquet_row(one: Any) -> dict[str, Any] | RowProblem:
    for name in one.schema.names:
        try:
            one.column(name).to_pylist()
        except UnicodeDecodeError as error:
            return RowProblem(name, f"not UTF-8 (byte {error.start + 1})", "write the file with UTF-8 text")
    return one.to_pylist()[0]


def _hub_table(name: str, path: Path, split: str, wanted: Collection[str], others: bool) -> DataTable:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading a folder or a data set from the Hugging Face hub needs the package datasets",
            remedy="pip install 'thence[datasets]', or give a local .jsonl or .parquet file",
            file=name,
        ) from None
    try:
        rows = _load(datasets, name, path, split)
    except Exception as error:  # datasets and huggingface_hub raise dozens of unrelated types here
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the data set cannot be loaded: {first_line}",
            remedy="check the name (and :config), the split and the network; or give a local .jsonl or .parquet file",
            file=name,
            field=f"split {split}",
        ) from error
    columns = tuple(column for column in rows.column_names if column != "__index_level_0__")
    media = ("Image(", "Audio(", "Video(", "binary")
    features = (others and getattr(rows, "features", None)) or {}
    plain = {name for name, kind in features.items() if not any(word in str(kind) for word in media)}
    kept = rows.select_columns([column for column in columns if column in wanted or column in plain])
    group = path.name if path.is_dir() else name.partition(":")[0].rpartition("/")[2]
    return DataTable(f"{name}[{split}]", group, columns, enumerate(iter(kept), start=1))


def _load(datasets: Any, name: str, path: Path, split: str) -> Any:
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path))[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return datasets.load_dataset(str(path), split=split)
    hub_name, _, config = name.partition(":")
    return datasets.load_dataset(hub_name, config or None, split=split)
