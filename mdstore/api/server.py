"""Serves the HTTP API with uvicorn, with limits on connections."""

from __future__ import annotations

import socket
import sys

import uvicorn

from mdstore.api.app import create_api
from mdstore.api.connections import BACKLOG, LimitedConnection, allowed_connections
from mdstore.settings import Settings

_FAILED = 1  # exit code
_WAITING = 2_048  # connections that may wait in the kernel while the event loop is busy


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio accepts as many connections in one go as its backlog has, so that one is short. The kernel's may be longer.
        for listening in sockets or ():
            listening.listen(_WAITING)


def serve(settings: Settings, *, host: str, port: int) -> None:
    """Serve until a signal stops it. Raises `ConfigurationError` if the process may open too few files."""
    allowed_connections(settings)  # the lifespan checks again, but an error there would print a traceback
    config = uvicorn.Config(
        create_api(settings),
        host=host,
        port=port,
        log_level="warning",
        http=LimitedConnection,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=75,  # seconds; a load balancer keeps connections for 60 s, and must not reuse one closed here
    )
    server = _Server(config)
    try:
        server.run([config.bind_socket()])
    except KeyboardInterrupt:
        return
    if not server.started:
        sys.exit(_FAILED)
