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
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Literal

import msgspec

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
        self._cached = lru_cache(maxsize=4)(self._read_header)

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

    def put_batch(self, encoded: Encoded) -> bool:
        """Store a batch, and return whether its key has it now. If not, it has the empty batch that keeps this one away."""
        key = self.key(encoded.header.request_id)
        return self._objects.put_new(key, encoded.body) or self._open(key)[1] == encoded.digest

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
        header, digest, _ = self._open(key)
        reference = _reference(header, key, digest)
        self.confine(reference)
        return reference, header

    def header(self, reference: Reference) -> Header:
        """Read the header, checked against `reference`. Raises `IntegrityError`."""
        return self._cached(reference)[0]

    def is_batch(self, reference: Reference) -> bool:
        """Return whether the payload is intact and holds a batch. Raises `Unavailable` or `DeploymentBroken`."""
        try:
            return bool(self.header(reference).requests)
        except IntegrityError:
            return False

    def lane(self, reference: Reference, number: int) -> list[Indexed]:
        """Read the operations of lane `number`, in the order of the request. Raises `IntegrityError`."""
        header = self.header(reference)
        if not 0 <= number < len(header.lanes):
            raise IntegrityError(f"lane {number}: the payload has {len(header.lanes)} lanes")
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
        """Read the refusals of operations that were refused before the request was published. Raises `IntegrityError`."""
        section = self.header(reference).refused
        return _refusal_decoder.decode_lines(self._text(reference, section)) if section.count else []

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

    def _text(self, reference: Reference, section: Section) -> bytes:
        if section.raw > self._max_lane_bytes:
            raise IntegrityError(
                f"a section of {reference.payload!r} claims {section.raw} bytes, more than {self._max_lane_bytes}"
            )
        if section.length > most(section.raw):
            raise IntegrityError(
                f"a section of {reference.payload!r} claims more bytes than its {section.raw} can take"
            )
        for data in self._section_reads(reference, section):
            if hashlib.sha256(data).hexdigest() == section.digest:
                break
        else:
            raise IntegrityError(f"a section of {reference.payload!r} does not have the digest that its header says")
        try:
            text = decompress(data, section.raw)
        except ValueError as error:
            raise IntegrityError(f"a section of {reference.payload!r} cannot be decompressed: {error}") from error
        if text.count(b"\n") != section.count or section.count * _SHORTEST_LINE > section.raw:
            raise IntegrityError(f"a section of {reference.payload!r} does not hold what its header says")
        return text

    def _section_reads(self, reference: Reference, section: Section) -> Iterator[bytes]:
        """Yield a section from the first read of the object, if that contains it, and then from up to `READS` new reads."""
        _, body_start, first = self._cached(reference)
        start, end = body_start + section.offset, body_start + section.offset + section.length
        if end <= len(first):
            yield first[start:end]
        for _ in range(READS):
            yield self._objects.get(reference.payload, start, end)

    def _read_header(self, reference: Reference) -> tuple[Header, int, bytes]:
        self.confine(reference)
        return read_again(lambda: self._read_header_once(reference))

    def _read_header_once(self, reference: Reference) -> tuple[Header, int, bytes]:
        try:
            header, digest, first = self._open(reference.payload)
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
        return header, body_start, first if body_start < len(first) else b""

    def _open(self, key: str) -> tuple[Header, str, bytes]:
        """Read the header of the payload at `key`; return it, its SHA-256, and the first bytes of the object."""
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
