"""Tables: rows of CSV and Parquet files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdstore.errors import InvalidRequest

_ABSENT: Any = object()
_MAX_FIELD = 16 * 2**20  # bytes of a CSV file's value; without the end of a quoted one, csv reads on


def csv_rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file with a header, as text. Raises `InvalidRequest` where it is no CSV or has no column `key`."""
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


def parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file. Raises `InvalidRequest` where pyarrow is not installed."""
    try:
        from pyarrow import parquet  # noqa: PLC0415  an optional dependency of one file type
    except ImportError as error:
        raise InvalidRequest(
            field="file", value=path, expected="pyarrow to be installed (pip install pyarrow)"
        ) from error
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1_000):
            yield from batch.to_pylist()
