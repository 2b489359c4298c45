"""HTTP transfers that run at the same time in one thread, through libcurl's socket-action interface and `poll`.

`CurlMulti.select` cannot wait for descriptors above 1,023: it returns at once, and a process that holds that many spins.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Iterator

import pycurl

_WATCHED = {
    pycurl.POLL_NONE: 0,
    pycurl.POLL_IN: select.POLLIN,
    pycurl.POLL_OUT: select.POLLOUT,
    pycurl.POLL_INOUT: select.POLLIN | select.POLLOUT,
}
_READABLE, _WRITABLE = select.POLLIN | select.POLLHUP, select.POLLOUT
_BROKEN = select.POLLERR | select.POLLNVAL


class Transfers:
    """Running transfers, and their connections. What makes them progress is the caller's choice.

    `watch` and `set_timer` are libcurl's callbacks: it tells them which sockets and which timer it waits for.
    """

    def __init__(self, *, watch: Callable[[int, int, object, object], None], set_timer: Callable[[int], None]) -> None:
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, set_timer)

    def start(self, curl: pycurl.Curl) -> None:
        """Start a transfer."""
        self._multi.add_handle(curl)

    def ended(self) -> Iterator[tuple[pycurl.Curl, tuple[int, str] | None]]:
        """Yield each ended transfer with its error, or with None. A transfer is yielded once."""
        more = 1
        while more:
            more, succeeded, failed = self._multi.info_read()
            for curl in succeeded:
                self._multi.remove_handle(curl)
                yield curl, None
            for curl, code, message in failed:
                self._multi.remove_handle(curl)
                yield curl, (code, message)

    def abandon(self, curl: pycurl.Curl) -> None:
        """Stop a running transfer."""
        self._multi.remove_handle(curl)

    def close(self) -> None:
        """Close all connections. No transfer may be running."""
        self._multi.close()


class ThreadTransfers(Transfers):
    """The running transfers of one thread, which waits for them."""

    def __init__(self) -> None:
        self._wanted = _Wanted()
        # `_Wanted` does not refer to the multi handle. Such a cycle would keep connections until a garbage collection.
        super().__init__(watch=self._wanted.watch, set_timer=self._wanted.set_timer)

    def start(self, curl: pycurl.Curl) -> None:
        """Start a transfer, and send what can be sent without waiting."""
        super().start(curl)
        self._run_timer()

    def wait(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until some transfer can make progress, and let it."""
        for descriptor, events in self._wanted.poll(timeout):
            self._multi.socket_action(descriptor, _curl_events(events))
        if self._wanted.due <= time.monotonic():
            self._run_timer()

    def _run_timer(self) -> None:
        self._wanted.due = math.inf  # libcurl sets the timer again if it needs it
        self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)


class _Wanted:
    """What libcurl waits for: its sockets, and its timer, `due` at a monotonic time."""

    def __init__(self) -> None:
        # Not epoll: its set lives in the kernel, so a forked child that closes a connection would change its parent's set.
        self._sockets = select.poll()
        self.due = math.inf

    def watch(self, event: int, descriptor: int, _multi: object, _data: object) -> None:
        """Record which events of a socket libcurl waits for."""
        if event == pycurl.POLL_REMOVE:
            self._sockets.unregister(descriptor)
        else:
            self._sockets.register(descriptor, _WATCHED[event])

    def set_timer(self, milliseconds: int) -> None:
        """Record when libcurl wants to run next. -1 removes the timer."""
        self.due = math.inf if milliseconds < 0 else time.monotonic() + milliseconds / 1000

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Return the sockets that are ready within `timeout` seconds, or none once the timer is due."""
        pause = min(timeout, max(0.0, self.due - time.monotonic()))
        return self._sockets.poll(math.ceil(pause * 1000))  # rounding down would make the last millisecond a busy loop


def _curl_events(events: int) -> int:
    found = 0
    if events & _READABLE:
        found |= pycurl.CSELECT_IN
    if events & _WRITABLE:
        found |= pycurl.CSELECT_OUT
    if events & _BROKEN:
        found |= pycurl.CSELECT_ERR
    return found
