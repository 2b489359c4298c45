"""Operations from files: JSON Lines as they are, rows of CSV and Parquet as one operation each."""

from __future__ import annotations

import codecs
import csv
import gzip
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mdstore.draft import Source
from mdstore.errors import InvalidRequest
from mdstore.model import OpName

_ABSENT: Any = object()
_MAX_FIELD = 16 * 2**20  # bytes of a CSV file's value; without the end of a quoted one, csv reads on
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


def read_operations(
    path: str, *, entity: str | None = None, key: str | None = None, op: OpName = "upsert"
) -> Iterator[Source]:
    """The operations of a file, one by one. `-` is JSON Lines from standard input.

    A table's rows become `op` of `entity`, their key in column `key`; the rest of the row is the data (of a CSV file, as
    text). Raises `InvalidRequest` where the file is missing, of no known kind, or no CSV.
    """
    name = path.lower()
    if path != "-" and not Path(path).is_file():
        raise InvalidRequest(field="file", value=path, expected="a file")
    if path == "-" or name.endswith(_JSON_SUFFIXES):
        return _lines(path)
    if name.endswith((".csv", ".parquet")):
        if not entity or not key:
            raise InvalidRequest(field="file", value=path, expected="--entity and --key with a table")
        rows = _csv_rows(path, key) if name.endswith(".csv") else _parquet_rows(path)
        return _row_operations(rows, entity=entity, key=key, op=op)
    raise InvalidRequest(
        field="file", value=path, expected="a name that ends in .jsonl, .jsonl.gz, .csv or .parquet, or -"
    )


def _lines(path: str) -> Iterator[bytes]:
    with ExitStack() as stack:
        stream: Iterable[bytes]
        if path == "-":
            stream = sys.stdin.buffer
        elif path.lower().endswith(".gz"):
            stream = stack.enter_context(gzip.open(path, "rb"))
        else:
            stream = stack.enter_context(Path(path).open("rb"))
        for number, line in enumerate(stream):
            stripped = line.removeprefix(codecs.BOM_UTF8).strip() if number == 0 else line.strip()
            if stripped:
                yield stripped


def _csv_rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(_MAX_FIELD)  # of the process; csv's own is smaller than records may be
        reader = csv.DictReader(stream, restval=_ABSENT)
        try:
            yield from _whole_rows(reader, key)
        except csv.Error as error:
            raise InvalidRequest(
                field="file", value=f"{path}, after line {reader.line_num}", expected=f"CSV ({error})"
            ) from error


def _whole_rows(reader: csv.DictReader[str], key: str) -> Iterator[dict[str, Any]]:
    columns = list(reader.fieldnames or [])
    if key not in columns:
        raise InvalidRequest(field="--key", value=key, expected=f"a column: {', '.join(columns)}")
    for row in reader:
        surplus = len(row.pop(None, []))  # where csv puts what has no column
        absent = sum(value is _ABSENT for value in row.values())
        if surplus or absent:
            # Not an operation: it is refused as invalid, and the reason tells why.
            yield {f"row of {len(columns) + surplus - absent} values for {len(columns)} columns": None}
        else:
            yield row


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet  # noqa: PLC0415  an optional dependency of one file type
    except ImportError as error:
        raise InvalidRequest(
            field="file", value=path, expected="pyarrow to be installed (pip install pyarrow)"
        ) from error
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1_000):
            yield from batch.to_pylist()


def _row_operations(rows: Iterator[dict[str, Any]], *, entity: str, key: str, op: OpName) -> Iterator[Source]:
    for row in rows:
        data = dict(row)
        found = data.pop(key, None)
        if key not in row:
            yield {"op": op, "entity": entity, **row}
            continue
        operation: dict[str, Any] = {"op": op, "entity": entity, "key": found if found is None else str(found)}
        yield operation if op in ("delete", "check") else operation | {"data": data}
