"""A proxy that delays and counts calls: `python -m benchmarks.proxy PORT UPSTREAM_PORT LATENCY_MS`.

`GET /_calls` returns the number of calls by operation as JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter

_OPERATION = re.compile(rb"(?:x-amz-target:[^\r\n]*\.|\bAction=)(\w+)", re.IGNORECASE)


class Proxy:
    """Forwards the calls of all connections and counts them."""

    def __init__(self, upstream: int, latency: float) -> None:
        self._upstream = upstream
        self._latency = latency
        self._calls: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client's connection over a connection to the upstream."""
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            while call := await _message(reader, writer):
                if call.startswith(b"GET /_calls "):
                    body = json.dumps(self._calls).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                    continue
                found = _OPERATION.search(call)
                self._calls[found[1].decode() if found else "?"] += 1
                await asyncio.sleep(self._latency)
                up_writer.write(call)
                writer.write(await _message(up_reader, None))
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()
            up_writer.close()


async def _message(reader: asyncio.StreamReader, client: asyncio.StreamWriter | None) -> bytes:
    """Read one whole HTTP message; empty at the end of the connection. A `client` that waits for 100 Continue gets it."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    if client is not None and b"100-continue" in head.lower():
        client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = re.sub(rb"(?i)\r\nexpect:[^\r\n]*", b"", head)
    if b"transfer-encoding: chunked" in head.lower():
        return head + await _chunks(reader)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(size, 16) + 2)
        found += size + chunk
        if int(size, 16) == 0:
            return found


async def main(port: int, upstream: int, latency_ms: float) -> None:
    """Serve until the process is killed."""
    proxy = Proxy(upstream, latency_ms / 1000)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", port, limit=2**22)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
