"""Content too large for where it belongs, kept in S3 under the digest of what it is: record data, and what else is text."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.aws.s3 import Objects, read_again
from mdstore.compression import compress, decompress, most
from mdstore.errors import IntegrityError, NotFound


class Contents:
    """Content-addressed objects, compressed, of up to `max_bytes`. The same content under the same prefix is stored once."""

    def __init__(self, *, objects: Objects, max_bytes: int) -> None:
        self._objects = objects
        self._max_bytes = max_bytes

    def put(self, prefix: str, content: bytes) -> str:
        """Store `content`; returns its digest, SHA-256 in hex."""
        digest = hashlib.sha256(content).hexdigest()
        self._objects.put_new(self.key(prefix, digest), compress(content))
        return digest

    def get(self, prefix: str, digest: str, size: int) -> bytes:
        """Read `size` bytes back whole. Raises `IntegrityError` where they are not what the digest says, or too many."""
        if not 0 <= size <= self._max_bytes:
            raise IntegrityError(f"content {digest!r} of {size} bytes is outside of its bounds, 0 to {self._max_bytes}")
        return read_again(lambda: self._get(self.key(prefix, digest), digest, size))

    @staticmethod
    def key(prefix: str, digest: str) -> str:
        """Where content lies."""
        return f"{prefix}{digest[:2]}/{digest}"

    def _get(self, key: str, digest: str, size: int) -> bytes:
        try:
            content = decompress(self._objects.get(key, 0, most(size)), size)
        except (NotFound, ValueError) as error:
            raise IntegrityError(f"content {key!r} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise IntegrityError(f"content {key!r} does not have its digest")
        return content


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """The pointer that stands in an item for its data: S3 key, and SHA-256 and size in bytes of the JSON."""

    key: str
    digest: str
    size: int


class Blobs:
    """Record data too large for a DynamoDB item."""

    def __init__(self, *, objects: Objects, prefix: str, max_bytes: int) -> None:
        self._contents = Contents(objects=objects, max_bytes=max_bytes)
        self._prefix = prefix

    def put(self, text: bytes) -> Blob:
        """Store data, given as JSON, and return its pointer."""
        digest = self._contents.put(self._prefix, text)
        return Blob(key=self._contents.key(self._prefix, digest), digest=digest, size=len(text))

    def get(self, blob: Blob) -> dict[str, Any]:
        """Read data back whole. Raises `IntegrityError` where it is not what the pointer says."""
        if blob.key != self._contents.key(self._prefix, blob.digest):
            raise IntegrityError(f"blob {blob.key!r} is outside of its place")
        data: dict[str, Any] = exactjson.loads(self._contents.get(self._prefix, blob.digest, blob.size))
        return data
