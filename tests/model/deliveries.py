"""Deliveries: work on its own thread that blocks at each call until it is given the call's result.

Only one thread runs at any time, so the order of the calls' results alone decides what happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

from mdstore.aws.http import Body, ConcurrentCalls, Response, SignedHttp
from mdstore.errors import Unavailable

_PATIENCE = 60.0  # seconds; a thread that computes for longer hangs
CallResult = Response | Unavailable


class Killed(BaseException):
    """The worker's process was killed."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call under way: the operation, its body in DynamoDB JSON, and the `tag` that its sender gave it."""

    operation: str
    body: bytes
    tag: Any = None


class Clock:
    """A clock, in seconds, that the schedule sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Delivery:
    """One run of `work`. `calls` are its calls under way; once it is `over`, `result` or `error` is set."""

    def __init__(self, clock: Clock, work: Callable[[SignedHttp, Clock], object]) -> None:
        self.clock = clock
        self.calls: Sequence[Call] = ()
        self.result: object = None
        self.error: BaseException | None = None
        self.over = False
        self._completed: SimpleQueue[tuple[Call, CallResult] | None] = SimpleQueue()
        self._blocked: SimpleQueue[Sequence[Call] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._wait()

    def finish_call(self, call: Call, result: CallResult) -> None:
        """Give a call its result, and wait until the work blocks again or ends."""
        self._completed.put((call, result))
        self._wait()

    def kill(self) -> None:
        """End the work at the calls where it blocks."""
        while not self.over:
            self._completed.put(None)
            self._wait()

    def first_finished(self, calls: Sequence[Call]) -> tuple[Call, CallResult]:
        """Block until one of `calls` has a result. The work's thread calls this."""
        self._blocked.put(calls)
        completed = self._completed.get()
        if completed is None:
            raise Killed
        return completed

    def _wait(self) -> None:
        calls = self._blocked.get(timeout=_PATIENCE)
        self.calls = calls or ()
        if calls is None:
            self.over = True
            self._thread.join()

    def _run(self, work: Callable[[SignedHttp, Clock], object]) -> None:
        try:
            self.result = work(GatedHttp(self), self.clock)
        except BaseException as error:  # the world decides which errors a run may end with
            self.error = error
        self._blocked.put(None)


class GatedHttp(SignedHttp):
    """A client whose calls block until the delivery is given their results."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    def send(self, url: str, headers: Sequence[str] = (), body: Body = None) -> Response:  # noqa: ARG002
        _, result = self._delivery.first_finished([_call(headers, body)])
        if isinstance(result, Unavailable):
            raise result
        return result

    @contextmanager
    def concurrent_calls(self) -> Iterator[ConcurrentCalls]:
        yield GatedConcurrentCalls(self._delivery)

    def close(self) -> None:
        """Do nothing: no connection is open."""


class GatedConcurrentCalls(ConcurrentCalls):
    """Concurrent calls that block until the delivery is given a result for one of them.

    Calls to S3, which bring their own client, are made at once.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._calls: list[Call] = []
        self._made: list[tuple[Any, CallResult]] = []

    def __len__(self) -> int:
        return len(self._calls) + len(self._made)

    def start(
        self,
        tag: Any,
        url: str,
        headers: Sequence[str],
        body: Body,
        *,
        http: SignedHttp | None = None,
    ) -> None:
        if http is not None:
            self._made.append((tag, http.send(url, headers, body)))
        else:
            self._calls.append(_call(headers, body, tag))

    def completed(self, timeout: float) -> list[tuple[Any, CallResult]]:  # noqa: ARG002
        made, self._made = self._made, []
        if made or not self._calls:
            return made
        call, result = self._delivery.first_finished(tuple(self._calls))
        self._calls.remove(call)
        return [(call.tag, result)]


def _call(headers: Sequence[str], body: Body, tag: Any = None) -> Call:
    assert isinstance(body, bytes)
    operation = next(line for line in headers if line.startswith("X-Amz-Target")).rpartition(".")[2]
    return Call(operation, body, tag)
