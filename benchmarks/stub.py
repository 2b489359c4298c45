"""A stand-in for DynamoDB: `python -m benchmarks.stub PORT LATENCY_MS [UPSTREAM_PORT]`.

It answers `TransactWriteItems` with success after a set latency, and does nothing. All else is answered in the same way, or
passed on to an upstream where there is one. So the client's own cost is seen, and none of an emulator's.
"""

from __future__ import annotations

import asyncio
import sys
import zlib

_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nx-amz-crc32: %d\r\nContent-Length: 2\r\n\r\n{}"
    % zlib.crc32(b"{}")
)


class Stub(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, latency: float, upstream: int | None) -> None:
        self._latency = latency
        self._upstream = upstream
        self._received = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to answer."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request once it is whole."""
        self._received += data
        while (end := self._end()) and len(self._received) >= end:
            request = bytes(self._received[:end])
            del self._received[:end]
            self._answer(request)

    def _end(self) -> int:
        """Where the first request ends; 0 while its head is not there."""
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return 0
        fields = bytes(self._received[:head]).lower()
        if b"100-continue" in fields and len(self._received) == head + 4:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        at = fields.find(b"content-length:")
        return head + 4 + (int(fields[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0)

    def _answer(self, request: bytes) -> None:
        if self._upstream is not None and b"TransactWriteItems" not in request[:2_000]:
            task = asyncio.get_running_loop().create_task(self._pass_on(request, self._upstream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif self._latency:
            asyncio.get_running_loop().call_later(self._latency, self._transport.write, _ANSWER)
        else:
            self._transport.write(_ANSWER)

    async def _pass_on(self, request: bytes, port: int) -> None:
        await asyncio.sleep(self._latency)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = await reader.read(-1)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        kept = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"keep-alive:"))]
        self._transport.write(b"\r\n".join(kept) + b"\r\n\r\n" + body)


async def main(port: int, latency: float, upstream: int | None) -> None:
    """Serve until ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stub(latency / 1000, upstream), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
