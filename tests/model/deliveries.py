"""Deliveries: work on a thread of its own that stands still at each call until it is told what came of it.

Only one thread runs at any time, so what happens follows from the order of the calls alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

from mdstore.aws.http import Answer, Body, ConcurrentCalls, SignedHttp
from mdstore.errors import Unavailable

_PATIENCE = 60.0  # seconds that a thread may compute; longer, and it hangs
Landing = Answer | Unavailable


class Killed(BaseException):
    """The worker's process is no more."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call under way: the operation and its body in DynamoDB JSON; `tag` is its sender's."""

    operation: str
    body: bytes
    tag: Any = None


class Clock:
    """Seconds; what they are is up to the schedule."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Delivery:
    """One run of `work`. `calls` are those under way; when `over`, `result` or `error` says how it ended."""

    def __init__(self, clock: Clock, work: Callable[[SignedHttp, Clock], object]) -> None:
        self.clock = clock
        self.calls: Sequence[Call] = ()
        self.result: object = None
        self.error: BaseException | None = None
        self.over = False
        self._completed: SimpleQueue[tuple[Call, Landing] | None] = SimpleQueue()
        self._standing: SimpleQueue[Sequence[Call] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self._wait()

    def land(self, call: Call, landing: Landing) -> None:
        """Tell what came of a call, and wait until the work stands still again."""
        self._completed.put((call, landing))
        self._wait()

    def kill(self) -> None:
        """End it where it stands."""
        while not self.over:
            self._completed.put(None)
            self._wait()

    def flown(self, calls: Sequence[Call]) -> tuple[Call, Landing]:
        """On the work's thread: stand still until one of `calls` has landed."""
        self._standing.put(calls)
        completed = self._completed.get()
        if completed is None:
            raise Killed
        return completed

    def _wait(self) -> None:
        calls = self._standing.get(timeout=_PATIENCE)
        self.calls = calls or ()
        if calls is None:
            self.over = True
            self._thread.join()

    def _run(self, work: Callable[[SignedHttp, Clock], object]) -> None:
        try:
            self.result = work(GatedHttp(self), self.clock)
        except BaseException as error:  # it is the schedule's to judge
            self.error = error
        self._standing.put(None)


class GatedHttp(SignedHttp):
    """Calls that go through a delivery's gate."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    def send(self, url: str, headers: Sequence[str] = (), body: Body = None) -> Answer:  # noqa: ARG002
        _, landing = self._delivery.flown([_call(headers, body)])
        if isinstance(landing, Unavailable):
            raise landing
        return landing

    @contextmanager
    def concurrent_calls(self) -> Iterator[ConcurrentCalls]:
        yield GatedFlights(self._delivery)

    def close(self) -> None:
        """Nothing is open."""


class GatedFlights(ConcurrentCalls):
    """Calls under way at the same time, through the gate. Those to S3, which bring their client, are made at once."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._calls: list[Call] = []
        self._made: list[tuple[Any, Landing]] = []

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

    def completed(self, timeout: float) -> list[tuple[Any, Landing]]:  # noqa: ARG002
        made, self._made = self._made, []
        if made or not self._calls:
            return made
        call, landing = self._delivery.flown(tuple(self._calls))
        self._calls.remove(call)
        return [(call.tag, landing)]


def _call(headers: Sequence[str], body: Body, tag: Any = None) -> Call:
    assert isinstance(body, bytes)
    operation = next(line for line in headers if line.startswith("X-Amz-Target")).rpartition(".")[2]
    return Call(operation, body, tag)
