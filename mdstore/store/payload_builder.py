"""The producer's side of a payload: takes operations one by one, and cuts them into lanes at the end."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import msgspec

from mdstore import exactjson
from mdstore.compression import compressor
from mdstore.errors import PayloadTooLarge
from mdstore.model import SCHEMA_VERSION, Operation, Reason, Refusal
from mdstore.settings import Settings
from mdstore.store.operations import NOTHING, OPERATIONS, Effect, Indexed
from mdstore.store.packing import MAX_ACTIONS, refusal
from mdstore.store.partitioning import MAX_LANE_OPERATIONS, Partition
from mdstore.store.payload import MAGIC, Encoded, Header, Section
from mdstore.store.spill_buffer import SpillBuffer
from mdstore.store.validation import FieldError, Validator

_SPILL_BEYOND = 4 * 2**20
_PIECE = 2**18  # bytes of lines that are compressed in one go
_decoder = msgspec.json.Decoder(Indexed)

#: What an operation may be given as: a line of JSON, a mapping, or the value itself.
OperationInput = bytes | Mapping[str, Any] | Operation


class _Group:
    """What is known of a group while its operations come in; `refusal_reason` is why none of them can apply."""

    def __init__(self) -> None:
        self._count = 0
        self._keys: set[tuple[str, str]] = set()
        self.refusal_reason: tuple[Reason, str] | None = None

    def note(self, operation: Operation) -> None:
        """Another operation of the group came in."""
        self._count += 1
        key = operation.entity, operation.key
        if self._count > MAX_ACTIONS:
            self.refusal_reason = Reason.INVALID, f"group: more than {MAX_ACTIONS} operations cannot apply atomically"
        elif key in self._keys:
            self.refusal_reason = self.refusal_reason or (
                Reason.INVALID,
                f"group: two of its operations are on key {operation.key!r}",
            )
        else:
            self._keys.add(key)

    def spoil(self, why: str) -> None:
        """Not all operations of the group can apply."""
        self.refusal_reason = self.refusal_reason or (Reason.GROUP_REFUSED, why)


class PayloadBuilder:
    """Takes operations and becomes a payload.

    Kept in memory: 40 bytes an operation, and the keys of groups. The operations themselves spill to a temporary
    file once they exceed 4 MB.
    """

    def __init__(self, *, validator: Validator, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._validator = validator
        self._settings = settings
        self._lines = SpillBuffer(_SPILL_BEYOND)
        self._ends = array("Q", [0])
        self._partition = Partition()
        self._groups: dict[str, _Group] = {}
        self._refused = _Compressor()
        self._refused_counts: Counter[str] = Counter()
        self._content = hashlib.sha256()
        self._unreadable = False
        self.count = 0

    def add(self, given: OperationInput) -> Refusal | None:
        """Take the next operation, or return why it is refused; what is refused becomes part of the payload as such."""
        index = self.count
        self.count += 1
        limit = self._settings.max_request_operations
        if index >= limit:
            raise PayloadTooLarge(field="operations", value=self.count, expected=f"at most {limit}")
        try:
            operation, attribute = self._validator.read(given)
        except FieldError as error:
            return self._refuse(index, given, error)
        line = exactjson.dumps(_indexed(index, operation, attribute)) + b"\n"
        self._content.update(line)
        self._lines.append(line)
        self._ends.append(self._ends[-1] + len(line))
        self._partition.add(operation, len(line))
        if operation.group is not None:
            self._groups.setdefault(operation.group, _Group()).note(operation)
        return None

    def refused_groups(self) -> Iterator[Refusal]:
        """Refusals of operations whose group cannot apply; known only when all operations are in."""
        if self._unreadable:
            for group in self._groups.values():
                group.spoil("a line that cannot be read may belong to the group")
        if any(group.refusal_reason for group in self._groups.values()):
            for position in range(len(self._partition)):
                found = self._refused_with_group(self._item(position))
                if found:
                    yield found

    def encode(self, request_id: str, source: str) -> Encoded:
        """Cut into lanes and compress. Raises `PayloadTooLarge` where one key or group makes a lane too large."""
        for refused in self.refused_groups():
            self._note_refusal(refused)
        with _spill_file() as body:
            return self._encode(body, request_id, source)

    def _encode(self, body: IO[bytes], request_id: str, source: str) -> Encoded:
        lanes: list[Section] = []
        wanted = self._settings
        for positions in self._partition.lanes(
            operations=wanted.lane_operations, size=wanted.lane_bytes, limit=wanted.max_lane_bytes * 9 // 10
        ):
            section = self._lane(positions).write_to(body)
            if section.count:
                lanes.append(section)
        header = Header(
            v=SCHEMA_VERSION,
            codec="zstd",
            request_id=request_id,
            source=source,
            content=self._content.hexdigest(),
            created_at=int(self._clock()),
            operations=self.count,
            lanes=tuple(lanes),
            refused=self._refused.write_to(body),
            refused_counts=dict(sorted(self._refused_counts.items())),
        )
        return _assembled(header, body)

    def close(self) -> None:
        """Drop the lines."""
        self._lines.close()

    def _lane(self, positions: array[int]) -> _Compressor:
        lane = _Compressor()
        some_refused = any(group.refusal_reason for group in self._groups.values())
        limit = self._settings.max_lane_bytes
        for position in positions:
            if some_refused and self._refused_with_group(self._item(position)):
                continue
            lane.add(self._line(position))
            if lane.raw > limit or lane.count > MAX_LANE_OPERATIONS:
                what, most = ("bytes", limit) if lane.raw > limit else ("operations", MAX_LANE_OPERATIONS)
                raise PayloadTooLarge(
                    field="operations",
                    value=f"more {what} that share key {self._item(position).key!r} or a group with it",
                    expected=f"at most {most} {what} that share a key or a group: send several requests",
                )
        return lane

    def _refuse(self, index: int, given: OperationInput, error: FieldError) -> Refusal:
        words = _words(given)
        found = Refusal(
            index=index,
            reason=error.reason,
            detail=str(error)[:500],
            op=words.op,
            entity=words.entity,
            key=words.key,
        )
        for name in words.groups:
            self._groups.setdefault(name, _Group()).spoil("another operation of the group is invalid")
        self._unreadable = self._unreadable or not words.is_readable
        self._content.update(b"%d\t!%b\n" % (index, hashlib.sha256(_text(given)).digest()))
        self._note_refusal(found)
        return found

    def _note_refusal(self, found: Refusal) -> None:
        self._refused.add(exactjson.dumps(found) + b"\n")
        self._refused_counts[found.reason] += 1
        if self._refused.raw > self._settings.max_lane_bytes:
            raise PayloadTooLarge(
                field="operations",
                value=f"{self._refused_counts.total()} that are refused",
                expected="a request most of which can apply: is this a file of operations?",
            )

    def _refused_with_group(self, item: Indexed) -> Refusal | None:
        group = self._groups.get(item.group or "")
        return refusal(item, *group.refusal_reason) if group and group.refusal_reason else None

    def _line(self, position: int) -> bytes:
        return self._lines.read(self._ends[position], self._ends[position + 1])

    def _item(self, position: int) -> Indexed:
        return _decoder.decode(self._line(position))


class _Compressor:
    """A section in the making."""

    def __init__(self) -> None:
        self._zstd = compressor()
        self._waiting = bytearray()
        self._data = bytearray()
        self.raw = 0
        self.count = 0

    def add(self, line: bytes) -> None:
        """Take one line, its newline included."""
        self._waiting += line
        self.raw += len(line)
        self.count += 1
        if len(self._waiting) >= _PIECE:
            self._compress()

    def write_to(self, body: IO[bytes]) -> Section:
        """Append the section to `body`."""
        self._compress()
        self._data += self._zstd.flush()
        digest = hashlib.sha256(self._data).hexdigest()
        section = Section(offset=body.tell(), length=len(self._data), raw=self.raw, count=self.count, digest=digest)
        body.write(self._data)
        return section

    def _compress(self) -> None:
        self._data += self._zstd.compress(self._waiting)
        self._waiting.clear()


def _indexed(index: int, operation: Operation, attribute: bytes) -> Indexed:
    """The line of an operation; `attribute` is its data in DynamoDB JSON, if an item can hold it."""
    # A patch is merged before it is sent, so its data stays as given.
    is_ready = bool(attribute) and OPERATIONS[operation.op].effect is not Effect.MERGE
    has_text = operation.data is not None and not is_ready
    return Indexed(
        index=index,
        op=operation.op,
        entity=operation.entity,
        key=operation.key,
        attribute=msgspec.Raw(attribute) if is_ready else NOTHING,
        data=msgspec.Raw(exactjson.dumps(operation.data)) if has_text else NOTHING,
        expect_version=operation.expect_version,
        sequence=operation.sequence,
        group=operation.group,
    )


def _spill_file() -> IO[bytes]:
    """A file that lives in memory while it is small; its user closes it."""
    return tempfile.SpooledTemporaryFile(max_size=_SPILL_BEYOND)


def _assembled(header: Header, sections: IO[bytes]) -> Encoded:
    text = exactjson.dumps(header)
    body = _spill_file()
    body.write(MAGIC + len(text).to_bytes(4, "big") + text)
    sections.seek(0)
    while chunk := sections.read(2**20):
        body.write(chunk)
    body.seek(0)
    return Encoded(header=header, digest=hashlib.sha256(text).hexdigest(), body=body)


class _Fields(msgspec.Struct, frozen=True):
    """The words of an operation, whatever they are; its data is not even looked at."""

    op: Any = None
    entity: Any = None
    key: Any = None
    group: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Words:
    """What can be read of an operation that is invalid, so that its refusal names it and its group goes with it.

    `groups` are those that it may belong to; `is_readable` is False where that cannot be told.
    """

    op: str = ""
    entity: str = ""
    key: str = ""
    groups: tuple[str, ...] = ()
    is_readable: bool = True


_GROUP = re.compile(rb'"group"\s*:\s*("(?:[^"\\]|\\.)*")')


def _words(given: OperationInput) -> _Words:
    try:
        if isinstance(given, bytes):
            fields = msgspec.json.decode(given, type=_Fields)
        elif isinstance(given, Operation):
            fields = _Fields(given.op, given.entity, given.key, given.group)
        else:
            fields = _Fields(*map(given.get, _Fields.__struct_fields__))
    except (*exactjson.DecodeFailure, AttributeError):
        groups = _groups_in(given) if isinstance(given, bytes) else ()
        return _Words(groups=groups, is_readable=bool(groups))
    group = _word(fields.group)
    return _Words(
        op=_word(fields.op), entity=_word(fields.entity), key=_word(fields.key), groups=(group,) if group else ()
    )


def _groups_in(line: bytes) -> tuple[str, ...]:
    """Whatever looks like a group in a line that is not JSON. Refusing a group too many is safe, one too few is not."""
    found: list[str] = []
    for text in _GROUP.findall(line):
        try:
            found.append(msgspec.json.decode(text, type=str))
        except ValueError:
            return ()
    return tuple(found)


def _word(value: Any) -> str:
    return value[:200] if isinstance(value, str) and _is_utf8(value) else ""


def _text(given: OperationInput) -> bytes:
    """What stands for an invalid operation in the digest of the content."""
    if isinstance(given, bytes):
        return given
    try:
        return repr(given).encode(errors="backslashreplace")
    except (ValueError, RecursionError):  # an integer too long, or nesting too deep, to be written
        return b"unwritable"


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
