"""Reads the rows of CSV and Parquet files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdstore.errors import InvalidRequest

_ABSENT: Any = object()
_MAX_FIELD = 16 * 2**20  # characters of one CSV value; if a closing quote is missing, csv reads on up to this limit


def csv_rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV file with a header; all values are strings.

    Raises `InvalidRequest` if the file is not valid CSV or has no column `key`.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(_MAX_FIELD)  # for the whole process; csv's default is less than a record may hold
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
        raise InvalidRequest(field="--key", value=key, expected=f"one of the columns {', '.join(columns)}")
    for row in reader:
        surplus = len(row.pop(None, []))  # csv stores values that have no column under the key None
        absent = sum(value is _ABSENT for value in row.values())
        if surplus or absent:
            # This is no valid operation. It is refused as invalid, and the reason contains the name of this field.
            yield {f"row of {len(columns) + surplus - absent} values for {len(columns)} columns": None}
        else:
            yield row


def parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file. Raises `InvalidRequest` if pyarrow is not installed."""
    try:
        from pyarrow import parquet  # noqa: PLC0415  only Parquet files need this optional dependency
    except ImportError as error:
        raise InvalidRequest(
            field="file", value=path, expected="pyarrow to be installed (pip install pyarrow)"
        ) from error
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1_000):
            yield from batch.to_pylist()
