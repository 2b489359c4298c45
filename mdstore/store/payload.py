"""Payloads: all operations of a request in one S3 object, divided into lanes that can be read one by one.

The object is written once and never changed:

    "MDS1" | header length, 4 bytes, big-endian | header, JSON | lane 0 | lane 1 | ... | refused

A lane is zstd-compressed lines of JSON, each an `Indexed`, in the order of the request. Most data is in DynamoDB JSON already,
so that a worker sends it unchanged. `refused` is zstd-compressed lines of JSON too: the operations that were refused before the
request was published. The header holds offset, count and SHA-256 of each section, and the message holds the header's SHA-256.
So a reader accepts only bytes that the producer wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Literal, NamedTuple

import msgspec

from mdstore.aws.concurrent import Task
from mdstore.aws.s3 import READS, Objects, read_again
from mdstore.compression import decompress, most
from mdstore.errors import IntegrityError, InvalidRequest, NotFound, RequestConflict
from mdstore.model import ACCEPTED_VERSIONS, BatchedRequest, Reference, Refusal, Whole, check_request_id
from mdstore.store.operations import Indexed
from mdstore.store.partitioning import MAX_LANE_OPERATIONS

MAGIC = b"MDS1"
_PREFIX = len(MAGIC) + 4
#: Bytes of the first ranged GET: enough for the header of all but the largest requests, and for the whole of a small one.
_FIRST_READ = 2**16
#: Every operation and refusal takes at least this many bytes. A section that claims shorter lines is a bomb of empty lines.
_SHORTEST_LINE = 16
_MAX_HEADER = 64 * 2**20


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One section of a payload: its `offset` from the end of the header, its `length`, and its `raw` decompressed length."""

    offset: Whole
    length: Whole
    raw: Whole
    count: Whole
    digest: str


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The table of contents of a payload. `created_at` is in Unix seconds.

    `requests` lists the requests of a batch (see `store.batch`), whose `request_id` names the batch; it is empty in the payload
    of a single request.

    `content` is the digest of the operations as they were given (see `store.content`). `models` is the digest of the models
    that they were checked against (see `store.entities`); version 1 has none. `is_follow_up` means that the request was not
    published when its payload was stored: the message of another task publishes it, if that task succeeds.
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
    models: str = ""
    is_follow_up: bool = False
    requests: tuple[BatchedRequest, ...] = ()

    def batched(self, request_id: str) -> BatchedRequest | None:
        """Return a request of the batch, or None if the payload does not hold it as one of a batch."""
        return next((one for one in self.requests if one.request_id == request_id), None)


_header_decoder = msgspec.json.Decoder(Header)
_lane_decoder = msgspec.json.Decoder(Indexed)
_refusal_decoder = msgspec.json.Decoder(Refusal)


class OpenPayload(NamedTuple):
    """A payload whose header was read and checked. `first` holds the object's first bytes; its body starts at `body_start`."""

    reference: Reference
    header: Header
    body_start: int
    first: bytes

    def holds(self, section: Section) -> bool:
        """Return whether `first` contains a section."""
        return self.body_start + section.offset + section.length <= len(self.first)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An encoded payload: its header, the header's SHA-256, and the bytes of the whole object."""

    header: Header
    digest: str
    body: IO[bytes]


class Payloads:
    """The payloads under one prefix of the bucket. Keys outside the prefix are never read or written."""

    def __init__(self, *, objects: Objects, prefix: str, max_lane_bytes: int) -> None:
        self._objects = objects
        self._prefix = prefix
        self._max_lane_bytes = max_lane_bytes
        # The header is read once per process and not once per lane; it is large when there are a thousand lanes.
        self._opened = lru_cache(maxsize=4)(lambda reference: objects.run(self.open_task(reference)))

    def key(self, request_id: str) -> str:
        """Return the S3 key of a request's payload."""
        return f"{self._prefix}{request_id}"

    def put(self, encoded: Encoded) -> tuple[Reference, Header, bool]:
        """Store a payload unless the request has one; return its reference, its header, and whether it was stored now.

        Raises `RequestConflict` if the existing payload has other content.
        """
        key = self.key(encoded.header.request_id)
        if self._objects.put_new(key, encoded.body):
            return _reference(encoded.header, key, encoded.digest), encoded.header, True
        header = encoded.header
        reference, header = self.known(header.request_id, source=header.source, contents=(header.content,))
        return reference, header, False

    def put_task(self, encoded: Encoded) -> Task[bool]:
        """Task: store a payload unless its key has one; return whether it was stored now."""
        return self._objects.put_new_task(self.key(encoded.header.request_id), encoded.body)

    def put_batch(self, encoded: Encoded) -> bool:
        """Store a batch, and return whether its key has it now. If not, it has the empty batch that keeps this one away."""
        key = self.key(encoded.header.request_id)
        return self._objects.put_new(key, encoded.body) or self._objects.run(self._first_task(key))[1] == encoded.digest

    def reference(self, encoded: Encoded) -> Reference:
        """Return the reference to a payload that is about to be stored."""
        return _reference(encoded.header, self.key(encoded.header.request_id), encoded.digest)

    def resolved(self, reference: Reference) -> Reference:
        """Return a reference with the digest of its payload, which the note of a request in a batch does not have.

        Raises `NotFound` or `IntegrityError`.
        """
        return reference if reference.digest else self.find(reference.request_id)[0]

    def known(self, request_id: str, *, source: str, contents: Collection[str]) -> tuple[Reference, Header]:
        """Return the reference and the header of a stored payload, if its content is one of `contents`.

        Raises `NotFound` if there is no payload, `RequestConflict` if it has other content, and `IntegrityError`.
        """
        reference, header = self.find(request_id)
        if header.source != source or header.content not in contents:
            raise RequestConflict(request_id)
        return reference, header

    def find(self, request_id: str) -> tuple[Reference, Header]:
        """Return the reference and the header of a stored payload. Raises `NotFound` or `IntegrityError`."""
        key = self.key(request_id)
        header, digest, _ = self._objects.run(self._first_task(key))
        reference = _reference(header, key, digest)
        self.confine(reference)
        return reference, header

    def header(self, reference: Reference) -> Header:
        """Read the header, checked against `reference`. Raises `IntegrityError`."""
        return self._opened(reference).header

    def is_batch(self, reference: Reference) -> bool:
        """Return whether the payload is intact and holds a batch. Raises `Unavailable` or `DeploymentBroken`."""
        try:
            return bool(self.header(reference).requests)
        except IntegrityError:
            return False

    def lane(self, reference: Reference, number: int) -> list[Indexed]:
        """Read the operations of lane `number`, in the order of the request. Raises `IntegrityError`."""
        return self._objects.run(self.lane_task(self._opened(reference), number))

    def open_task(self, reference: Reference) -> Task[OpenPayload]:
        """Task: read and check the header, and with it the whole of a small payload. Raises `IntegrityError`."""
        self.confine(reference)
        return (yield from read_again(lambda: self._open_once_task(reference)))

    def lane_task(self, payload: OpenPayload, number: int) -> Task[list[Indexed]]:
        """Task: read the operations of lane `number` of an open payload. Raises `IntegrityError`."""
        reference, lanes = payload.reference, payload.header.lanes
        if not 0 <= number < len(lanes):
            raise IntegrityError(f"lane {number}: the payload has {len(lanes)} lanes")
        section = lanes[number]
        if section.count > MAX_LANE_OPERATIONS:
            raise IntegrityError(f"lane {number} of {reference.payload!r} claims {section.count} operations")
        try:
            operations = _lane_decoder.decode_lines((yield from self._text_task(payload, section)))
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"lane {number} of {reference.payload!r} cannot be decoded: {error}") from error
        if len(operations) != section.count:
            raise IntegrityError(f"lane {number} of {reference.payload!r} does not hold what its header says")
        return operations

    def refused(self, reference: Reference) -> list[Refusal]:
        """Read the refusals of operations that were refused before the request was published. Raises `IntegrityError`."""
        payload = self._opened(reference)
        section = payload.header.refused
        if not section.count:
            return []
        return _refusal_decoder.decode_lines(self._objects.run(self._text_task(payload, section)))

    def confine(self, reference: Reference) -> None:
        """Raise `IntegrityError` unless `reference` has an accepted version and the S3 key of its own request."""
        if reference.v not in ACCEPTED_VERSIONS:
            raise IntegrityError(f"schema version {reference.v}: this worker accepts {sorted(ACCEPTED_VERSIONS)}")
        try:
            check_request_id(reference.request_id)
        except InvalidRequest as error:
            raise IntegrityError(str(error)) from error
        if reference.payload != self.key(reference.request_id):
            raise IntegrityError(f"payload {reference.payload!r} is not the key of request {reference.request_id!r}")

    def _text_task(self, payload: OpenPayload, section: Section) -> Task[bytes]:
        """Task: return the lines of a section, decompressed."""
        name = payload.reference.payload
        if section.raw > self._max_lane_bytes:
            raise IntegrityError(f"a section of {name!r} claims {section.raw} bytes, more than {self._max_lane_bytes}")
        if section.length > most(section.raw):
            raise IntegrityError(f"a section of {name!r} claims more bytes than its {section.raw} can take")
        data = yield from self._section_task(payload, section)
        try:
            text = decompress(data, section.raw)
        except ValueError as error:
            raise IntegrityError(f"a section of {name!r} cannot be decompressed: {error}") from error
        if text.count(b"\n") != section.count or section.count * _SHORTEST_LINE > section.raw:
            raise IntegrityError(f"a section of {name!r} does not hold what its header says")
        return text

    def _section_task(self, payload: OpenPayload, section: Section) -> Task[bytes]:
        """Task: return a section from the object's first read, if it is intact there, or else from up to `READS` new reads."""
        start = payload.body_start + section.offset
        end = start + section.length
        if payload.holds(section) and _is_intact(payload.first[start:end], section):
            return payload.first[start:end]
        for _ in range(READS):
            data = yield from self._objects.get_task(payload.reference.payload, start, end)
            if _is_intact(data, section):
                return data
        raise IntegrityError(
            f"a section of {payload.reference.payload!r} does not have the digest that its header says"
        )

    def _open_once_task(self, reference: Reference) -> Task[OpenPayload]:
        try:
            header, digest, first = yield from self._first_task(reference.payload)
        except NotFound as error:
            raise IntegrityError(f"payload {reference.payload!r} does not exist") from error
        if digest != reference.digest:
            raise IntegrityError(f"the header of {reference.payload!r} does not have the digest that the message says")
        if header.v != reference.v:
            raise IntegrityError(f"{reference.payload!r} has schema version {header.v}, not {reference.v}")
        expected = reference.request_id, reference.source, reference.lanes
        if (header.request_id, header.source, len(header.lanes)) != expected:
            raise IntegrityError(f"the header of {reference.payload!r} belongs to another request than the message")
        body_start = _PREFIX + int.from_bytes(first[len(MAGIC) : _PREFIX], "big")
        return OpenPayload(reference, header, body_start, first if body_start < len(first) else b"")

    def _first_task(self, key: str) -> Task[tuple[Header, str, bytes]]:
        """Task: read the header of the payload at `key`; return it, its SHA-256, and the first bytes of the object."""
        first = yield from self._objects.get_task(key, 0, _FIRST_READ)
        length = int.from_bytes(first[len(MAGIC) : _PREFIX], "big")
        if first[: len(MAGIC)] != MAGIC or length > _MAX_HEADER:
            raise IntegrityError(f"{key!r} is not a payload")
        text = first[_PREFIX : _PREFIX + length]
        if len(text) < length:
            text += yield from self._objects.get_task(key, _PREFIX + len(text), _PREFIX + length)
        try:
            return _header_decoder.decode(text), hashlib.sha256(text).hexdigest(), first
        except ValueError as error:
            raise IntegrityError(f"the header of {key!r} cannot be decoded: {error}") from error


def _is_intact(data: bytes, section: Section) -> bool:
    return hashlib.sha256(data).hexdigest() == section.digest


def _reference(header: Header, key: str, digest: str) -> Reference:
    return Reference(
        v=header.v,
        request_id=header.request_id,
        payload=key,
        digest=digest,
        lanes=len(header.lanes),
        source=header.source,
    )
