"""Reads CSV files as RFC 4180 defines them, strictly: malformed CSV is an error, because guessing could lose rows."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

from mdstore.errors import InvalidRequest

Dialect = Literal["standard", "backslash"]
_PIECE = 2**16  # bytes


class _Lines:
    """The lines of a text stream. Raises `csv.Error` if a row has more than `limit` characters: set `taken` to 0 after each."""

    def __init__(self, stream: TextIO, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._limit - self.taken + 1)
        if not line:
            raise StopIteration
        self.taken += len(line)
        if self.taken > self._limit:
            raise csv.Error(f"a row of more than {self._limit} characters")
        return line


def rows(path: str, dialect: Dialect, *, limit: int) -> Iterator[tuple[int, list[str]]]:
    r"""Yield each row with the number of its first line; the first row is the header. Blank lines are left out.

    In the dialect `backslash`, a backslash makes the next character literal: `"a \"b\" c"`. Raises `InvalidRequest`, which
    names the file and the line, if the file is not CSV in UTF-8, or if a row has more than `limit` characters.
    """
    escape = "\\" if dialect == "backslash" else None
    line = 1
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(limit)  # for the whole process; the default is less than a record may hold
        lines = _Lines(stream, limit)
        reader = csv.reader(lines, strict=True, escapechar=escape)
        try:
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
                lines.taken = 0
        except csv.Error as error:
            # After a quote that is never closed, parsing fails far below the cause, which is in the row's first line.
            raise InvalidRequest(field="file", value=f"{path}, line {line}", expected=f"CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                field="file",
                value=f"{path}, line {_undecodable_line(path)}",
                expected=f"text in UTF-8 ({error.reason})",
            ) from error


def _undecodable_line(path: str) -> int:
    """Return the number of the first line that is not UTF-8. The text stream decodes many lines at once and names none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    with Path(path).open("rb") as stream:
        while piece := stream.read(_PIECE):  # a line may be as long as the file
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return number + error.object[: error.start].count(b"\n")
            number += piece.count(b"\n")
    return number
