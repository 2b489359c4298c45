"""Many calls at the same time, driven by one thread: a task is a generator that yields its calls and gets their answers.

Threads would do the same with twice the CPU: most of the time they wait for Python's lock (`docs/adr/0011-one-thread.md`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from mdstore.aws.http import Answer, ConcurrentCalls
from mdstore.aws.retry import Retry
from mdstore.errors import MdstoreError, Unavailable

T = TypeVar("T")
Call = tuple[str, bytes]  # operation, body in JSON
Task = Generator[Call, Any, T]

_NEVER = 3_600.0


@dataclass(slots=True, order=True)
class _TaskState(Generic[T]):
    """A task on its way: `call` is what it waits for, tried `attempt` times in vain, and due again at `due`."""

    due: float
    number: int
    task: Task[T]
    call: Call = ("", b"")
    attempt: int = 0


class Run(Generic[T]):
    """One run over some tasks. `begin` makes a request of a call, `read` its answer's meaning, or raises it."""

    def __init__(
        self,
        concurrent_calls: ConcurrentCalls,
        *,
        begin: Callable[[str, bytes], tuple[str, Sequence[str], bytes]],
        read: Callable[[str, Answer], Any],
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
        self._later: list[_TaskState[T]] = []
        self._results: dict[int, T] = {}
        self._error: MdstoreError | None = None

    def results(self, tasks: Iterable[Task[T]]) -> list[T]:
        """What the tasks return, in their order; a task is begun when there is room for its first call."""
        fresh = (_TaskState(0.0, number, task) for number, task in enumerate(tasks))
        while self._fill(fresh):
            self._wait()
        if self._error is not None:
            raise self._error
        return [self._results[number] for number in sorted(self._results)]

    def _fill(self, fresh: Iterator[_TaskState[T]]) -> bool:
        """Begin calls while there is room; returns whether there is anything to wait for."""
        while self._has_room() and self._error is None:
            if self._later and self._later[0].due <= self._retry.clock():
                self._start_call(heapq.heappop(self._later))
            elif (state := next(fresh, None)) is not None:
                self._step(state, partial(next, state.task))
            else:
                break
        if self._error is not None:
            self._later.clear()
        return bool(self._calls or self._later)

    def _has_room(self) -> bool:
        return len(self._calls) < self._in_flight

    def _wait(self) -> None:
        pause = _NEVER
        if self._later and self._has_room():
            pause = max(0.0, self._later[0].due - self._retry.clock())
        if not self._calls:
            self._retry.sleep(pause)
        for state, answer in self._calls.completed(pause):
            self._answered(state, answer)

    def _answered(self, state: _TaskState[T], answer: Answer | Unavailable) -> None:
        try:
            if isinstance(answer, Unavailable):
                raise answer
            value = self._read(state.call[0], answer)
        except Unavailable as error:
            self._postpone(state, error)
        except MdstoreError as error:
            self._step(state, partial(state.task.throw, error))
        else:
            self._step(state, partial(state.task.send, value))

    def _postpone(self, state: _TaskState[T], error: Unavailable) -> None:
        delay = self._retry.delay(state.attempt, self._deadline)
        if delay is None:
            self._error = self._error or error
            return
        state.attempt += 1
        state.due = self._retry.clock() + delay
        heapq.heappush(self._later, state)

    def _step(self, state: _TaskState[T], step: Callable[[], Call]) -> None:
        """Take a task to its next call, or to its end."""
        try:
            state.call, state.attempt = step(), 0
        except StopIteration as end:
            self._results[state.number] = end.value
        except MdstoreError as error:
            self._error = self._error or error
        else:
            if self._error is None:
                self._start_call(state)

    def _start_call(self, state: _TaskState[T]) -> None:
        self._calls.start(state, *self._begin(*state.call))
