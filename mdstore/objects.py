"""Objects in the one bucket, and the one place where S3's errors are translated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from mdstore.dynamo.retry import Retry
from mdstore.errors import DeploymentBroken, MdstoreError, NotFound, Unavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_NOT_NOW = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "503", "500"})


class Objects:
    """Whole and ranged reads, and writes that never replace what is there."""

    def __init__(self, *, client: S3Client, bucket: str, retry: Retry | None = None) -> None:
        self._client = client
        self._bucket = bucket
        self._retry = retry or Retry()

    def put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        """Store `body` unless something is at `key`; returns whether it was stored. S3 checks the body's CRC."""
        return self._retry.run(lambda: self._put_new(key, body))

    def _put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        if not isinstance(body, bytes):
            body.seek(0)
        with _translated(key):
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    return False
                if _code(error) in ("ConditionalRequestConflict", "409"):
                    raise Unavailable("another writer is at it", code="ConditionalRequestConflict") from error
                raise
        return True

    def get(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer where the object ends before. Raises `NotFound`."""
        return self._retry.run(lambda: self._get(key, start, end))

    def _get(self, key: str, start: int, end: int) -> bytes:
        with _translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}")
            return answer["Body"].read()

    def ping(self) -> None:
        """Raise unless the bucket is there."""
        with _translated(self._bucket):
            self._client.head_bucket(Bucket=self._bucket)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise _error(key, error) from error
    except BotoCoreError as error:
        raise Unavailable(str(error), code=type(error).__name__) from error


def _error(key: str, error: ClientError) -> MdstoreError:
    code = _code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("NoSuchKey", "404"):
        return NotFound("object", key)
    if code in _NOT_NOW or status >= 500:
        return Unavailable(f"S3 {key!r}: {error}", code=code)
    return DeploymentBroken(f"S3 {key!r}: {error}", code=code)
