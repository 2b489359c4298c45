"""Payloads: a request's operations as one S3 object, partitioned into lanes that are read one by one.

Layout, all of it written once and never changed:

    "MDS1" | header length, 4 bytes, big-endian | header, JSON | lane 0 | lane 1 | ... | refused

A lane is zstd over lines of JSON, each an `Indexed`, in the order of the request: operations whose data is DynamoDB JSON
already, so that a worker sends it as it stands. `refused` is zstd over lines of JSON too: the operations that were refused
before anything was sent. The header has place, count and SHA-256 of each part, and
the message has the header's SHA-256, so a reader trusts no byte that the producer did not write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Annotated, Literal

import msgspec

from mdstore.aws.s3 import READS, Objects, read_again
from mdstore.compression import decompress, most
from mdstore.errors import IntegrityError, InvalidRequest, NotFound, RequestConflict
from mdstore.model import ACCEPTED_VERSIONS, Reference, Refusal, check_request_id
from mdstore.store.operations import Indexed
from mdstore.store.partitioning import MAX_LANE_OPERATIONS

MAGIC = b"MDS1"
_PREFIX = len(MAGIC) + 4
#: One ranged GET brings the header of all but the largest requests, and the whole of a small one.
_FIRST_READ = 2**16
#: No operation and no refusal takes fewer bytes; what claims to hold more of them is a bomb of empty lines.
_SHORTEST_LINE = 16
_MAX_HEADER = 64 * 2**20


Whole = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the payload: `offset` from the header's end and `length` in bytes, `raw` bytes when decompressed."""

    offset: Whole
    length: Whole
    raw: Whole
    count: Whole
    digest: str


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a payload holds; `created_at` in Unix seconds.

    `content` is the SHA-256 of its operations: the same for the same content, whenever and however it was cut.
    """

    v: int
    codec: Literal["zstd"]
    request_id: str
    source: str
    content: str
    created_at: int
    operations: int
    lanes: tuple[Section, ...]
    refused: Section
    refused_counts: dict[str, int]


_header_decoder = msgspec.json.Decoder(Header)
_lane_decoder = msgspec.json.Decoder(Indexed)
_refusal_decoder = msgspec.json.Decoder(Refusal)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A payload ready to be stored: its header, the header's SHA-256 and the whole object's bytes."""

    header: Header
    digest: str
    body: IO[bytes]


class Payloads:
    """Payloads in one bucket, under one prefix; nothing outside of it is ever read or written."""

    def __init__(self, *, objects: Objects, prefix: str, max_lane_bytes: int) -> None:
        self._objects = objects
        self._prefix = prefix
        self._max_lane_bytes = max_lane_bytes
        # A header of a thousand lanes is read once a process and not once a lane.
        self._cached = lru_cache(maxsize=4)(self._read_header)

    def key(self, request_id: str) -> str:
        """The S3 key of a request's payload."""
        return f"{self._prefix}{request_id}"

    def put(self, encoded: Encoded) -> tuple[Reference, bool]:
        """Store a payload unless its request has one; returns its reference and whether it was new.

        Raises `RequestConflict` where the request's payload has other content.
        """
        key = self.key(encoded.header.request_id)
        if self._objects.put_new(key, encoded.body):
            return _reference(encoded.header, key, encoded.digest), True
        stored, digest, _ = self._open(key)
        if (stored.content, stored.source) != (encoded.header.content, encoded.header.source):
            raise RequestConflict(encoded.header.request_id)
        return _reference(stored, key, digest), False

    def find(self, request_id: str) -> Reference:
        """The reference of a stored payload. Raises `NotFound`."""
        key = self.key(request_id)
        header, digest, _ = self._open(key)
        return _reference(header, key, digest)

    def header(self, reference: Reference) -> Header:
        """The header that `reference` vouches for. Raises `IntegrityError`."""
        return self._cached(reference)[0]

    def lane(self, reference: Reference, number: int) -> list[Indexed]:
        """The operations of lane `number`, in the order of the request. Raises `IntegrityError`."""
        header = self.header(reference)
        if not 0 <= number < len(header.lanes):
            raise IntegrityError(f"lane {number}: the payload has {len(header.lanes)}")
        section = header.lanes[number]
        if section.count > MAX_LANE_OPERATIONS:
            raise IntegrityError(f"lane {number} of {reference.payload!r} claims {section.count} operations")
        try:
            operations = _lane_decoder.decode_lines(self._text(reference, section))
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"lane {number} of {reference.payload!r} cannot be decoded: {error}") from error
        if len(operations) != section.count:
            raise IntegrityError(f"lane {number} of {reference.payload!r} does not hold what its header says")
        return operations

    def refused(self, reference: Reference) -> list[Refusal]:
        """The operations that were refused before anything was sent. Raises `IntegrityError`."""
        section = self.header(reference).refused
        return _refusal_decoder.decode_lines(self._text(reference, section)) if section.count else []

    def confine(self, reference: Reference) -> None:
        """Raise `IntegrityError` unless `reference` names the payload of its own request in its own place and version."""
        if reference.v not in ACCEPTED_VERSIONS:
            raise IntegrityError(f"schema version {reference.v}: this worker accepts {sorted(ACCEPTED_VERSIONS)}")
        try:
            check_request_id(reference.request_id)
        except InvalidRequest as error:
            raise IntegrityError(str(error)) from error
        if reference.payload != self.key(reference.request_id):
            raise IntegrityError(f"payload {reference.payload!r} is not the place of request {reference.request_id!r}")

    def _text(self, reference: Reference, section: Section) -> bytes:
        if section.raw > self._max_lane_bytes:
            raise IntegrityError(
                f"a part of {reference.payload!r} claims {section.raw} bytes, at most {self._max_lane_bytes}"
            )
        if section.length > most(section.raw):
            raise IntegrityError(f"a part of {reference.payload!r} claims more bytes than its {section.raw} can take")
        for data in self._tries(reference, section):
            if hashlib.sha256(data).hexdigest() == section.digest:
                break
        else:
            raise IntegrityError(f"a part of {reference.payload!r} does not have the digest that its header says")
        try:
            text = decompress(data, section.raw)
        except ValueError as error:
            raise IntegrityError(f"a part of {reference.payload!r} cannot be decompressed: {error}") from error
        if text.count(b"\n") != section.count or section.count * _SHORTEST_LINE > section.raw:
            raise IntegrityError(f"a part of {reference.payload!r} does not hold what its header says")
        return text

    def _tries(self, reference: Reference, section: Section) -> Iterator[bytes]:
        """A part as it was read with the header, if it was, and as it is read now."""
        _, body_start, first = self._cached(reference)
        start, end = body_start + section.offset, body_start + section.offset + section.length
        if end <= len(first):
            yield first[start:end]
        for _ in range(READS):
            yield self._objects.get(reference.payload, start, end)

    def _read_header(self, reference: Reference) -> tuple[Header, int, bytes]:
        self.confine(reference)
        return read_again(lambda: self._try_header(reference))

    def _try_header(self, reference: Reference) -> tuple[Header, int, bytes]:
        try:
            header, digest, first = self._open(reference.payload)
        except NotFound as error:
            raise IntegrityError(f"payload {reference.payload!r} does not exist") from error
        if digest != reference.digest:
            raise IntegrityError(f"the header of {reference.payload!r} does not have the digest that the message says")
        if header.v != reference.v:
            raise IntegrityError(f"{reference.payload!r} has schema version {header.v}, not {reference.v}")
        said = reference.request_id, reference.source, reference.lanes
        if (header.request_id, header.source, len(header.lanes)) != said:
            raise IntegrityError(f"the header of {reference.payload!r} is of another request than the message")
        body_start = _PREFIX + int.from_bytes(first[len(MAGIC) : _PREFIX], "big")
        return header, body_start, first if body_start < len(first) else b""

    def _open(self, key: str) -> tuple[Header, str, bytes]:
        """The header at `key`, its SHA-256, and the first bytes of the object."""
        first = self._objects.get(key, 0, _FIRST_READ)
        length = int.from_bytes(first[len(MAGIC) : _PREFIX], "big")
        if first[: len(MAGIC)] != MAGIC or length > _MAX_HEADER:
            raise IntegrityError(f"{key!r} is not a payload")
        text = first[_PREFIX : _PREFIX + length]
        if len(text) < length:
            text += self._objects.get(key, _PREFIX + len(text), _PREFIX + length)
        try:
            return _header_decoder.decode(text), hashlib.sha256(text).hexdigest(), first
        except ValueError as error:
            raise IntegrityError(f"the header of {key!r} cannot be decoded: {error}") from error


def _reference(header: Header, key: str, digest: str) -> Reference:
    return Reference(
        v=header.v,
        request_id=header.request_id,
        payload=key,
        digest=digest,
        lanes=len(header.lanes),
        source=header.source,
    )
