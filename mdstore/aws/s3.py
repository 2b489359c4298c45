"""Objects in one S3 bucket: ranged reads, and writes that never replace an existing object."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import quote

from botocore.exceptions import ClientError

from mdstore.aws.boto import boto_errors, error_code
from mdstore.aws.http import SignedHttp
from mdstore.aws.json_protocol import is_retryable
from mdstore.aws.retry import Retry
from mdstore.errors import DeploymentBroken, IntegrityError, NotFound, Unavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
READS = 3
_CODE = re.compile(rb"<Code>(\w+)</Code>")


def read_again(read: Callable[[], T]) -> T:
    """Read an immutable object, up to `READS` times. An `IntegrityError` is retried, as data may be damaged in transit."""
    for _ in range(READS - 1):
        with suppress(IntegrityError):
            return read()
    return read()


class Objects:
    """The objects of one bucket. Calls are retried; they raise `Unavailable` when retries fail, or `DeploymentBroken`.

    Every lane is read from S3, so reads are signed calls without boto3, which would take ten times the CPU.
    """

    def __init__(self, *, client: S3Client, http: SignedHttp, bucket: str, retry: Retry | None = None) -> None:
        self._client = client
        self._http = http
        self._bucket = bucket
        self._retry = retry or Retry()

    def put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        """Store `body` unless `key` exists; return whether it was stored. S3 checks the body's CRC."""
        return self._retry.run(lambda: self._put_new(key, body))

    def get(self, key: str, start: int, end: int) -> bytes:
        """Return bytes `start` to `end` (exclusive), or fewer if the object ends earlier. Raises `NotFound`."""
        return self._retry.run(lambda: self._get(key, start, end))

    def ping(self) -> None:
        """Raise `Unavailable` or `DeploymentBroken` unless the bucket can be reached."""
        with boto_errors(f"bucket {self._bucket!r}"):
            self._client.head_bucket(Bucket=self._bucket)

    def _put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        if not isinstance(body, bytes):
            body.seek(0)
        with boto_errors(f"S3 put {key!r}"):
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, IfNoneMatch="*")
            except ClientError as error:
                if error_code(error) not in ("PreconditionFailed", "412"):
                    raise
                return False
        return True

    def _get(self, key: str, start: int, end: int) -> bytes:
        if {".", ".."} & set(key.split("/")):  # libcurl would resolve them, possibly to a URL outside of the bucket
            raise IntegrityError(f"object {key!r}: a key must not have the parts . and ..")
        answer = self._http.send(self._url + quote(key), (f"Range: bytes={start}-{end - 1}",))
        if answer.status in (200, 206):
            return answer.body
        found = _CODE.search(answer.body)
        code = found[1].decode("ascii", "replace") if found else f"HTTP{answer.status}"
        if code == "InvalidRange":  # the object ends before `start`
            return b""
        if code in ("NoSuchKey", "HTTP404"):  # the status alone will not do: a missing bucket is a 404 too
            raise NotFound("object", key)
        kind = Unavailable if is_retryable(code, answer.status) else DeploymentBroken
        raise kind(f"S3 get {key!r}: {answer.body[:200]!r}", code=code)

    @cached_property
    def _url(self) -> str:
        """The URL that the bucket's keys are appended to, by botocore's rules for hosts and paths."""
        signed = self._client.generate_presigned_url("get_object", Params={"Bucket": self._bucket, "Key": "k"})
        return signed.partition("?")[0].removesuffix("k")
