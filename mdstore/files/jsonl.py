"""Reads JSON Lines files, plain or gzipped: operations, plain records, or records as `mdstore export` writes them."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from mdstore import exactjson
from mdstore.model import OpName
from mdstore.store.lines import read_lines
from mdstore.store.operations import OPERATIONS
from mdstore.store.validation import FieldError, LineTooLong

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


def lines(
    path: str, standard_input: IO[bytes] | None = None, *, max_record_bytes: int
) -> Iterator[tuple[int, bytes | LineTooLong]]:
    """Yield the lines of a file as `read_lines` does. The path `-` means standard input."""
    with ExitStack() as stack:
        stream: IO[bytes]
        if path == "-":
            stream = standard_input or sys.stdin.buffer
        elif path.lower().endswith(".gz"):
            stream = cast("IO[bytes]", stack.enter_context(gzip.open(path, "rb")))
        else:
            stream = stack.enter_context(Path(path).open("rb"))
        yield from read_lines(stream, max_record_bytes=max_record_bytes)


class _Exported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line as `mdstore export` writes it. Its values stay encoded."""

    entity: msgspec.Raw
    key: msgspec.Raw
    version: msgspec.Raw
    data: msgspec.Raw


class _ExportedOperation(msgspec.Struct, frozen=True, omit_defaults=True):
    op: OpName
    entity: msgspec.Raw
    key: msgspec.Raw
    data: msgspec.Raw | None = None


_exported_decoder = msgspec.json.Decoder(_Exported)


def operation(line: bytes | LineTooLong, op: OpName) -> bytes | LineTooLong:
    """Return the line of an operation unchanged. A line of an export becomes an operation `op`; its version is left out."""
    if isinstance(line, LineTooLong) or b'"version"' not in line:  # the most common case needs no decoding here
        return line
    try:
        found = _exported_decoder.decode(line)
    except (*exactjson.DecodeFailure, msgspec.ValidationError):
        return line  # an operation whose data contains this word
    data = found.data if OPERATIONS[op].needs_data else None
    return exactjson.dumps(_ExportedOperation(op, found.entity, found.key, data))


def record(line: bytes | LineTooLong, *, max_values: int) -> dict[str, Any] | FieldError:
    """Read a plain record, or return why the line is not one: it is not a JSON object, or repeats a name."""
    if isinstance(line, LineTooLong):
        return line
    try:
        exactjson.check_cost(line, most_values=max_values)
        found = _record_decoder.decode(line.decode())
    except FieldError as twice:
        return twice
    except exactjson.DecodeFailure as error:
        return FieldError("line", f"not a JSON object: {exactjson.explain(line, error, with_line=False)}")
    return found if isinstance(found, dict) else FieldError("line", "not a JSON object")


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Unlike msgspec, the standard library's decoder shows names that occur twice."""
    found = dict(members)
    if len(found) < len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        raise FieldError(twice, "the object has this name twice")
    return found


def _no_number(text: str) -> Decimal:
    raise ValueError(f"{text} is not a JSON number")


_record_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=exactjson.fraction, parse_constant=_no_number)
