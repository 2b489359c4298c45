"""Checks that one operation must pass before it becomes part of a payload.

`Validator.read` takes a JSON line or a mapping and returns an `Operation`, or raises `Flaw` with the field and the reason.
What passes here is what DynamoDB accepts: the limits are those of DynamoDB's data types
(https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.entities import Entities
from mdstore.model import Operation, Reason

MAX_KEY_BYTES = 1024
MAX_GROUP_CHARACTERS = 128
MAX_SEQUENCE = 10**37
#: DynamoDB nests 32 levels deep; `data` itself is one of them.
MAX_NESTING = 31
MAX_DIGITS = 38

_ENTITY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_INT_38 = 10**MAX_DIGITS
_decoder = msgspec.json.Decoder(Operation, float_hook=exactjson.fraction)
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
        """Return the operation and its JSON in one line. Raises `Flaw`."""
        if isinstance(source, bytes | str):
            self._check_size(len(source))  # before decoding, which takes many times as much memory
        operation = self.decode(source)
        self._check_words(operation)
        if operation.data is not None:
            check_value(operation.data)
        line = exactjson.dumps(operation)
        self._check_data(operation, len(line))
        return operation, line

    def check_merged(self, operation: Operation, data: dict[str, Any]) -> None:
        """Check what a patch made of a record, as if it were an update. Raises `Flaw`."""
        check_value(data)
        # A copy: a model's validator must not change what is stored.
        merged = msgspec.structs.replace(operation, op="update", data=copy.deepcopy(data))
        self._check_data(merged, len(exactjson.dumps(data)))

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

    def _check_data(self, operation: Operation, size: int) -> None:
        self._check_size(size)
        problem = self._entities.problem(operation)
        if problem:
            raise Flaw(*problem)


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


def check_value(value: Any, depth: int = 1) -> None:  # noqa: PLR0912  one branch a JSON type
    """Raise `Flaw` unless `value` can be stored and read back exactly. `depth` is 1 for `data` itself."""
    kind = type(value)
    if kind is str:
        if not value.isascii():
            _utf8(value, "")
    elif kind is bool or value is None:
        pass
    elif kind is int:
        if not -_INT_38 < value < _INT_38:
            _check_number(Decimal(value))
    elif kind is Decimal:
        _check_number(value)
    elif kind is float:
        _check_number(Decimal(repr(value)))
    elif depth > MAX_NESTING:
        raise Flaw("", f"nested deeper than {MAX_NESTING} levels")
    elif kind is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise Flaw("data" if depth == 1 else "", f"name {name!r} is not text")
            _utf8(name, "data" if depth == 1 else "")
            _check_inside(item, depth, f".{name}")
    elif kind is list or kind is tuple:
        for index, item in enumerate(value):
            _check_inside(item, depth, f"[{index}]")
    else:
        raise Flaw("", f"{kind.__name__} is not a JSON type")


def _check_inside(item: Any, depth: int, step: str) -> None:
    try:
        check_value(item, depth + 1)
    except Flaw as flaw:
        flaw.field = step + flaw.field if depth > 1 else f"data{step}{flaw.field}"
        raise


def _check_number(value: Decimal) -> None:
    if not value.is_finite():
        raise Flaw("", f"{value} is not a JSON number")
    if not value:
        return
    digits = "".join(map(str, value.as_tuple().digits)).rstrip("0")
    if len(digits) > MAX_DIGITS:
        raise Flaw("", f"{len(digits)} significant digits, at most {MAX_DIGITS} can be stored exactly")
    if not -130 <= value.adjusted() <= 125:
        raise Flaw("", f"magnitude 1E{value.adjusted():+d} is outside 1E-130 to 9.9E+125")


def _utf8(text: str, field: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Flaw(field, f"not valid Unicode at character {error.start}") from error


def _named_field(why: str) -> str:
    found = re.search(r"(?:required|unknown) field `(\w+)`", why)
    return found[1] if found else ""
