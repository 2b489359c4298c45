"""Record data too large for a DynamoDB item, kept in S3 under the digest of its content."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.compression import compress, decompress, most
from mdstore.errors import NotFound, Untrusted
from mdstore.objects import Objects


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """The pointer that stands in an item for its data: S3 key, and SHA-256 and size in bytes of the JSON."""

    key: str
    digest: str
    size: int


class Blobs:
    """Content-addressed JSON objects, compressed. The same content is stored once."""

    def __init__(self, *, objects: Objects, prefix: str, max_bytes: int) -> None:
        self._objects = objects
        self._prefix = prefix
        self._max_bytes = max_bytes

    def put(self, data: dict[str, Any]) -> Blob:
        """Store `data` and return its pointer."""
        text = exactjson.dumps(data)
        digest = hashlib.sha256(text).hexdigest()
        key = f"{self._prefix}{digest[:2]}/{digest}"
        self._objects.put_new(key, compress(text))
        return Blob(key=key, digest=digest, size=len(text))

    def get(self, blob: Blob) -> dict[str, Any]:
        """Read data back whole. Raises `Untrusted` where it is not what the pointer says."""
        if not blob.key.startswith(self._prefix) or blob.size > self._max_bytes:
            raise Untrusted(f"blob {blob.key!r} of {blob.size} bytes is outside of its place or bounds")
        try:
            text = decompress(self._objects.get(blob.key, 0, most(blob.size)), blob.size)
        except (NotFound, ValueError) as error:
            raise Untrusted(f"blob {blob.key!r} cannot be read: {error}") from error
        if hashlib.sha256(text).hexdigest() != blob.digest:
            raise Untrusted(f"blob {blob.key!r} does not have the digest that its record says")
        data: dict[str, Any] = exactjson.loads(text)
        return data
