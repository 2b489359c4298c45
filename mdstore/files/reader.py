"""The operations of a file, whatever its format."""

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
    """The operations of a file, one by one. `-` is JSON Lines from standard input.

    A table's rows become `op` of `entity`, their key in column `key`; the rest of the row is the data (of a CSV file, as
    text). Raises `InvalidRequest` where the file is missing, of no known kind, or no CSV.
    """
    name = path.lower()
    if path != "-" and not Path(path).is_file():
        raise InvalidRequest(field="file", value=path, expected="a file")
    if path == "-" or name.endswith(jsonl.SUFFIXES):
        return jsonl.lines(path)
    if name.endswith((".csv", ".parquet")):
        if not entity or not key:
            raise InvalidRequest(field="file", value=path, expected="--entity and --key with a table")
        rows = tables.csv_rows(path, key) if name.endswith(".csv") else tables.parquet_rows(path)
        return _row_operations(rows, entity=entity, key=key, op=op)
    raise InvalidRequest(
        field="file", value=path, expected="a name that ends in .jsonl, .jsonl.gz, .csv or .parquet, or -"
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
