"""Objects in one S3 bucket: ranged reads, and writes that never replace an existing object."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from io import SEEK_END, BytesIO
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from mdstore.aws.concurrent import ServiceCall, Task
from mdstore.aws.http import Body, Response, SignedHttp, Upload
from mdstore.aws.json_protocol import is_retryable
from mdstore.aws.retry import Retry
from mdstore.errors import DeploymentBroken, IntegrityError, MdstoreError, NotFound, Unavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
READS = 3
_CODE = re.compile(rb"<Code>(\w+)</Code>")


def read_again(read: Callable[[], Task[T]]) -> Task[T]:
    """Task: read an immutable object, up to `READS` times. `IntegrityError` is retried: data may be damaged in transit."""
    for _ in range(READS - 1):
        with suppress(IntegrityError):
            return (yield from read())
    return (yield from read())


class Objects:
    """The objects of one bucket. Calls are retried; they raise `Unavailable` when retries fail, or `DeploymentBroken`.

    All calls are signed by libcurl. boto3 would take ten times the CPU, and it has no time limit for a whole call: a connection
    that ended after `100 Continue` kept a write in a busy loop forever.
    """

    def __init__(
        self, *, bucket: str, bucket_url: Callable[[], str], http: SignedHttp, retry: Retry | None = None
    ) -> None:
        """`bucket_url` returns the URL that the bucket's keys are appended to."""
        self._bucket = bucket
        self._bucket_url = bucket_url
        self._http = http
        self._retry = retry or Retry()

    def put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        """Store `body` unless `key` exists; return whether it was stored. S3 checks the body's SHA-256."""
        return self.run(self.put_new_task(key, body))

    def get(self, key: str, start: int, end: int) -> bytes:
        """Return bytes `start` to `end` (exclusive), or fewer if the object ends earlier. Raises `NotFound`."""
        return self.run(self.get_task(key, start, end))

    def ping(self) -> None:
        """Raise `Unavailable` or `DeploymentBroken` unless the bucket can be reached."""
        _read_listing(self._bucket, self._http.send(f"{self._url.removesuffix('/')}?list-type=2&max-keys=1"))

    def put_new_task(self, key: str, body: bytes | IO[bytes]) -> Task[bool]:
        """Task: do what `put_new` does."""
        content = BytesIO(body) if isinstance(body, bytes) else body
        digest = _digest(content)
        headers = (
            "If-None-Match: *",
            f"X-Amz-Content-Sha256: {digest.hex()}",
            f"X-Amz-Checksum-Sha256: {base64.b64encode(digest).decode()}",  # buckets with Object Lock require a checksum
        )
        upload = Upload(content, content.seek(0, SEEK_END))
        stored: bool = yield self._call(key, headers, upload, _read_put)
        return stored

    def get_task(self, key: str, start: int, end: int) -> Task[bytes]:
        """Task: do what `get` does."""
        content: bytes = yield self._call(key, (f"Range: bytes={start}-{end - 1}",), None, _read_get)
        return content

    def run(self, task: Task[T]) -> T:
        """Run a task that calls nothing but S3, on its own."""
        step: Callable[[], Any] = partial(next, task)
        while True:
            try:
                call: ServiceCall = step()
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                value = self._retry.run(call.send)
            except MdstoreError as error:
                step = partial(task.throw, error)
            else:
                step = partial(task.send, value)

    def _call(
        self, key: str, headers: tuple[str, ...], body: Body, read: Callable[[str, Response], Any]
    ) -> ServiceCall:
        if {".", ".."} & set(key.split("/")):  # libcurl would resolve them, possibly to a URL outside the bucket
            raise IntegrityError(f"object {key!r}: a key must not have the parts . and ..")
        return ServiceCall(self._http, self._url + quote(key), headers, body, partial(read, key))

    @cached_property
    def _url(self) -> str:
        return self._bucket_url()


def path_url(endpoint: str, bucket: str) -> str:
    """Return a bucket's URL at an endpoint other than AWS's, where the bucket is part of the path."""
    return f"{endpoint.rstrip('/')}/{bucket}/"


def find_bucket_url(client: S3Client, bucket: str) -> str:
    """Return a bucket's URL by botocore's rules for hosts and paths."""
    signed = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
    return signed.partition("?")[0].removesuffix("k")


def _digest(content: IO[bytes]) -> bytes:
    content.seek(0)
    digest = hashlib.sha256()
    while piece := content.read(2**20):
        digest.update(piece)
    return digest.digest()


def _read_put(key: str, answer: Response) -> bool:
    if answer.status == 200:
        return True
    if answer.status == 412:  # the object exists
        return False
    raise _error(f"S3 put {key!r}", answer)


def _read_get(key: str, answer: Response) -> bytes:
    if answer.status in (200, 206):
        return answer.body
    code = _code(answer)
    if code == "InvalidRange":  # the object ends before `start`
        return b""
    if code in ("NoSuchKey", "HTTP404"):  # the status alone is not enough: a missing bucket is a 404 too
        raise NotFound("object", key)
    raise _error(f"S3 get {key!r}", answer)


def _read_listing(bucket: str, answer: Response) -> None:
    if answer.status != 200:
        raise _error(f"bucket {bucket!r}", answer)


def _code(answer: Response) -> str:
    found = _CODE.search(answer.body)
    return found[1].decode("ascii", "replace") if found else f"HTTP{answer.status}"


def _error(what: str, answer: Response) -> MdstoreError:
    code = _code(answer)
    kind = Unavailable if is_retryable(code, answer.status) else DeploymentBroken
    return kind(f"{what}: {answer.body[:200]!r}", code=code)
