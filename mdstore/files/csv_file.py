"""Reads CSV files as RFC 4180 defines them, strictly: malformed CSV is an error, because guessing could lose rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mdstore.errors import InvalidRequest

Dialect = Literal["standard", "backslash"]
_MAX_FIELD = 16 * 2**20  # characters of one CSV value; csv's default is less than a record may hold


def rows(path: str, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    r"""Yield each row with the number of its first line; the first row is the header. Blank lines are left out.

    In the dialect `backslash`, a backslash makes the next character literal: `"a \"b\" c"`. Raises `InvalidRequest`, which
    names the file and the line, if the file is not CSV in UTF-8.
    """
    escape = "\\" if dialect == "backslash" else None
    line = 1
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(_MAX_FIELD)  # for the whole process
        reader = csv.reader(stream, strict=True, escapechar=escape)
        try:
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
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
    with Path(path).open("rb") as stream:
        return next((number for number, line in enumerate(stream, 1) if not _is_utf8(line)), 0)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
