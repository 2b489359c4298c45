"""Concurrent calls driven by one thread. A task is a generator that yields calls and is sent their responses.

Threads would take twice the CPU, because they mostly wait for Python's lock (`docs/adr/0011-one-thread.md`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from mdstore.aws.http import Body, ConcurrentCalls, Response, SignedHttp
from mdstore.aws.retry import Retry
from mdstore.errors import MdstoreError, Unavailable

T = TypeVar("T")


class ServiceCall(NamedTuple):
    """A call to another service than the run's. `http` signs it; `read` reads its response, or raises the error in it."""

    http: SignedHttp
    url: str
    headers: Sequence[str]
    body: Body
    read: Callable[[Response], Any]

    def send(self) -> Any:
        """Make the call on its own, once."""
        return self.read(self.http.send(self.url, self.headers, self.body))


Call = tuple[str, bytes]  # to the run's own service: operation, body in JSON
Task = Generator[Call | ServiceCall, Any, T]

_NEVER = 3_600.0


@dataclass(slots=True, order=True)
class _TaskState(Generic[T]):
    """The state of a running task: it waits for `call`, which failed `attempt` times and is retried at `retry_at`."""

    retry_at: float
    number: int
    task: Task[T]
    call: Call | ServiceCall = ("", b"")
    attempt: int = 0


class Run(Generic[T]):
    """Runs tasks once. `begin` turns a call into an HTTP request; `read` decodes its response, or raises the error in it.

    Both serve the calls to one service. A `ServiceCall` to another service brings its own.
    """

    def __init__(
        self,
        concurrent_calls: ConcurrentCalls,
        *,
        begin: Callable[[str, bytes], tuple[str, Sequence[str], bytes]],
        read: Callable[[str, Response], Any],
        retry: Retry,
        in_flight: int,
        deadline: float | None,
    ) -> None:
        self._calls = concurrent_calls
        self._begin = begin
        self._read = read
        self._retry = retry
        self._in_flight = in_flight
        self._deadline = retry.deadline(deadline)
        self._waiting: list[_TaskState[T]] = []
        self._results: dict[int, T] = {}
        self._error: MdstoreError | None = None
        self._errors: dict[int, Exception] | None = None  # by task, if each task ends on its own

    def results(self, tasks: Iterable[Task[T]]) -> list[T]:
        """Run the tasks and return their results in order. A task starts when there is room for its first call."""
        self._run(tasks)
        if self._error is not None:
            raise self._error
        return [self._results[number] for number in sorted(self._results)]

    def outcomes(self, tasks: Iterable[Task[T]]) -> list[T | Exception]:
        """Run the tasks and return, in order, each one's result or the error that ended it. The others go on."""
        self._errors = {}
        self._run(tasks)
        found: dict[int, T | Exception] = {**self._results, **self._errors}
        return [found[number] for number in sorted(found)]

    def _run(self, tasks: Iterable[Task[T]]) -> None:
        new_tasks = (_TaskState(0.0, number, task) for number, task in enumerate(tasks))
        while self._fill(new_tasks):
            self._wait()

    def _fill(self, new_tasks: Iterator[_TaskState[T]]) -> bool:
        """Start calls while there is room; return whether there is anything left to wait for."""
        while self._has_room() and self._error is None:
            if self._waiting and self._waiting[0].retry_at <= self._retry.clock():
                self._start_call(heapq.heappop(self._waiting))
            elif (state := next(new_tasks, None)) is not None:
                self._step(state, partial(next, state.task))
            else:
                break
        if self._error is not None:
            self._waiting.clear()
        return bool(self._calls or self._waiting)

    def _has_room(self) -> bool:
        return len(self._calls) < self._in_flight

    def _wait(self) -> None:
        pause = _NEVER
        if self._waiting and self._has_room():
            pause = max(0.0, self._waiting[0].retry_at - self._retry.clock())
        if not self._calls:
            self._retry.sleep(pause)
        for state, answer in self._calls.completed(pause):
            self._answered(state, answer)

    def _answered(self, state: _TaskState[T], answer: Response | Unavailable) -> None:
        try:
            if isinstance(answer, Unavailable):
                raise answer
            call = state.call
            value = call.read(answer) if isinstance(call, ServiceCall) else self._read(call[0], answer)
        except Unavailable as error:
            self._postpone(state, error)
        except MdstoreError as error:
            self._step(state, partial(state.task.throw, error))
        else:
            self._step(state, partial(state.task.send, value))

    def _postpone(self, state: _TaskState[T], error: Unavailable) -> None:
        delay = self._retry.delay(state.attempt, self._deadline)
        if delay is None:
            state.task.close()
            self._fail(state, error)
            return
        state.attempt += 1
        state.retry_at = self._retry.clock() + delay
        heapq.heappush(self._waiting, state)

    def _step(self, state: _TaskState[T], step: Callable[[], Call | ServiceCall]) -> None:
        """Resume a task until it yields its next call or ends."""
        try:
            state.call, state.attempt = step(), 0
        except StopIteration as end:
            self._results[state.number] = end.value
        except MdstoreError as error:
            self._fail(state, error)
        except Exception as error:
            if self._errors is None:
                raise
            self._errors[state.number] = error
        else:
            if self._error is None:
                self._start_call(state)

    def _fail(self, state: _TaskState[T], error: MdstoreError) -> None:
        if self._errors is None:
            self._error = self._error or error
        else:
            self._errors[state.number] = error

    def _start_call(self, state: _TaskState[T]) -> None:
        call = state.call
        if isinstance(call, ServiceCall):
            self._calls.start(state, call.url, call.headers, call.body, http=call.http)
        else:
            self._calls.start(state, *self._begin(*call))
