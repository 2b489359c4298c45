"""Reads JSON Lines files, plain or gzipped: operations, plain records, or records as `mdstore export` writes them."""

from __future__ import annotations

import codecs
import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import msgspec

from mdstore import exactjson
from mdstore.model import OpName
from mdstore.store.operations import OPERATIONS
from mdstore.store.validation import FieldError

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")


def lines(path: str, standard_input: IO[bytes] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, with their numbers. The path `-` means standard input."""
    with ExitStack() as stack:
        stream: Iterable[bytes]
        if path == "-":
            stream = standard_input or sys.stdin.buffer
        elif path.lower().endswith(".gz"):
            stream = stack.enter_context(gzip.open(path, "rb"))
        else:
            stream = stack.enter_context(Path(path).open("rb"))
        for number, line in enumerate(stream, 1):
            stripped = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
            if stripped:
                yield number, stripped


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


def operation(line: bytes, op: OpName) -> bytes:
    """Return the line of an operation unchanged. A line of an export becomes an operation `op`; its version is left out."""
    if b'"version"' not in line:  # the most common case needs no decoding here
        return line
    try:
        found = _exported_decoder.decode(line)
    except (*exactjson.DecodeFailure, msgspec.ValidationError):
        return line  # an operation whose data contains this word
    data = found.data if OPERATIONS[op].needs_data else None
    return exactjson.dumps(_ExportedOperation(op, found.entity, found.key, data))


def record(line: bytes) -> dict[str, Any] | FieldError:
    """Read a plain record, or return why the line is not one: it is not a JSON object, or repeats a name."""
    try:
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
