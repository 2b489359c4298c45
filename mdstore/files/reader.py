"""Reads operations from a file; the file name decides the format."""

from __future__ import annotations

import shutil
import sys
import tempfile
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mdstore.errors import InvalidRequest
from mdstore.files import csv_file, jsonl, parquet_file
from mdstore.files.csv_file import Dialect
from mdstore.files.rows import FIELDS, Rows
from mdstore.model import OpName
from mdstore.settings import Settings
from mdstore.store.payload_builder import OperationInput
from mdstore.store.validation import FieldError, LineTooLong

_KEPT_IN_MEMORY = 4 * 2**20  # bytes of standard input


def read_operations(
    path: str,
    *,
    entity: str | None = None,
    key: str | None = None,
    op: OpName = "upsert",
    fields: dict[str, str] | None = None,
    dialect: Dialect = "standard",
    settings: Settings | None = None,
) -> OperationFile:
    """Return the operations of a file. The path `-` means JSON Lines from standard input.

    With `entity` and `key`, each row of a CSV or Parquet file, and each object of a JSON Lines file, is a record and becomes an
    operation `op` on `entity`. Its column `key` holds the key, the columns in `fields` hold other fields of the operation,
    and all others are the data. Without them, a JSON Lines file holds operations, or records as `mdstore export` writes them.

    `settings` limit the bytes and the values of a line or row. A line that is much too long is never held in memory.

    Raises `InvalidRequest` if the file is missing or its format unknown, or if the options do not fit the file.
    """
    name = path.lower()
    if path != "-" and not Path(path).is_file():
        raise InvalidRequest(field="file", value=path, expected="an existing file")
    is_table = name.endswith((".csv", ".parquet"))
    if not is_table and path != "-" and not name.endswith(jsonl.SUFFIXES):
        expected = f"- or a name that ends in {', '.join(jsonl.SUFFIXES)}, .csv or .parquet"
        raise InvalidRequest(field="file", value=path, expected=expected)
    if bool(entity) != bool(key) or (is_table and not entity):
        expected = "--entity and --key for a CSV or Parquet file, or both of them for a file of JSON records"
        raise InvalidRequest(field="file", value=path, expected=expected)
    if fields and not entity:
        raise InvalidRequest(field="--column", value=", ".join(fields), expected="--entity and --key beside it")
    rows = Rows(entity=entity, key=key, op=op, fields=fields or {}) if entity and key else None
    return OperationFile(path, rows=rows, op=op, dialect=dialect, settings=settings or Settings())


class OperationFile:
    """The operations of one file. Iterate over it to read them; `place` then returns where each of them was.

    Reading raises `InvalidRequest`, which names the file, if the file is empty, damaged or not of its format. A single line or
    row that is invalid becomes a refusal instead.
    """

    def __init__(self, path: str, *, rows: Rows | None, op: OpName, dialect: Dialect, settings: Settings) -> None:
        self.path = path
        self.rows = rows
        self._op = op
        self._dialect = dialect
        self._settings = settings
        self._unit = "row" if path.lower().endswith(".parquet") else "line"
        self._standard_input: IO[bytes] | None = None
        # Indexes at which the distance between an operation's index and its line changes, and the lines there.
        self._indexes: list[int] = []
        self._lines: list[int] = []
        with _file_errors(path):
            self.columns = self._columns()

    def __iter__(self) -> Iterator[OperationInput]:
        self._indexes, self._lines = [], []
        expected = -1
        with _file_errors(self.path):
            for index, (line, operation) in enumerate(self._operations()):
                if line != expected:
                    self._indexes.append(index)
                    self._lines.append(line)
                expected = line + 1
                yield operation
        if not self._indexes:
            raise InvalidRequest(field="file", value=self.path, expected="at least one operation or record")

    def place(self, index: int) -> str:
        """Return the place of an operation that was read, for example `line 7`. `index` is zero-based."""
        position = bisect_right(self._indexes, index) - 1
        return f"{self._unit} {self._lines[position] + index - self._indexes[position]}"

    def unused_fields(self) -> list[str]:
        """Return the columns that are data although they are named like a field of an operation."""
        taken = self.rows.fields.values() if self.rows else ()
        return [name for name in self.columns if name in FIELDS and name not in taken]

    def keep_standard_input(self) -> None:
        """Copy standard input to a temporary file, so that it can be read twice."""
        if self.path == "-" and self._standard_input is None:
            self._standard_input = tempfile.SpooledTemporaryFile(max_size=_KEPT_IN_MEMORY)  # noqa: SIM115  kept
            shutil.copyfileobj(sys.stdin.buffer, self._standard_input)

    def _columns(self) -> list[str]:
        """Return the names of the columns, or nothing for JSON Lines. Raises `InvalidRequest` if they do not fit the rows."""
        if self.rows is None:
            return []
        if self.path.lower().endswith(".parquet"):
            return parquet_file.columns(self.path, self.rows)
        if self.path.lower().endswith(".csv"):
            _, header = next(self._csv_rows(), (1, []))
            self.rows.check_columns(header, path=self.path)
            return header
        return []

    def _operations(self) -> Iterator[tuple[int, OperationInput]]:
        if self.rows is None:
            return ((number, jsonl.operation(line, self._op)) for number, line in self._json_lines())
        return (
            (number, row if isinstance(row, FieldError) else self.rows.operation(row))
            for number, row in self._records()
        )

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | FieldError]]:
        name = self.path.lower()
        if name.endswith(".parquet"):
            return parquet_file.records(self.path)
        if name.endswith(".csv"):
            return self._csv_records()
        limit = self._settings.max_record_values
        return ((number, jsonl.record(line, max_values=limit)) for number, line in self._json_lines())

    def _json_lines(self) -> Iterator[tuple[int, bytes | LineTooLong]]:
        return jsonl.lines(self.path, self._rewound(), max_record_bytes=self._settings.max_record_bytes)

    def _csv_rows(self) -> Iterator[tuple[int, list[str]]]:
        return csv_file.rows(self.path, self._dialect, limit=self._settings.max_record_bytes)

    def _csv_records(self) -> Iterator[tuple[int, dict[str, Any] | FieldError]]:
        rows = self._csv_rows()
        next(rows, None)  # the header
        for number, row in rows:
            if len(row) == len(self.columns):
                yield number, dict(zip(self.columns, row, strict=True))
            else:
                yield number, FieldError("line", f"row of {len(row)} values for {len(self.columns)} columns")

    def _rewound(self) -> IO[bytes] | None:
        if self._standard_input is not None:
            self._standard_input.seek(0)
        return self._standard_input


def check_readable(files: Sequence[OperationFile]) -> None:
    """Read all files to their end, so that a damaged one is found before the first of them is sent.

    A single file needs no such check: nothing is sent before the whole file has been read.
    """
    if sum(file.path == "-" for file in files) > 1:
        raise InvalidRequest(field="file", value="-", expected="standard input only once")
    if len(files) > 1:
        for file in files:
            file.keep_standard_input()
            deque(file, maxlen=0)


@contextmanager
def _file_errors(path: str) -> Iterator[None]:
    """Translate the errors of reading a file into `InvalidRequest`, which names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(field="file", value=path, expected=f"a readable, undamaged file ({why})") from error
