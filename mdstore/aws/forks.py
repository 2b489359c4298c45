"""Connections across a fork: the child detaches from those that it inherited, so that the parent's keep working.

When a child drops its parent's clients, libcurl closes their connections. Over TLS, that sends `close_notify` on the socket
that both share, and the peer ends the parent's connection. So a child replaces each inherited descriptor by one of `/dev/null`:
whatever libcurl still sends there, at a garbage collection or at exit, reaches no peer.
"""

from __future__ import annotations

import os
from contextlib import suppress

import pycurl

#: The inode of each socket that libcurl opened, by descriptor. The inode tells whether the descriptor is still that socket.
_opened: dict[int, int] = {}


def note_socket(descriptor: int, _purpose: int) -> int:
    """Remember a socket that libcurl opens. This is a `SOCKOPTFUNCTION` callback of libcurl."""
    _opened[descriptor] = os.fstat(descriptor).st_ino
    return pycurl.SOCKOPT_OK


def detach() -> None:
    """Detach this process from the connections of the process that it was forked from."""
    inherited = [descriptor for descriptor, inode in _opened.items() if _inode(descriptor) == inode]
    _opened.clear()
    if inherited:
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in inherited:
            os.dup2(nowhere, descriptor, inheritable=False)
        os.close(nowhere)


def _inode(descriptor: int) -> int | None:
    with suppress(OSError):  # it was closed since
        return os.fstat(descriptor).st_ino
    return None


os.register_at_fork(after_in_child=detach)
