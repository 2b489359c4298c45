"""Calls that an asyncio event loop drives: no thread waits for them. Tasks are the same as those of `aws.concurrent`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import pycurl

from mdstore.aws.concurrent import Call, ServiceCall, Task
from mdstore.aws.http import Body, Response, RunningCalls, SignedHttp
from mdstore.aws.retry import Retry
from mdstore.aws.transfers import Transfers
from mdstore.errors import MdstoreError, Unavailable

T = TypeVar("T")
_LARGE = 2**18  # bytes of a response: decoding more takes milliseconds, so a thread does it
_IDLE_CONNECTIONS = 32
_READS = (pycurl.POLL_IN, pycurl.POLL_INOUT)
_WRITES = (pycurl.POLL_OUT, pycurl.POLL_INOUT)


class EventLoopTransfers(Transfers):
    """Running transfers that an event loop drives. `on_progress` is called after each step, when some may have ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_progress: Callable[[], None]) -> None:
        # Weak, so that a closed event loop is not kept, and its connections are closed with it.
        self._weak_loop = weakref.ref(loop)
        self._on_progress = on_progress
        self._timer: asyncio.Handle | None = None
        super().__init__(watch=self._watch, set_timer=self._set_timer)
        # By default, libcurl keeps four for each running transfer, and so closes most of them when a burst ends.
        self._multi.setopt(pycurl.M_MAXCONNECTS, _IDLE_CONNECTIONS)

    def close(self) -> None:
        """Close all connections. No transfer may be running."""
        super().close()
        self._set_timer(-1)

    def _watch(self, event: int, descriptor: int, _multi: object, _data: object) -> None:
        loop = self._weak_loop()
        if loop is None:
            return
        if event in _READS:
            loop.add_reader(descriptor, self._act, descriptor, pycurl.CSELECT_IN)
        else:
            loop.remove_reader(descriptor)
        if event in _WRITES:
            loop.add_writer(descriptor, self._act, descriptor, pycurl.CSELECT_OUT)
        else:
            loop.remove_writer(descriptor)

    def _set_timer(self, milliseconds: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        loop = self._weak_loop()
        if loop is None or milliseconds < 0:
            return
        # libcurl forbids calling it from its callbacks, so even a timer that is due runs later.
        self._timer = loop.call_later(milliseconds / 1000, self._act, pycurl.SOCKET_TIMEOUT, 0)

    def _act(self, descriptor: int, events: int) -> None:
        self._multi.socket_action(descriptor, events)
        self._on_progress()


class EventLoopCalls:
    """Makes calls from coroutines of the running event loop, which it belongs to."""

    def __init__(self, http: SignedHttp) -> None:
        self._http = http
        self._running = RunningCalls(http, EventLoopTransfers(asyncio.get_running_loop(), self._on_progress))

    async def send(self, url: str, headers: Sequence[str], body: Body, *, http: SignedHttp | None = None) -> Response:
        """Make a call and return its response. Raises `Unavailable` if none arrives; the call may have taken effect."""
        signer = http or self._http
        if signer.must_renew_keys():
            await asyncio.to_thread(signer.renew_keys)
        future: asyncio.Future[Response | Unavailable] = asyncio.get_running_loop().create_future()
        self._running.start(future, url, headers, body, http=http)
        answer = await future  # if the caller is cancelled, the call goes on
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    def close(self) -> None:
        """Close all connections and abandon the calls that are running."""
        self._running.close()

    def _on_progress(self) -> None:
        for future, answer in self._running.ended():
            if not future.done():
                future.set_result(answer)


class EventLoopRunner:
    """Runs tasks on an event loop. `begin` and `read` are as in `concurrent.Run`."""

    def __init__(
        self,
        http: SignedHttp,
        *,
        begin: Callable[[str, bytes], tuple[str, Sequence[str], bytes]],
        read: Callable[[str, Response], Any],
        retry: Retry,
    ) -> None:
        self._calls = EventLoopCalls(http)
        self._begin = begin
        self._read = read
        self._retry = retry

    async def run(self, task: Task[T]) -> T:
        """Run a task and return its result. A task is sent each call's response, or is thrown its error.

        Raises `Unavailable` when the retries of a call are spent.
        """
        step: Callable[[], Call | ServiceCall] = partial(next, task)
        while True:
            try:
                call = step()
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                value = await self._answer(call)
            except MdstoreError as error:
                step = partial(task.throw, error)
            else:
                step = partial(task.send, value)

    def close(self) -> None:
        """Close all connections and abandon the calls that are running."""
        self._calls.close()

    async def _answer(self, call: Call | ServiceCall) -> Any:
        deadline = self._retry.deadline(None)
        attempt = 0
        while True:
            try:
                return await self._attempt(call)
            except Unavailable:
                delay = self._retry.delay(attempt, deadline)
                if delay is None:
                    raise
                attempt += 1
                await asyncio.sleep(delay)

    async def _attempt(self, call: Call | ServiceCall) -> Any:
        if isinstance(call, ServiceCall):
            response = await self._calls.send(call.url, call.headers, call.body, http=call.http)
            read = call.read
        else:
            response = await self._calls.send(*self._begin(*call))
            read = partial(self._read, call[0])
        if len(response.body) > _LARGE:
            return await asyncio.to_thread(read, response)
        return read(response)
