"""The digest of a request's content, by which a repeat of the request is recognised.

Two requests have the same content if they hold the same JSON values in the same order. How the values are written does not
matter: key order, white space, escapes, `1.50` or `1.5`, and optional fields that are null or absent. Nor does it matter what
becomes of the operations: a release or an entity model that refuses other operations, or another limit of an item, changes no
digest.

    content = "json:" + SHA-256 of, for each operation, its canonical JSON and a newline
    canonical JSON = UTF-8, without white space, names sorted by code point, numbers as `exactjson.canonical` writes them
    an operation that is no JSON = "!" and the SHA-256 of its bytes

The option `newest_wins` changes what the operations mean, so its line comes first: `"newest_wins"`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.model import Operation
from mdstore.store.validation import LineTooLong

#: An operation as its caller gave it; an error stands for one that the reader of a file found invalid.
Given = bytes | Mapping[str, Any] | Operation | Exception
_PIECE = 2**16  # bytes that are hashed in one call
_encode = msgspec.json.Encoder(decimal_format="number", order="sorted").encode
#: Find whatever looks, in compact JSON, like a number that is not in canonical form: a fraction that ends with 0, the
#: exponent of a `Decimal`, and that of a float. Text may look so too. Three searches that begin with a letter are faster than
#: one for all.
_fraction, _exponent, _float_exponent = (
    re.compile(pattern).search for pattern in (rb"\.[0-9]*0[,}\]]", rb"E[+-]", rb"e[-0-9]")
)
#: What keeps a value from having canonical JSON: types and numbers that are not JSON's, half a surrogate pair, nesting.
_NO_JSON = (*exactjson.DecodeFailure, TypeError, ArithmeticError)


class ContentDigest:
    """Computes the digest of operations that are added one by one, as their callers gave them."""

    def __init__(self, *, newest_wins: bool = False) -> None:
        self._hash = hashlib.sha256(b'"newest_wins"\n' if newest_wins else b"")
        self._lines = bytearray()

    def add(self, operation: Operation, text: bytes) -> None:
        """Add an operation that was accepted, with its `sorted_json`."""
        if _fraction(text) or _exponent(text) or _float_exponent(text):
            text = exactjson.canonical(_given_fields(msgspec.structs.asdict(operation)))
        self._add_line(text)

    def add_refused(self, given: Given, *, max_bytes: int, max_values: int) -> None:
        """Add an operation that was refused. One that exceeds a limit is not decoded, so its bytes are digested instead."""
        self._add_line(_canonical(given, max_bytes, max_values))

    def _add_line(self, text: bytes) -> None:
        self._lines += text
        self._lines += b"\n"
        if len(self._lines) >= _PIECE:
            self._flush()

    def _flush(self) -> None:
        self._hash.update(self._lines)
        self._lines.clear()

    def text(self) -> str:
        """Return the digest of what was added so far, with its prefix."""
        self._flush()
        return f"json:{self._hash.hexdigest()}"


def sorted_json(operation: Operation) -> bytes:
    """Encode an operation as JSON whose names are sorted. Return nothing if it has no JSON."""
    try:
        return _encode(operation)
    except _NO_JSON:
        return b""


def _canonical(given: Given, max_bytes: int, max_values: int) -> bytes:
    try:
        if isinstance(given, Exception):
            return _opaque(given)
        if isinstance(given, bytes):
            if len(given) > max_bytes:
                return _opaque(given)
            exactjson.check_cost(given, most_values=max_values)
            value = exactjson.loads(given)
        else:
            value = msgspec.structs.asdict(given) if isinstance(given, Operation) else dict(given)
        return exactjson.canonical(_given_fields(value) if isinstance(value, dict) else value)
    except _NO_JSON:
        return _opaque(given)


def _opaque(given: Given) -> bytes:
    return b"!" + digest_of(given).hex().encode()


def digest_of(given: Given) -> bytes:
    """Return the SHA-256 of an operation as its caller gave it."""
    if isinstance(given, LineTooLong):
        return given.digest
    return hashlib.sha256(given if isinstance(given, bytes) else written(given)).digest()


def _given_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the optional fields that are null: they mean the same as absent ones."""
    optional = Operation.__struct_fields__
    return {name: value for name, value in fields.items() if value is not None or name not in optional}


def written(given: object) -> bytes:
    """Return bytes that represent an operation which has no JSON."""
    try:
        return repr(given).encode(errors="backslashreplace")
    except (ValueError, RecursionError):  # an integer is too long, or nesting too deep, for `repr`
        return b"unwritable"
