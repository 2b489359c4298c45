"""Builds a payload at the producer: takes operations one by one, and divides them into lanes at the end."""

from __future__ import annotations

import hashlib
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import msgspec

from mdstore import exactjson
from mdstore.errors import PayloadTooLarge
from mdstore.model import SCHEMA_VERSION, Operation, Reason, Refusal
from mdstore.settings import Settings
from mdstore.store.content import ContentDigest, digest_of, sorted_json
from mdstore.store.newest_wins import by_sequence
from mdstore.store.operations import NOTHING, OPERATIONS, Indexed
from mdstore.store.packing import MAX_ACTIONS, refusal
from mdstore.store.partitioning import MAX_LANE_OPERATIONS, Partition
from mdstore.store.payload import Encoded, Header, Section
from mdstore.store.sections import SPILL_BEYOND, SectionBuilder, assembled, spill_file
from mdstore.store.spill_buffer import SpillBuffer
from mdstore.store.validation import FieldError, LineTooLong, Validator

_LONGEST_DETAIL = 2_000  # characters of a refusal, usually enough for all problems of an operation
_decoder = msgspec.json.Decoder(Indexed)
_refusal_decoder = msgspec.json.Decoder(Refusal)

#: The forms in which callers may give an operation: a line of JSON, a mapping, or an `Operation`. A file reader gives the
#: error of a line that it cannot read.
OperationInput = bytes | Mapping[str, Any] | Operation | FieldError


class _Groups:
    """The groups of a request: the hashes of each group's keys, and why none of a group's operations can apply.

    A request may have as many groups as operations, so a group takes one small tuple.
    """

    def __init__(self) -> None:
        self._keys: dict[str, tuple[int, ...]] = {}
        self._refused: dict[str, tuple[Reason, str]] = {}

    def add(self, group: str, key: int, name: str) -> None:
        """Add the next operation of a group, on the key with the hash `key`; `name` is the key for texts."""
        keys = self._keys.get(group, ())
        if len(keys) == MAX_ACTIONS:
            self._refused[group] = Reason.INVALID, f"group: more than {MAX_ACTIONS} operations cannot apply atomically"
            return
        if key in keys:
            self._refused.setdefault(group, (Reason.INVALID, f"group: two of its operations are on key {name!r}"))
        self._keys[group] = (*keys, key)

    def refuse(self, group: str, why: str) -> None:
        """Refuse a group, because one of its operations cannot apply."""
        self._refused.setdefault(group, (Reason.GROUP_REFUSED, why))

    def refuse_all(self, why: str) -> None:
        """Refuse every group that has operations."""
        for group in self._keys:
            self.refuse(group, why)

    def refusal(self, group: str | None) -> tuple[Reason, str] | None:
        """Return why the operations of a group cannot apply, or None if they can."""
        return self._refused.get(group) if group is not None else None

    @property
    def any_refused(self) -> bool:
        """Return whether any group is refused."""
        return bool(self._refused)


class PayloadBuilder:
    """Builds one payload from operations.

    It keeps 40 bytes per operation, and the keys of groups, in memory. The operations themselves move to a temporary file once
    they exceed 4 MB.
    """

    def __init__(
        self,
        *,
        validator: Validator,
        settings: Settings,
        newest_wins: bool = False,
        is_follow_up: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._newest_wins = newest_wins
        self.is_follow_up = is_follow_up
        self._validator = validator
        self._settings = settings
        self._lines = SpillBuffer(SPILL_BEYOND)
        self._ends = array("Q", [0])
        self._partition = Partition()
        self._groups = _Groups()
        self._refused = SectionBuilder()
        self._refused_counts: Counter[str] = Counter()
        self._content = ContentDigest(newest_wins=newest_wins)
        self._refused_digests: dict[int, bytes] = {}
        self._has_unknown_group = False
        self._has_recorded_groups = False
        self.count = 0

    def add(self, given: OperationInput) -> Refusal | None:
        """Add the next operation. If it is invalid, return its refusal, which also becomes part of the payload."""
        index = self.count
        self.count += 1
        limit = self._settings.max_request_operations
        if index >= limit:
            raise PayloadTooLarge(field="operations", value=self.count, expected=f"at most {limit}")
        try:
            decoded, size = self._validator.decode_bounded(given)
            text = sorted_json(decoded)
            operation, attribute = self._validator.check(decoded, size or len(text))
            if self._newest_wins:
                operation = by_sequence(operation)
        except FieldError as error:
            return self._refuse(index, given, error)
        self._content.add(decoded, text)
        line = exactjson.dumps(_indexed(index, operation, attribute)) + b"\n"
        self._lines.append(line)
        self._ends.append(self._ends[-1] + len(line))
        key = self._partition.add(operation, len(line))
        if operation.group is not None:
            self._groups.add(operation.group, key, operation.key)
        return None

    def refused_groups(self) -> Iterator[Refusal]:
        """Yield refusals of operations whose group cannot apply. Call this after all operations have been added."""
        if self._has_unknown_group:
            self._groups.refuse_all("a line that cannot be read may belong to the group")
        if self._groups.any_refused:
            for position in range(len(self._partition)):
                found = self._refused_with_group(self._item(position))
                if found:
                    yield found

    def encode(self, request_id: str, source: str) -> Encoded:
        """Divide the operations into lanes and compress them. Raises `PayloadTooLarge` if one key or group exceeds a lane."""
        self._record_refused_groups()
        with spill_file() as body:
            return self._encode(body, request_id, source)

    def join(self, lane: SectionBuilder, refused: SectionBuilder, *, first: int, number: int) -> None:
        """Add the operations to a batch, as its request `number`, with indexes from `first` on. Only for few operations.

        A group's name gets the number of its request, so that groups of different requests stay apart.
        """
        self._record_refused_groups()
        for position in range(len(self._partition)):
            item = self._item(position)
            if self._refused_with_group(item):
                continue
            group = None if item.group is None else f"{number}:{item.group}"
            moved = msgspec.structs.replace(item, index=first + item.index, group=group)
            lane.add(exactjson.dumps(moved) + b"\n")
        for one in _refusal_decoder.decode_lines(self._refused.lines()):
            refused.add(exactjson.dumps(msgspec.structs.replace(one, index=first + one.index)) + b"\n")

    @property
    def refused_counts(self) -> dict[str, int]:
        """How many operations are refused already, by reason."""
        self._record_refused_groups()
        return dict(sorted(self._refused_counts.items()))

    @property
    def content(self) -> str:
        """The digest of the operations as they were given (see `store.content`)."""
        return self._content.text()

    @property
    def raw(self) -> int:
        """The bytes of all lines."""
        return self._ends[-1] + self._refused.raw

    def _record_refused_groups(self) -> None:
        if not self._has_recorded_groups:
            for refused in self.refused_groups():
                self._record_refusal(refused)
            self._has_recorded_groups = True

    def _encode(self, body: IO[bytes], request_id: str, source: str) -> Encoded:
        lanes: list[Section] = []
        limits = self._settings
        for positions in self._partition.lanes(
            operations=limits.lane_operations, size=limits.lane_bytes, limit=limits.max_lane_bytes * 9 // 10
        ):
            section = self._lane(positions).write_to(body)
            if section.count:
                lanes.append(section)
        header = Header(
            v=SCHEMA_VERSION,
            codec="zstd",
            request_id=request_id,
            source=source,
            content=self.content,
            created_at=int(self._clock()),
            operations=self.count,
            lanes=tuple(lanes),
            refused=self._refused.write_to(body),
            refused_counts=self.refused_counts,
            models=self._validator.entities.digest,
            is_follow_up=self.is_follow_up,
        )
        return assembled(header, body)

    def contents(self) -> tuple[str, str]:
        """Return the digest of the operations' content, and the one that release 0.1.0 computed of the encoded lines."""
        former = hashlib.sha256()
        position = 0
        for index in range(self.count):
            refused = self._refused_digests.get(index)
            former.update(b"%d\t!%b\n" % (index, refused) if refused else self._line(position))
            position += not refused
        return self.content, former.hexdigest()

    def close(self) -> None:
        """Discard the operations."""
        self._lines.close()

    def _lane(self, positions: array[int]) -> SectionBuilder:
        lane = SectionBuilder()
        some_refused = self._groups.any_refused
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
        fields = _readable_fields(given)
        found = Refusal(
            index=index,
            reason=error.reason,
            detail=_shortened(str(error)),
            op=fields.op,
            entity=fields.entity,
            key=fields.key,
        )
        for name in fields.groups:
            self._groups.refuse(name, "another operation of the group is invalid")
        self._has_unknown_group = self._has_unknown_group or not fields.is_group_known
        limits = self._settings
        self._content.add_refused(given, max_bytes=limits.max_record_bytes, max_values=limits.max_record_values)
        self._refused_digests[index] = digest_of(given)
        self._record_refusal(found)
        return found

    def _record_refusal(self, found: Refusal) -> None:
        self._refused.add(exactjson.dumps(found) + b"\n")
        self._refused_counts[found.reason] += 1
        if self._refused.raw > self._settings.max_lane_bytes:
            raise PayloadTooLarge(
                field="operations",
                value=f"{self._refused_counts.total()} refused operations",
                expected="fewer refused operations: is this a file of operations?",
            )

    def _refused_with_group(self, item: Indexed) -> Refusal | None:
        why = self._groups.refusal(item.group)
        return refusal(item, *why) if why else None

    def _line(self, position: int) -> bytes:
        return self._lines.read(self._ends[position], self._ends[position + 1])

    def _item(self, position: int) -> Indexed:
        return _decoder.decode(self._line(position))


def _indexed(index: int, operation: Operation, attribute: bytes) -> Indexed:
    """Build the line of an operation. `attribute` is its data in DynamoDB JSON, or empty if it does not fit an item."""
    # A worker merges a patch before sending it, so the line keeps its data in plain JSON.
    is_ready = bool(attribute) and not OPERATIONS[operation.op].merges
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


def _shortened(detail: str) -> str:
    return detail if len(detail) <= _LONGEST_DETAIL else f"{detail[:_LONGEST_DETAIL]}..."


class _RawFields(msgspec.Struct, frozen=True):
    """The fields that identify an operation. They stay encoded, because their values may be of any type and size."""

    op: msgspec.Raw = NOTHING
    entity: msgspec.Raw = NOTHING
    key: msgspec.Raw = NOTHING
    group: msgspec.Raw = NOTHING


@dataclass(frozen=True, kw_only=True, slots=True)
class _ReadableFields:
    """The readable fields of an invalid operation. Its refusal shows them, and its group is refused too.

    `groups` holds the groups that the operation may belong to. `is_group_known` is False if it may belong to any group.
    """

    op: str = ""
    entity: str = ""
    key: str = ""
    groups: tuple[str, ...] = ()
    is_group_known: bool = True


_GROUP = re.compile(rb'"group"\s*+:\s*+("(?:[^"\\]++|\\.)*+")')  # without backtracking, so it takes linear time
_MOST_GROUPS = 1_000  # that one line may name


def _readable_fields(given: OperationInput) -> _ReadableFields:
    if isinstance(given, FieldError):
        return _ReadableFields(is_group_known=isinstance(given, LineTooLong) and not given.may_name_group)
    try:
        if isinstance(given, bytes):
            raw = msgspec.json.decode(given, type=_RawFields)
            found = [_text_in(value) for value in (raw.op, raw.entity, raw.key, raw.group)]
        elif isinstance(given, Operation):
            found = [given.op, given.entity, given.key, given.group]
        else:
            found = list(map(given.get, _RawFields.__struct_fields__))
    except (*exactjson.DecodeFailure, AttributeError):
        groups = _groups_in(given) if isinstance(given, bytes) else ()
        return _ReadableFields(groups=groups, is_group_known=bool(groups))
    op, entity, key, group = map(_text_or_empty, found)
    return _ReadableFields(op=op, entity=entity, key=key, groups=(group,) if group else ())


def _groups_in(line: bytes) -> tuple[str, ...]:
    """Find all text that looks like a group in a line that is not JSON. To refuse one too many is safe; one too few is not."""
    found: list[str] = []
    for match in _GROUP.finditer(line):
        try:
            found.append(msgspec.json.decode(match[1], type=str))
        except ValueError:
            return ()
        if len(found) > _MOST_GROUPS:
            return ()
    return tuple(found)


def _text_in(value: msgspec.Raw) -> Any:
    text = bytes(value)
    return msgspec.json.decode(text) if text.startswith(b'"') else None


def _text_or_empty(value: Any) -> str:
    return value[:200] if isinstance(value, str) and _is_utf8(value) else ""


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
