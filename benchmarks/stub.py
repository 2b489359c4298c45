"""A stand-in for DynamoDB: `python -m benchmarks.stub PORT LATENCY_MS [UPSTREAM_PORT]`.

It answers `TransactWriteItems` with success after a fixed latency, and stores nothing. With an upstream, it forwards all other
calls; without one, it answers them in the same way. Measurements therefore contain the client's cost, and no emulator's.
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
    """The protocol of one client's connection."""

    def __init__(self, latency: float, upstream: int | None) -> None:
        self._latency = latency
        self._upstream = upstream
        self._received = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport for the answers."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each call once it was received completely."""
        self._received += data
        while (end := self._end()) and len(self._received) >= end:
            call = bytes(self._received[:end])
            del self._received[:end]
            self._answer(call)

    def _end(self) -> int:
        """Return where the first call ends, or 0 while its headers are incomplete."""
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return 0
        fields = bytes(self._received[:head]).lower()
        if b"100-continue" in fields and len(self._received) == head + 4:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        at = fields.find(b"content-length:")
        return head + 4 + (int(fields[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0)

    def _answer(self, call: bytes) -> None:
        if self._upstream is not None and b"TransactWriteItems" not in call[:2_000]:
            task = asyncio.get_running_loop().create_task(self._forward(call, self._upstream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif self._latency:
            asyncio.get_running_loop().call_later(self._latency, self._transport.write, _ANSWER)
        else:
            self._transport.write(_ANSWER)

    async def _forward(self, call: bytes, port: int) -> None:
        await asyncio.sleep(self._latency)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(call.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = await reader.read(-1)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        kept = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"keep-alive:"))]
        self._transport.write(b"\r\n".join(kept) + b"\r\n\r\n" + body)


async def main(port: int, latency: float, upstream: int | None) -> None:
    """Serve until the process is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stub(latency / 1000, upstream), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
