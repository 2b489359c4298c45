"""The server: one connection's protocol, and the dispatch of each call to its service."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qsl

import msgspec
import uvloop

from benchmarks.memory_aws.dynamodb import ApiError, DynamoDb
from benchmarks.memory_aws.s3 import S3
from benchmarks.memory_aws.sns import Sns
from benchmarks.memory_aws.sqs import Sqs

_TARGET = re.compile(rb"\r\nx-amz-target: *(\w+)\.(\w+)\r\n", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_JSON = "application/x-amz-json-1.0"
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Aws:
    """All services, and how often each operation was called."""

    def __init__(self, port: int, latency: float) -> None:
        self.latency = latency
        self.calls: Counter[str] = Counter()
        self.s3, self.dynamodb, self.sqs = S3(), DynamoDb(), Sqs(f"http://127.0.0.1:{port}")
        self.sns = Sns(self.sqs)
        self._date = (0, "")

    def date(self) -> str:
        """Return the time as an HTTP date."""
        now = int(time.time())
        if now != self._date[0]:
            self._date = now, formatdate(now, usegmt=True)
        return self._date[1]


class Connection(asyncio.Protocol):
    """One client's connection. Its calls are answered in the order in which they are made."""

    def __init__(self, aws: Aws) -> None:
        self._aws = aws
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport for the answers."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        """Serve each call that was received completely."""
        self._received += data
        while (head := self._received.find(b"\r\n\r\n")) >= 0:
            heading = bytes(self._received[: head + 2])
            found = _LENGTH.search(heading)
            end = head + 4 + (int(found[1]) if found else 0)
            if len(self._received) < end:
                if len(self._received) == head + 4 and b"100-continue" in heading.lower():
                    self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            body = bytes(self._received[head + 4 : end])
            del self._received[:end]
            try:
                self._serve(heading, body)
            except ApiError as error:
                self._answer_json(400, error.body)
            except Exception as error:
                self._answer_json(
                    400, {"__type": "x#ValidationException", "message": f"{type(error).__name__}: {error}"}
                )

    def _serve(self, heading: bytes, body: bytes) -> None:
        aws = self._aws
        if target := _TARGET.search(heading):
            service, operation = target[1].decode(), target[2].decode()
            aws.calls[operation] += 1
            if service == "AmazonSQS":
                aws.sqs.call(operation, _decode(body), partial(self._answer_json, 200))
            else:
                self._answer_json(200, aws.dynamodb.call(operation, _decode(body)))
            return
        method, path = heading.split(b" ", 2)[:2]
        if path == b"/_calls":
            self._answer(200, json.dumps({**aws.calls, "write units": aws.dynamodb.write_units}).encode(), delay=False)
        elif method == b"POST" and path == b"/":
            fields = dict(parse_qsl(body.decode(), keep_blank_values=True))
            aws.calls[fields["Action"]] += 1
            status, text = aws.sns.call(fields["Action"], fields)
            self._answer(status, text)
        else:
            aws.calls[f"{method.decode()} object"] += 1
            reply = aws.s3.call(method.decode(), path.decode(), _headers(heading), body)
            self._answer(reply.status, b"" if method == b"HEAD" else reply.body, reply.headers, length=len(reply.body))

    def _answer_json(self, status: int, body: Mapping[str, Any]) -> None:
        text = _encode(body)
        self._answer(status, text, f"Content-Type: {_JSON}\r\nx-amz-crc32: {zlib.crc32(text)}\r\n")

    def _answer(
        self, status: int, body: bytes, headers: str = "", *, delay: bool = True, length: int | None = None
    ) -> None:
        size = len(body) if length is None else length
        phrase = HTTPStatus(status).phrase
        head = f"HTTP/1.1 {status} {phrase}\r\nDate: {self._aws.date()}\r\n{headers}Content-Length: {size}\r\n\r\n"
        if self._aws.latency and delay:
            asyncio.get_running_loop().call_later(self._aws.latency, self._transport.write, head.encode() + body)
        else:
            self._transport.write(head.encode() + body)


def _headers(heading: bytes) -> dict[str, str]:
    lines = heading.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


async def main(port: int, latency: float) -> None:
    """Serve until the process is killed."""
    aws = Aws(port, latency / 1000)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(aws), "127.0.0.1", port, backlog=1_024)
    await server.serve_forever()


if __name__ == "__main__":
    gc.disable()  # nearly all objects are data that is kept, so searching them for garbage would only take time
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
