"""Checks that one operation must pass before it becomes part of a payload.

`Validator.read` takes a JSON line or a mapping and returns an `Operation` with its data marshalled, or raises `Flaw` with the
field and the reason. What passes here is what DynamoDB accepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.dynamo.marshal import AttributeValue, Unstorable, stored_size, to_attribute
from mdstore.entities import Entities
from mdstore.model import Indexed, Operation, Reason

MAX_KEY_BYTES = 1024
MAX_GROUP_CHARACTERS = 128
MAX_SEQUENCE = 10**37
#: Bytes of data, as DynamoDB counts them, that an item holds: its 400 KB less key, version and the other attributes.
MAX_INLINE = 390 * 2**10
#: JSON of this length cannot become more than that; only longer data is measured.
_SURELY_INLINE = 128 * 2**10

_ENTITY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_decoder = msgspec.json.Decoder(Operation, float_hook=exactjson.fraction)
_encode = msgspec.json.Encoder().encode
_NEEDS_DATA = frozenset({"insert", "update", "patch", "upsert"})


class Flaw(Exception):
    """What is wrong with one operation: `field`, `why`, and `reason` (`invalid` or `too_large`)."""

    def __init__(self, field: str, why: str, *, reason: Reason = Reason.INVALID) -> None:
        super().__init__(field, why)
        self.field, self.why, self.reason = field, why, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.why}"


class Validator:
    """Reads operations and checks them against the rules and the entity models."""

    def __init__(self, *, entities: Entities, max_record_bytes: int) -> None:
        self._entities = entities
        self._max_record_bytes = max_record_bytes

    def read(self, source: bytes | str | Mapping[str, Any] | Operation) -> tuple[Operation, bytes]:
        """Return the operation, and its data in DynamoDB JSON where an item can hold it (else empty). Raises `Flaw`."""
        size = len(source) if isinstance(source, bytes | str) else 0
        self._check_size(size)  # before decoding, which takes many times as much memory
        operation = self.decode(source)
        self._check_words(operation)
        text = b""
        if operation.data is not None:
            size = size or _json_size(operation)
            self._check_size(size)
            attribute = inline(operation.data, json_size=size)
            text = b"" if attribute is None else _encode(attribute)
        self._check_model(operation)
        return operation, text

    def check_merged(self, operation: Indexed, data: dict[str, Any]) -> AttributeValue | None:
        """Check what a patch made of a record, as if it were an update; returned as by `inline`. Raises `Flaw`."""
        size = len(exactjson.dumps(data))
        self._check_size(size)
        attribute = inline(data, json_size=size)
        self._check_model(Operation(op="update", entity=operation.entity, key=operation.key, data=data))
        return attribute

    @staticmethod
    def decode(source: bytes | str | Mapping[str, Any] | Operation) -> Operation:
        """Return the operation with its types checked, and nothing else. Raises `Flaw`."""
        try:
            if isinstance(source, bytes | str):
                return _decoder.decode(source)
            # A value that was made in code has not been checked by anyone.
            words = msgspec.structs.asdict(source) if isinstance(source, Operation) else source
            return msgspec.convert(words, Operation)
        except msgspec.ValidationError as error:
            why, _, place = str(error).partition(" - at ")
            field = place.rpartition("$")[2].strip("`.")
            raise Flaw(field or _named_field(why) or "operation", why) from error
        except (*exactjson.DecodeFailure, TypeError) as error:
            raise Flaw("line", f"not a JSON object of an operation: {error}") from error

    def _check_size(self, size: int) -> None:
        if size > self._max_record_bytes:
            why = f"{size} bytes as JSON, at most {self._max_record_bytes} are allowed"
            raise Flaw("data", why, reason=Reason.TOO_LARGE)

    def _check_words(self, operation: Operation) -> None:
        check_entity(operation.entity)
        check_key(operation.key)
        if operation.op in _NEEDS_DATA and operation.data is None:
            raise Flaw("data", f"{operation.op} needs a JSON object")
        if operation.op not in _NEEDS_DATA and operation.data is not None:
            raise Flaw("data", f"{operation.op} takes none")
        if operation.expect_version is not None and (
            operation.op == "insert" or not 1 <= operation.expect_version <= MAX_SEQUENCE
        ):
            raise Flaw("expect_version", "must be between 1 and 10^37, and not be given with insert")
        if operation.sequence is not None and (operation.op == "check" or abs(operation.sequence) > MAX_SEQUENCE):
            raise Flaw("sequence", "must be between -10^37 and 10^37, and not be given with check")
        if operation.group is not None:
            _utf8(operation.group, "group")
            if not 0 < len(operation.group) <= MAX_GROUP_CHARACTERS:
                raise Flaw("group", f"must have 1-{MAX_GROUP_CHARACTERS} characters")

    def _check_model(self, operation: Operation) -> None:
        problem = self._entities.problem(operation)
        if problem:
            raise Flaw(*problem)


@lru_cache(maxsize=1_024)  # a request names few entities, many times
def check_entity(entity: str) -> None:
    """Raise `Flaw` unless `entity` can be part of a record's primary key."""
    if not _ENTITY.fullmatch(entity):
        raise Flaw("entity", f"must be 1-64 of A-Z a-z 0-9 _ . -, starting with a letter: {entity[:80]!r}")


def check_key(key: str) -> None:
    """Raise `Flaw` unless `key` can be part of a record's primary key."""
    size = len(_utf8(key, "key"))
    if not 0 < size <= MAX_KEY_BYTES:
        raise Flaw("key", f"must have 1-{MAX_KEY_BYTES} bytes as UTF-8, has {size}")
    if _CONTROL.search(key):
        raise Flaw("key", f"must not hold control characters: {key[:80]!r}")


def inline(data: dict[str, Any], *, json_size: int) -> AttributeValue | None:
    """`data` marshalled, or None where an item cannot hold it. Raises `Flaw` where DynamoDB can not. `json_size` in bytes."""
    try:
        if json_size > _SURELY_INLINE and stored_size(data) > MAX_INLINE:
            return None
        return to_attribute(data)
    except Unstorable as error:
        raise Flaw(f"data{error.path}", error.why) from error


def _json_size(operation: Operation) -> int:
    try:
        return len(exactjson.dumps(operation))
    except (ValueError, TypeError, RecursionError):  # what it is that has no JSON, marshalling finds out
        return 0


def _utf8(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Flaw(field, f"not valid Unicode at character {error.start}") from error


def _named_field(why: str) -> str:
    found = re.search(r"(?:required|unknown) field `(\w+)`", why)
    return found[1] if found else ""
