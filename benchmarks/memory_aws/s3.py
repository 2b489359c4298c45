"""S3 in memory: objects at path-style URLs, conditional puts and ranged gets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Reply(NamedTuple):
    """A response of S3."""

    status: int
    body: bytes = b""
    headers: str = ""  # whole lines


class S3:
    """All buckets."""

    def __init__(self) -> None:
        self._buckets: dict[str, dict[str, bytes]] = {}

    def call(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Make a call; `headers` has lower-case names."""
        path, _, query = target.partition("?")
        bucket, _, key = unquote(path.lstrip("/")).partition("/")
        if not key:
            return self._bucket(method, bucket, query)
        objects = self._buckets.get(bucket)
        if objects is None:
            return _error(404, "NoSuchBucket")
        if method == "PUT":
            return _put(objects, key, headers, body)
        if method == "DELETE":
            objects.pop(key, None)
            return Reply(204)
        return _read(objects, key, headers) if key in objects else _error(404, "NoSuchKey")

    def _bucket(self, method: str, bucket: str, query: str) -> Reply:
        if method == "PUT":
            self._buckets.setdefault(bucket, {})
            return Reply(200)
        if bucket not in self._buckets:
            return _error(404, "NoSuchBucket")
        if "lifecycle" in query:
            return _error(404, "NoSuchLifecycleConfiguration")
        prefix = parse_qs(query).get("prefix", [""])[0]
        found = [key for key in sorted(self._buckets[bucket]) if key.startswith(prefix)]
        listed = "".join(f"<Contents><Key>{escape(key)}</Key></Contents>" for key in found[:1000])
        return Reply(200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())


def _put(objects: dict[str, bytes], key: str, headers: Mapping[str, str], body: bytes) -> Reply:
    if headers.get("if-none-match") == "*" and key in objects:
        return _error(412, "PreconditionFailed")
    objects[key] = body
    return Reply(200, headers=f"ETag: {_etag(body)}\r\n")


def _read(objects: Mapping[str, bytes], key: str, headers: Mapping[str, str]) -> Reply:
    content = objects[key]
    tag = f"ETag: {_etag(content)}\r\n"
    found = _RANGE.fullmatch(headers.get("range", ""))
    if not found:
        return Reply(200, content, tag)
    start, end = int(found[1]), int(found[2]) if found[2] else len(content) - 1
    if start >= len(content):
        return _error(416, "InvalidRange")
    end = min(end, len(content) - 1)
    return Reply(206, content[start : end + 1], f"{tag}Content-Range: bytes {start}-{end}/{len(content)}\r\n")


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _error(status: int, code: str) -> Reply:
    return Reply(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())
