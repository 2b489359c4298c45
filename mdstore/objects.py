"""Objects in the one bucket: whole and ranged reads, and writes that never replace what is there."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from botocore.exceptions import ClientError

from mdstore.aws import error_code, translated
from mdstore.dynamo.retry import Retry
from mdstore.errors import NotFound

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Objects:
    """Retries while S3 says "not now". Raises `Unavailable` when it does not stop, and `DeploymentBroken`."""

    def __init__(self, *, client: S3Client, bucket: str, retry: Retry | None = None) -> None:
        self._client = client
        self._bucket = bucket
        self._retry = retry or Retry()

    def put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        """Store `body` unless something is at `key`; returns whether it was stored. S3 checks the body's CRC."""
        return self._retry.run(lambda: self._put_new(key, body))

    def get(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer where the object ends before. Raises `NotFound`."""
        return self._retry.run(lambda: self._get(key, start, end))

    def ping(self) -> None:
        """Raise unless the bucket is there."""
        with translated(f"bucket {self._bucket!r}"):
            self._client.head_bucket(Bucket=self._bucket)

    def _put_new(self, key: str, body: bytes | IO[bytes]) -> bool:
        if not isinstance(body, bytes):
            body.seek(0)
        with translated(f"S3 put {key!r}"):
            try:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=body, IfNoneMatch="*")
            except ClientError as error:
                if error_code(error) not in ("PreconditionFailed", "412"):
                    raise
                return False
        return True

    def _get(self, key: str, start: int, end: int) -> bytes:
        with translated(f"S3 get {key!r}"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}")
                return answer["Body"].read()
            except ClientError as error:
                if error_code(error) == "InvalidRange":  # nothing of the object is there
                    return b""
                if error_code(error) not in ("NoSuchKey", "404"):
                    raise
                raise NotFound("object", key) from error
