"""Content-addressed storage in S3, for data that is too large for a DynamoDB item or an SQS message."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from mdstore import exactjson
from mdstore.aws.concurrent import Task
from mdstore.aws.s3 import Objects, read_again
from mdstore.compression import compress, decompress, most
from mdstore.errors import IntegrityError, NotFound

T = TypeVar("T")


class Contents:
    """Compressed, content-addressed objects of up to `max_bytes` each. Equal content under one prefix is stored once."""

    def __init__(self, *, objects: Objects, max_bytes: int) -> None:
        self._objects = objects
        self._max_bytes = max_bytes

    def put(self, prefix: str, content: bytes) -> str:
        """Store `content` and return its digest, a SHA-256 in hex."""
        return self._objects.run(self.put_task(prefix, content))

    def get(self, prefix: str, digest: str, size: int) -> bytes:
        """Read content of `size` bytes. Raises `IntegrityError` if it does not match its digest or exceeds `max_bytes`."""
        return self._objects.run(self.get_task(prefix, digest, size))

    def put_task(self, prefix: str, content: bytes) -> Task[str]:
        """Task: do what `put` does."""
        digest = hashlib.sha256(content).hexdigest()
        yield from self._objects.put_new_task(self.key(prefix, digest), compress(content))
        return digest

    def get_task(self, prefix: str, digest: str, size: int) -> Task[bytes]:
        """Task: do what `get` does, reading again what may have been damaged in transit."""
        if not 0 <= size <= self._max_bytes:
            raise IntegrityError(f"content {digest!r} of {size} bytes is outside of its bounds, 0 to {self._max_bytes}")
        return (yield from read_again(lambda: self._get(self.key(prefix, digest), digest, size)))

    @staticmethod
    def key(prefix: str, digest: str) -> str:
        """Return the S3 key of content."""
        return f"{prefix}{digest[:2]}/{digest}"

    def _get(self, key: str, digest: str, size: int) -> Task[bytes]:
        try:
            content = decompress((yield from self._objects.get_task(key, 0, most(size))), size)
        except (NotFound, ValueError) as error:
            raise IntegrityError(f"content {key!r} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise IntegrityError(f"content {key!r} does not have its digest")
        return content


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """The pointer that an item holds instead of its data: the S3 key, and the SHA-256 and size in bytes of the data's JSON."""

    key: str
    digest: str
    size: int


class Blobs:
    """Stores record data that is too large for a DynamoDB item."""

    def __init__(self, *, objects: Objects, prefix: str, max_bytes: int) -> None:
        self._objects = objects
        self._contents = Contents(objects=objects, max_bytes=max_bytes)
        self._prefix = prefix

    def put(self, text: bytes) -> Blob:
        """Store data, given as JSON text, and return its pointer."""
        return self._objects.run(self.put_task(text))

    def get(self, blob: Blob) -> dict[str, Any]:
        """Read data. Raises `IntegrityError` if it does not match its pointer."""
        return self._objects.run(self.get_task(blob))

    def put_task(self, text: bytes) -> Task[Blob]:
        """Task: do what `put` does."""
        digest = yield from self._contents.put_task(self._prefix, text)
        return Blob(key=self._contents.key(self._prefix, digest), digest=digest, size=len(text))

    def get_task(self, blob: Blob) -> Task[dict[str, Any]]:
        """Task: do what `get` does."""
        if blob.key != self._contents.key(self._prefix, blob.digest):
            raise IntegrityError(f"blob {blob.key!r} is not at the key that its digest gives")
        text = yield from self._contents.get_task(self._prefix, blob.digest, blob.size)
        data: dict[str, Any] = exactjson.loads(text)
        return data

    def run(self, task: Task[T]) -> T:
        """Run a task that reads or stores data, on its own."""
        return self._objects.run(task)
