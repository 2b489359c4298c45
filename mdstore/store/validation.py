"""Validation of single operations, before they become part of a payload.

`Validator.read` takes a JSON line, a mapping or an `Operation`, and returns an `Operation` with its data in DynamoDB JSON. It
raises `FieldError`, with field and reason, if the rules, the entity's model or DynamoDB would not accept the operation.

Data is *inline* when it fits the record's item, as DynamoDB counts bytes. Larger data is kept in S3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import AttributeValue, Unstorable, stored_size, to_attribute
from mdstore.model import Operation, Reason
from mdstore.store.entities import Entities
from mdstore.store.operations import OPERATIONS, Indexed

MAX_KEY_BYTES = 1024
MAX_GROUP_CHARACTERS = 128
MAX_SEQUENCE = 10**37
#: Bytes of data that an item can hold, as DynamoDB counts them: 400 KB less the key, the version and the other attributes.
MAX_INLINE = 390 * 2**10
#: JSON of up to this length always fits `MAX_INLINE`, so only longer data is measured.
_SURELY_INLINE = 128 * 2**10

_ENTITY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_decoder = msgspec.json.Decoder(Operation, float_hook=exactjson.fraction)
_encode = msgspec.json.Encoder().encode

_WITHOUT_VERSION, _WITHOUT_SEQUENCE = (
    f", and not be given with {' or '.join(ops)}"
    for ops in (
        [op for op, spec in OPERATIONS.items() if not spec.takes_version],
        [op for op, spec in OPERATIONS.items() if not spec.takes_sequence],
    )
)


class FieldError(Exception):
    """One operation is invalid. Its fields are `field`, `why`, and `reason` (`invalid` or `too_large`)."""

    def __init__(self, field: str, why: str, *, reason: Reason = Reason.INVALID) -> None:
        super().__init__(field, why)
        self.field, self.why, self.reason = field, why, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.why}"


class Validator:
    """Decodes operations, and checks them against the rules and the entity models."""

    def __init__(self, *, entities: Entities, max_record_bytes: int) -> None:
        self._entities = entities
        self._max_record_bytes = max_record_bytes

    def read(self, given: bytes | str | Mapping[str, Any] | Operation) -> tuple[Operation, bytes]:
        """Return the operation, and its data in DynamoDB JSON; empty if it does not fit an item. Raises `FieldError`."""
        return self.check(*self.decode_bounded(given))

    def decode_bounded(self, given: bytes | str | Mapping[str, Any] | Operation) -> tuple[Operation, int]:
        """Decode an operation, and return it with the length of its JSON, or 0 if it was not JSON. Raises `FieldError`."""
        size = len(given) if isinstance(given, bytes | str) else 0
        self._check_size(size)  # check before decoding, which takes many times as much memory
        return self.decode(given), size

    def check(self, operation: Operation, size: int) -> tuple[Operation, bytes]:
        """Check what `decode_bounded` returned. Returns what `read` does."""
        self._check_fields(operation)
        text = b""
        if operation.data is not None:
            size = size or _json_size(operation)
            self._check_size(size)
            attribute = inline(operation.data, json_size=size)
            text = b"" if attribute is None else _encode(attribute)
        self._check_model(operation)
        return operation, text

    def check_merged(self, operation: Indexed, data: dict[str, Any]) -> AttributeValue | None:
        """Check a record's data after a patch, as if it were an update. Return it as `inline` does. Raises `FieldError`."""
        size = len(exactjson.dumps(data))
        self._check_size(size)
        attribute = inline(data, json_size=size)
        self._check_model(Operation(op="update", entity=operation.entity, key=operation.key, data=data))
        return attribute

    @staticmethod
    def decode(given: bytes | str | Mapping[str, Any] | Operation) -> Operation:
        """Decode an operation and check only its types. Raises `FieldError`."""
        try:
            if isinstance(given, bytes | str):
                return _decoder.decode(given)
            # msgspec checks no types when code creates an `Operation`.
            fields = msgspec.structs.asdict(given) if isinstance(given, Operation) else given
            return msgspec.convert(fields, Operation)
        except msgspec.ValidationError as error:
            why, _, path = str(error).partition(" - at ")
            field = path.rpartition("$")[2].strip("`.")
            raise FieldError(field or _named_field(why) or "operation", why) from error
        except (*exactjson.DecodeFailure, TypeError) as error:
            raise FieldError("line", f"not a JSON object of an operation: {error}") from error

    def _check_size(self, size: int) -> None:
        if size > self._max_record_bytes:
            why = f"{size} bytes as JSON, at most {self._max_record_bytes} are allowed"
            raise FieldError("data", why, reason=Reason.TOO_LARGE)

    def _check_fields(self, operation: Operation) -> None:
        check_entity(operation.entity)
        check_key(operation.key)
        spec = OPERATIONS[operation.op]
        if spec.needs_data and operation.data is None:
            raise FieldError("data", f"{operation.op} needs a JSON object")
        if not spec.needs_data and operation.data is not None:
            raise FieldError("data", f"{operation.op} takes none")
        if operation.expect_version is not None and (
            not spec.takes_version or not 1 <= operation.expect_version <= MAX_SEQUENCE
        ):
            raise FieldError("expect_version", f"must be between 1 and 10^37{_WITHOUT_VERSION}")
        if operation.sequence is not None and (not spec.takes_sequence or abs(operation.sequence) > MAX_SEQUENCE):
            raise FieldError("sequence", f"must be between -10^37 and 10^37{_WITHOUT_SEQUENCE}")
        if operation.group is not None:
            _utf8(operation.group, "group")
            if not 0 < len(operation.group) <= MAX_GROUP_CHARACTERS:
                raise FieldError("group", f"must have 1-{MAX_GROUP_CHARACTERS} characters")

    def _check_model(self, operation: Operation) -> None:
        problem = self._entities.problem(operation)
        if problem:
            raise FieldError(*problem)


@lru_cache(maxsize=1_024)  # a request repeats a few entities many times
def check_entity(entity: str) -> None:
    """Raise `FieldError` unless `entity` can be part of a record's primary key."""
    if not _ENTITY.fullmatch(entity):
        raise FieldError("entity", f"must be 1-64 of A-Z a-z 0-9 _ . -, starting with a letter: {entity[:80]!r}")


def check_key(key: str) -> None:
    """Raise `FieldError` unless `key` can be part of a record's primary key."""
    size = len(_utf8(key, "key"))
    if not 0 < size <= MAX_KEY_BYTES:
        raise FieldError("key", f"must have 1-{MAX_KEY_BYTES} bytes as UTF-8, has {size}")
    if _CONTROL.search(key):
        raise FieldError("key", f"must not hold control characters: {key[:80]!r}")


def inline(data: dict[str, Any], *, json_size: int) -> AttributeValue | None:
    """Marshal `data` to keep it inline, in its item. Return None if it is too large for an item.

    `json_size` is the length of its JSON in bytes. Raises `FieldError` if DynamoDB cannot hold it exactly.
    """
    try:
        if json_size > _SURELY_INLINE and stored_size(data) > MAX_INLINE:
            return None
        return to_attribute(data)
    except Unstorable as error:
        raise FieldError(f"data{error.path}", error.why) from error


def _json_size(operation: Operation) -> int:
    try:
        return len(exactjson.dumps(operation))
    except (ValueError, TypeError, RecursionError):  # marshalling will report which value has no JSON
        return 0


def _utf8(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(field, f"not valid Unicode at character {error.start}") from error


def _named_field(why: str) -> str:
    found = re.search(r"(?:required|unknown) field `(\w+)`", why)
    return found[1] if found else ""
