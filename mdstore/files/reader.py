"""Reads operations from a file; the file name decides the format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdstore.errors import InvalidRequest
from mdstore.files import jsonl, tables
from mdstore.model import OpName
from mdstore.store.operations import OPERATIONS
from mdstore.store.payload_builder import OperationInput


def read_operations(
    path: str, *, entity: str | None = None, key: str | None = None, op: OpName = "upsert"
) -> Iterator[OperationInput]:
    """Yield the operations of a file. The path `-` means JSON Lines from standard input.

    Each row of a CSV or Parquet file becomes an operation `op` on `entity`. The column `key` holds the key; the other columns
    are the data. CSV values are strings. Raises `InvalidRequest` if the file is missing, of unknown format, or not valid CSV.
    """
    name = path.lower()
    if path != "-" and not Path(path).is_file():
        raise InvalidRequest(field="file", value=path, expected="an existing file")
    if path == "-" or name.endswith(jsonl.SUFFIXES):
        return jsonl.lines(path)
    if name.endswith((".csv", ".parquet")):
        if not entity or not key:
            raise InvalidRequest(field="file", value=path, expected="--entity and --key for a CSV or Parquet file")
        rows = tables.csv_rows(path, key) if name.endswith(".csv") else tables.parquet_rows(path)
        return _row_operations(rows, entity=entity, key=key, op=op)
    raise InvalidRequest(
        field="file",
        value=path,
        expected="- or a name that ends in .jsonl, .ndjson, .jsonl.gz, .ndjson.gz, .csv or .parquet",
    )


def _row_operations(rows: Iterator[dict[str, Any]], *, entity: str, key: str, op: OpName) -> Iterator[OperationInput]:
    for row in rows:
        data = dict(row)
        found = data.pop(key, None)
        if key not in row:
            yield {"op": op, "entity": entity, **row}
            continue
        operation: dict[str, Any] = {"op": op, "entity": entity, "key": found if found is None else str(found)}
        yield operation | {"data": data} if OPERATIONS[op].needs_data else operation
