"""Limits on connections, so that callers without a key cannot deny the service to all others.

uvicorn closes neither a connection that sends nothing, nor one whose caller does not read the answer. `LimitedConnection` does.
`mdstore api` uses it; so does `uvicorn --factory mdstore.api:create_api --http mdstore.api.connections:LimitedConnection`.

A connection is idle while it has no request: until the first one's head is complete, and between two requests. When a new
connection would be one too many, the one that has been idle for the longest is closed. If none is idle, the new one is refused.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from mdstore.errors import ConfigurationError
from mdstore.settings import Settings

logger = logging.getLogger(__name__)
#: The backlog of asyncio's server, which accepts up to this many connections in one go before the first can be refused.
BACKLOG = 128
_MOST, _FEWEST = 2_000, 32  # connections, if the setting says nothing
_OTHER_FILES = 256  # open files besides: connections of up to 60 threads to AWS, payloads that are built, logs
_MINUTE = 60.0
_INVALID = "Invalid HTTP request received."  # as uvicorn says it
_PIECE = 4_096  # bytes that are parsed at once
_LARGEST_HEAD = 16_384  # bytes of a request's line and headers, or of any other part of a message but the body
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    b'{"type":"urn:mdstore:problem:unavailable","title":"Too many connections","status":503,'
    b'"detail":"All connections are in use. Repeat the call later."}'
)


def allowed_connections(settings: Settings) -> int:
    """Return how many connections the API may have, after raising this process's limit of open files as far as needed.

    Raises `ConfigurationError` if the limit cannot be raised far enough.
    """
    wanted = settings.api_max_connections or _MOST
    others = BACKLOG + settings.api_max_bodies + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = soft
    if soft != resource.RLIM_INFINITY and soft < wanted + others:
        files = wanted + others if hard == resource.RLIM_INFINITY else min(hard, wanted + others)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    most = wanted if files == resource.RLIM_INFINITY else min(wanted, files - others)
    fewest = settings.api_max_connections or _FEWEST
    if most < fewest:
        expected = f"at most {max(0, most)}, or a limit of {fewest + others} open files (ulimit -n), which is {files}"
        raise ConfigurationError(key="api_max_connections", value=fewest, expected=expected)
    return most


class Connections:
    """The open connections of one server, and their limits."""

    def __init__(self, settings: Settings) -> None:
        self._most = allowed_connections(settings)
        self.head_timeout = float(settings.api_head_timeout)
        self.write_timeout = float(settings.api_write_timeout)
        self._open: set[LimitedConnection] = set()
        self._idle: dict[LimitedConnection, None] = {}  # the one that has been idle for the longest is the first
        self._log = LimitedLog()

    def add(self, new: LimitedConnection) -> bool:
        """Add a connection, and close another if there are too many. Return False if the new one must be refused."""
        if len(self._open) >= self._most:
            if not self._idle:
                self._log.warn("refused, because all %d are in use", self._most)
                return False
            self._log.warn("closed while idle, because there are more than %d", self._most)
            next(iter(self._idle)).drop()
        self._open.add(new)
        self._idle[new] = None
        return True

    def mark(self, connection: LimitedConnection, *, busy: bool) -> None:
        """Note that a connection has a request, or has none any more."""
        if busy:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def remove(self, connection: LimitedConnection) -> None:
        """Forget a connection that is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def time_out(self, connection: LimitedConnection) -> None:
        """Close a connection that is too slow."""
        self._log.warn("closed, because they were too slow")
        connection.drop()


class LimitedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection with limits. `Connections` is in the state that the application's lifespan yields."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # A length that is given in two ways is refused with a problem document, by `conventions`.
        self.parser.set_dangerous_leniencies(lenient_chunked_length=True)
        self._all: Connections = app_state["connections"]
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._is_message_complete = True
        self._undigested = 0  # bytes since the last complete part of a message
        self._held = bytearray()  # what came behind a request that waits for its turn

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        super().connection_made(transport)
        if self._all.add(self):
            self._limit_reading()
        else:
            transport.write(_REFUSAL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.pipeline:
            self._held += data
            self.flow.pause_reading()
            return
        self._parse(data)
        self._limit_reading()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_message_complete = False

    def on_headers_complete(self) -> None:
        self._undigested = 0
        self._check_headers()
        super().on_headers_complete()
        self.headers = []  # a chunked body may end with more headers, which no one may take for those above it

    def on_body(self, body: bytes) -> None:
        self._undigested = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._undigested = 0
        self._is_message_complete = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._held and not self.pipeline:
            held, self._held = bytes(self._held), bytearray()
            self._parse(held)
        if self._has_request() or not self._is_message_complete:
            self._limit_reading()
        else:  # uvicorn's keep-alive timeout applies
            self._all.mark(self, busy=False)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self._all.write_timeout, self._all.time_out, self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def drop(self) -> None:
        """Close the connection at once, without waiting until the caller has read what was written."""
        self._all.remove(self)
        self.transport.abort()

    def _check_headers(self) -> None:
        """Refuse what the parser lets pass. It turns the error into a response with status 400."""
        hosts = 0
        for name, value in self.headers:
            hosts += name == b"host"
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise ValueError("expected the transfer encoding chunked")
        if hosts != 1 and self.parser.get_http_version() == "1.1":
            raise ValueError("expected one Host header")

    def _parse(self, data: bytes) -> None:
        """Parse piece by piece, and hold what comes behind a request that waits: many small requests take much memory."""
        for start in range(0, len(data), _PIECE):
            if self.transport.is_closing():
                return
            if self.pipeline:
                self._held += data[start:]
                self.flow.pause_reading()
                return
            piece = data[start : start + _PIECE]
            self._undigested += len(piece)
            super().data_received(piece)
            if self._undigested > _LARGEST_HEAD and not self.transport.is_closing():
                self.logger.warning(_INVALID)
                self.send_400_response(_INVALID)

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _limit_reading(self) -> None:
        """Limit the time for the head of a request, or for what follows an answer. A request's body has limits of its own."""
        busy = self._has_request()
        self._all.mark(self, busy=busy)
        if busy and self._reading is not None:
            self._reading.cancel()
            self._reading = None
        elif not busy and self._reading is None:
            self._reading = self.loop.call_later(self._all.head_timeout, self._all.time_out, self)

    def _stop_timers(self) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()


class LimitedLog:
    """Counts warnings about connections, and logs them in one line a minute."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._next = 0.0

    def warn(self, what: str, *values: object) -> None:
        """Count what happened to a connection."""
        self._counts[what % values] += 1
        now = time.monotonic()
        if now >= self._next:
            logger.warning("connections: %s", "; ".join(f"{count} {what}" for what, count in self._counts.items()))
            self._counts.clear()
            self._next = now + _MINUTE


class RateLimitFilter(logging.Filter):
    """Lets each message through once a minute, because callers without a key can cause as many as they like."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, object], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a message; it then says how many like it were left out before."""
        kind = str(record.msg).partition("\n")[0], record.exc_info[0] if record.exc_info else None
        now = time.monotonic()
        since, left_out = self._seen.get(kind, (-_MINUTE, 0))
        if now - since < _MINUTE:
            self._seen[kind] = since, left_out + 1
            return False
        self._seen[kind] = now, 0
        if left_out:
            record.msg = f"({left_out} more like this since the last) {record.msg}"
        return True


_rate_limit = RateLimitFilter()


def limit_logs() -> None:
    """Limit what the server logs about single connections."""
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(_rate_limit)
