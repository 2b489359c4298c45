"""Validation of single operations, before they become part of a payload.

`Validator.read` takes a JSON line, a mapping or an `Operation`, and returns an `Operation` with its data in DynamoDB JSON. It
raises `FieldError`, with field and reason, if the rules, the entity's model or DynamoDB would not accept the operation.

Data is *inline* when it fits the record's item, as DynamoDB counts bytes. Larger data is kept in S3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import AttributeValue, Unstorable, stored_size, to_attribute
from mdstore.model import Operation, Reason
from mdstore.settings import MAX_RECORD_VALUES
from mdstore.store.entities import Entities, FieldProblem
from mdstore.store.operations import OPERATIONS

MAX_KEY_BYTES = 1024
MAX_GROUP_CHARACTERS = 128
MAX_SEQUENCE = 10**37
#: Bytes of data that an item can hold, as DynamoDB counts them: 400 KB less the key, the version and the other attributes.
MAX_INLINE = 390 * 2**10
#: JSON of up to this length always fits `MAX_INLINE`, so only longer data is measured.
_SURELY_INLINE = 128 * 2**10

_MOST_FLAWS = 20  # of one operation's data
_LONG_LINE = 2**20  # bytes

ENTITY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_decoder = msgspec.json.Decoder(Operation, float_hook=exactjson.fraction)
_field_decoders = {
    info.name: msgspec.json.Decoder(info.type, float_hook=exactjson.fraction)
    for info in msgspec.structs.fields(Operation)
}
_encode = msgspec.json.Encoder().encode

_WITHOUT_VERSION, _WITHOUT_SEQUENCE = (
    f", and not be given with {' or '.join(ops)}"
    for ops in (
        [op for op, spec in OPERATIONS.items() if not spec.takes_version],
        [op for op, spec in OPERATIONS.items() if not spec.takes_sequence],
    )
)


class FieldError(Exception):
    """One operation is invalid. Its fields are `field`, `why`, `reason` (`invalid` or `too_large`), and `others`.

    `others` holds the operation's other problems, each with its field and what is wrong with it.
    """

    def __init__(
        self, field: str, why: str, *, reason: Reason = Reason.INVALID, others: Sequence[FieldProblem] = ()
    ) -> None:
        super().__init__(field, why)
        self.field, self.why, self.reason, self.others = field, why, reason, tuple(others)

    def __str__(self) -> str:
        return "; ".join(f"{field}: {why}" for field, why in ((self.field, self.why), *self.others))


class LineTooLong(FieldError):
    """A line that is longer than an operation may be, and was not kept. `digest` is the SHA-256 of its `size` bytes.

    `may_name_group` is False if the line is surely not part of a group.
    """

    def __init__(self, size: int, *, limit: int, digest: bytes, may_name_group: bool) -> None:
        super().__init__("data", f"{size} bytes as JSON, at most {limit} are allowed", reason=Reason.TOO_LARGE)
        self.digest, self.may_name_group = digest, may_name_group


class Validator:
    """Decodes operations, and checks them against the rules and the entity models."""

    def __init__(
        self, *, entities: Entities, max_record_bytes: int, max_record_values: int = MAX_RECORD_VALUES
    ) -> None:
        self.entities = entities
        self._max_record_bytes = max_record_bytes
        self._max_record_values = max_record_values

    def read(self, given: bytes | str | Mapping[str, Any] | Operation | FieldError) -> tuple[Operation, bytes]:
        """Return the operation, and its data in DynamoDB JSON; empty if it does not fit an item.

        The data of a whole record is what the entity's model makes of it. Raises `FieldError` with all problems.
        """
        return self.check(*self.decode_bounded(given))

    def decode_bounded(self, given: bytes | str | Mapping[str, Any] | Operation | FieldError) -> tuple[Operation, int]:
        """Decode an operation, and return it with the length of its JSON, or 0 if it was not JSON. Raises `FieldError`.

        A `FieldError` that is given stands for an operation that the reader of a file found invalid; it is raised.
        """
        if isinstance(given, FieldError):
            raise given
        size = len(given) if isinstance(given, bytes | str) else 0
        self._check_size(size)  # check before decoding, which takes many times as much memory
        if size > exactjson.SHORT and isinstance(given, bytes | str):
            self._check_cost(given)
        return self.decode(given), size

    def check(self, operation: Operation, size: int) -> tuple[Operation, bytes]:
        """Check what `decode_bounded` returned. Returns what `read` does.

        `size` is the length of the operation's JSON in bytes; if it is 0, it is measured.
        """
        problems = _field_problems(operation) + self.entities.problems(operation.entity)
        if operation.data is None:
            _raise_any(problems)
            return operation, b""
        size = size or _json_size(operation)
        if not problems:
            self._check_size(size)
        data = operation.data
        if not OPERATIONS[operation.op].merges:  # the worker checks what a patch makes of the record
            data, found = self.entities.validated(operation.entity, data)
            problems += found
        if problems:
            has_data_problem = any(field.startswith("data") for field, _ in problems)
            _raise_any(problems if has_data_problem else problems + _storage_problems(data))
        if data is not operation.data:
            operation = msgspec.structs.replace(operation, data=data)
            size = _json_size(operation)
            self._check_size(size)
        attribute = inline(data, json_size=size)
        return operation, b"" if attribute is None else _encode(attribute)

    def read_merged(self, entity: str, data: dict[str, Any]) -> tuple[dict[str, Any], AttributeValue | None]:
        """Return a record's data after a patch as the entity's model makes it, and the same as `inline` does.

        Raises `FieldError`.
        """
        self._check_size(len(exactjson.dumps(data)))
        data, problems = self.entities.validated(entity, data)
        _raise_any(self.entities.problems(entity) + problems)
        size = len(exactjson.dumps(data))
        self._check_size(size)
        return data, inline(data, json_size=size)

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
            raise _type_error(error, _type_problems(given)) from error
        except (*exactjson.DecodeFailure, TypeError) as error:
            why = exactjson.explain(given, error, with_line=False) if isinstance(given, bytes | str) else error
            raise FieldError("line", f"not a JSON object of an operation: {why}") from error

    def _check_cost(self, text: bytes | str) -> None:
        encoded = text.encode(errors="replace") if isinstance(text, str) else text
        try:
            exactjson.check_cost(encoded, most_values=self._max_record_values)
        except ValueError as error:
            raise FieldError("operation", str(error)) from error

    def _check_size(self, size: int) -> None:
        if size > self._max_record_bytes:
            why = f"{size} bytes as JSON, at most {self._max_record_bytes} are allowed"
            raise FieldError("data", why, reason=Reason.TOO_LARGE)


def _raise_any(problems: Sequence[FieldProblem]) -> None:
    if problems:
        (field, why), *others = problems
        raise FieldError(field, why, others=others)


def _field_problems(operation: Operation) -> list[FieldProblem]:
    """Return the problems of an operation whose fields have the right types. Its data is checked elsewhere."""
    spec = OPERATIONS[operation.op]
    problems = [*_entity_problems(operation.entity), *_key_problems(operation.key)]
    if spec.needs_data != (operation.data is not None):
        problems.append(("data", f"{operation.op} {'needs a JSON object' if spec.needs_data else 'takes none'}"))
    version, sequence = operation.expect_version, operation.sequence
    if version is not None and (not spec.takes_version or not 1 <= version <= MAX_SEQUENCE):
        problems.append(("expect_version", f"must be between 1 and 10^37{_WITHOUT_VERSION}"))
    if sequence is not None and (not spec.takes_sequence or abs(sequence) > MAX_SEQUENCE):
        problems.append(("sequence", f"must be between -10^37 and 10^37{_WITHOUT_SEQUENCE}"))
    return problems if operation.group is None else [*problems, *_group_problems(operation.group)]


def _type_error(error: msgspec.ValidationError, problems: Sequence[FieldProblem]) -> FieldError:
    """Build the error of an operation whose fields have wrong types; msgspec reports only the first of them."""
    why, _, path = str(error).partition(" - at ")
    first = path.rpartition("$")[2].strip("`.") or _named_field(why) or "operation"
    root = re.split(r"[.\[]", first)[0]
    return FieldError(first, why, others=[problem for problem in problems if problem[0] != root])


def _type_problems(given: bytes | str | Mapping[str, Any] | Operation) -> list[FieldProblem]:
    """Return the problems of each field by itself: its type, whether it is missing, and whether it is known.

    A long line can have very many, so nothing is returned for it, and only its first problem is reported.
    """
    fields: Any = given
    if isinstance(given, bytes | str) and len(given) > _LONG_LINE:
        return []
    try:
        if isinstance(given, bytes | str):
            fields = msgspec.json.decode(given, type=dict[str, msgspec.Raw])
    except exactjson.DecodeFailure:
        return []
    if not isinstance(fields, Mapping):
        return []
    problems: list[FieldProblem] = []
    for info in msgspec.structs.fields(Operation):
        if info.name not in fields:
            if info.required:
                problems.append((info.name, f"Object missing required field `{info.name}`"))
            continue
        value = fields[info.name]
        try:
            if isinstance(value, msgspec.Raw):
                _field_decoders[info.name].decode(value)
            else:
                msgspec.convert(value, info.type)
        except exactjson.DecodeFailure as error:
            problems.append((info.name, str(error)))
    known = Operation.__struct_fields__
    unknown = islice((str(name) for name in fields if name not in known), _MOST_FLAWS)
    return problems + [(name, f"Object contains unknown field `{name}`") for name in unknown]


def check_entity(entity: str) -> None:
    """Raise `FieldError` unless `entity` can be part of a record's primary key."""
    _raise_any(_entity_problems(entity))


def check_key(key: str) -> None:
    """Raise `FieldError` unless `key` can be part of a record's primary key."""
    _raise_any(_key_problems(key))


@lru_cache(maxsize=1_024)  # a request repeats a few entities many times
def _entity_problems(entity: str) -> Sequence[FieldProblem]:
    if ENTITY.fullmatch(entity):
        return ()
    return [("entity", f"must be 1-64 of A-Z a-z 0-9 _ . -, starting with a letter: {entity[:80]!r}")]


def _key_problems(key: str) -> Sequence[FieldProblem]:
    if key.isascii() and key.isprintable() and 0 < len(key) <= MAX_KEY_BYTES:  # the most common case
        return ()
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        return [("key", f"not valid Unicode at character {error.start}")]
    if not 0 < size <= MAX_KEY_BYTES:
        return [("key", f"must have 1-{MAX_KEY_BYTES} bytes as UTF-8, has {size}")]
    return [("key", f"must not hold control characters: {key[:80]!r}")] if _CONTROL.search(key) else ()


def _group_problems(group: str) -> Sequence[FieldProblem]:
    try:
        group.encode()
    except UnicodeEncodeError as error:
        return [("group", f"not valid Unicode at character {error.start}")]
    return (
        () if 0 < len(group) <= MAX_GROUP_CHARACTERS else [("group", f"must have 1-{MAX_GROUP_CHARACTERS} characters")]
    )


def inline(data: dict[str, Any], *, json_size: int) -> AttributeValue | None:
    """Marshal `data` to keep it inline, in its item. Return None if it is too large for an item.

    `json_size` is the length of its JSON in bytes. Raises `FieldError` if DynamoDB cannot hold it exactly.
    """
    try:
        if json_size > _SURELY_INLINE and stored_size(data) > MAX_INLINE:
            return None
        return to_attribute(data)
    except Unstorable as error:
        first = (f"data{error.path}", error.why)
        raise FieldError(*first, others=[problem for problem in _storage_problems(data) if problem != first]) from error


def _storage_problems(data: dict[str, Any]) -> list[FieldProblem]:
    """Return the first problems of the values that DynamoDB cannot hold; marshalling stops at the first of them."""
    return list(islice(_unstorable(data, "data", 1), _MOST_FLAWS))


def _unstorable(value: Any, path: str, depth: int) -> Iterator[FieldProblem]:
    members: Iterable[tuple[Any, Any]] = ()
    shell: Any = value
    if isinstance(value, dict):
        members, shell = value.items(), dict.fromkeys(value)
    elif isinstance(value, list | tuple):
        members, shell = enumerate(value), []
    try:
        to_attribute(shell, depth)  # a name, the nesting, or a value without members
    except Unstorable as error:
        yield path, error.why
        return
    for name, item in members:
        yield from _unstorable(item, f"{path}.{name}" if isinstance(value, dict) else f"{path}[{name}]", depth + 1)


def _json_size(operation: Operation) -> int:
    try:
        return len(exactjson.dumps(operation))
    except (ValueError, TypeError, RecursionError):  # marshalling will report which value has no JSON
        return 0


def _named_field(why: str) -> str:
    found = re.search(r"(?:required|unknown) field `(\w+)`", why)
    return found[1] if found else ""
