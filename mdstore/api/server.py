"""Serves the HTTP API with uvicorn, with limits on connections."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys
from contextlib import suppress
from functools import partial

import uvicorn

from mdstore.api.app import create_api
from mdstore.api.connections import BACKLOG, LimitedConnection, allowed_connections
from mdstore.api.workers import Parent, Workers
from mdstore.settings import Settings

_FAILED = 1  # exit code
_M_MMAP_THRESHOLD = -3  # in malloc.h
_LARGE_BLOCK = 2**18  # bytes
_WAITING = 2_048  # connections that may wait in the kernel while the event loop is busy


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, parent: Parent | None) -> None:
        super().__init__(config)
        self._parent = parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio accepts as many connections in one go as its backlog has, so that one is short. The kernel's may be longer.
        for listening in sockets or ():
            listening.listen(_WAITING)
        if self._parent is not None and self.started:
            asyncio.get_running_loop().add_reader(self._parent.pipe, self._stop, self._parent)
            self._parent.report_start()

    def _stop(self, parent: Parent) -> None:
        """Stop, because the parent has ended without stopping this process."""
        asyncio.get_running_loop().remove_reader(parent.pipe)
        self.should_exit = True


def serve(settings: Settings, *, host: str, port: int, workers: int = 1) -> None:
    """Serve with `workers` processes until a signal stops them.

    Raises `ConfigurationError` if the process may open too few files.
    """
    allowed_connections(settings)  # the lifespan checks again, but an error there would print a traceback
    listening = uvicorn.Config("", host=host, port=port, log_level="warning").bind_socket()
    if workers == 1:
        _serve(settings, listening)
        return
    # This socket only finds out whether the port is free: a port that several may share is never taken.
    address = listening.getsockname()
    listening.close()
    try:
        if not Workers(workers, partial(_serve_shared, settings, address)).run():
            sys.exit(_FAILED)
    except KeyboardInterrupt:
        return


def _serve_shared(settings: Settings, address: tuple[str, int], parent: Parent) -> None:
    _serve(settings, _shared(address), parent)


def _shared(address: tuple[str, int]) -> socket.socket:
    """Return a socket that is bound to an address, which others that this function returns may share."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    bound = socket.socket(family)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
    bound.bind(address)
    return bound


def _return_large_blocks() -> None:
    """Make glibc give large blocks of memory back when they are freed, so that one large body leaves nothing behind.

    By default it soon keeps blocks of up to 32 MB, for each thread. Other C libraries have no `mallopt`.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def _serve(settings: Settings, listening: socket.socket, parent: Parent | None = None) -> None:
    config = uvicorn.Config(
        create_api(settings),
        log_level="warning",
        access_log=False,
        http=LimitedConnection,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=75,  # seconds; a load balancer keeps connections for 60 s, and must not reuse one closed here
    )
    server = _Server(config, parent)
    _return_large_blocks()
    try:
        server.run([listening])
    except KeyboardInterrupt:
        return
    if not server.started:
        sys.exit(_FAILED)
