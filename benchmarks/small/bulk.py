"""Small requests over HTTP without and with an upload of 64 MiB by another source at the same time."""

from __future__ import annotations

import http.client
import os
import time
from unittest import mock

from benchmarks.load import Order, load
from benchmarks.records import operations
from benchmarks.results import Row
from benchmarks.services import environ_of, http_api, memory_aws
from benchmarks.small.calls import api_key, post
from benchmarks.small.rates import LATENCY_MS
from mdstore import exactjson

_CLIENTS = 64
_WARM_UP = 1.0  # seconds
_ALONE = 5.0  # seconds of small requests alone


def rows(size: int) -> list[Row]:
    """Measure with an upload of at most `size` bytes."""
    body = _body(size)
    with memory_aws(LATENCY_MS) as settings, mock.patch.dict(os.environ, environ_of(settings)), http_api() as api:
        bulk, order = api_key(settings, "bulk"), Order(port=api.port, clients=_CLIENTS, call=post(api_key(settings)))
        with load(order, expected=202) as end:
            time.sleep(_WARM_UP)
            began = time.monotonic()
            time.sleep(_ALONE)
            upload = time.monotonic()
            _upload(api.port, bulk, body)
            uploaded = time.monotonic()
            answers = end()
    times = {"alone": (began, upload), f"beside an upload of {len(body) / 2**20:.3g} MiB": (upload, uploaded)}
    return [
        {
            "small requests": name,
            "seconds": stop - start,
            "p50_ms": answers.milliseconds(0.5, start=start, end=stop),
            "p99_ms": answers.milliseconds(0.99, start=start, end=stop),
        }
        for name, (start, stop) in times.items()
    ]


def _body(size: int) -> bytes:
    body = bytearray()
    for operation in operations(size, "bulk"):
        line = exactjson.dumps(operation) + b"\n"
        if len(body) + len(line) > size:
            break
        body += line
    return bytes(body)


def _upload(port: int, key: str, body: bytes) -> None:
    """Submit one large request. Raises `RuntimeError` if it is not accepted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/x-ndjson"}
    connection.request("POST", "/v1/requests", body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status != 202:
        raise RuntimeError(f"the upload was answered with {answer.status}: {text[:200]!r}")
