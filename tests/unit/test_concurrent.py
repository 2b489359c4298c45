"""Concurrent tasks: limits, order, retries and errors. A list stands in for the network, so every step is visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.aws.concurrent import Call, Run, Task
from mdstore.aws.http import Body, ConcurrentCalls, Response, SignedHttp
from mdstore.errors import ConditionFailed, MdstoreError, RequestRejected, Unavailable
from tests.unit.endpoint import FakeTime


class ScriptedCalls(ConcurrentCalls):
    """Completes calls in the order in which they started.

    `answer` decides by the call's body. `most` is the highest number of calls in flight.
    """

    def __init__(self, answer: Callable[[bytes], Response | Unavailable]) -> None:
        self._answer = answer
        self._in_flight: list[tuple[Any, bytes]] = []
        self.begun: list[bytes] = []
        self.most = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def start(
        self,
        tag: Any,
        url: str,  # noqa: ARG002
        headers: Any,  # noqa: ARG002
        body: Body,
        *,
        http: SignedHttp | None = None,  # noqa: ARG002
    ) -> None:
        assert isinstance(body, bytes)
        self._in_flight.append((tag, body))
        self.begun.append(body)
        self.most = max(self.most, len(self._in_flight))

    def completed(self, timeout: float) -> list[tuple[Any, Response | Unavailable]]:  # noqa: ARG002
        if not self._in_flight:
            return []
        tag, body = self._in_flight.pop(0)
        return [(tag, self._answer(body))]


def echo(body: bytes) -> Response:
    return Response(200, [], body)


def read(_: str, answer: Response) -> Any:
    if answer.status == 400:
        raise ConditionFailed("no")
    return answer.body


def new_run(
    concurrent_calls: ConcurrentCalls,
    time: FakeTime,
    *,
    in_flight: int = 4,
    deadline: float | None = None,
    base: float = 0.1,
) -> Run[Any]:
    return Run(
        concurrent_calls,
        begin=lambda _, body: ("url", (), body),
        read=read,
        retry=time.retry(base=base),
        in_flight=in_flight,
        deadline=deadline,
    )


def run(tasks: Any, concurrent_calls: ConcurrentCalls, time: FakeTime, **options: Any) -> list[Any]:
    return new_run(concurrent_calls, time, **options).results(tasks)


def calling(*bodies: bytes) -> Task[list[Any]]:
    answers: list[Any] = []
    for body in bodies:
        answer = yield "Op", body
        answers.append(answer)
    return answers


def idle() -> Task[str]:
    yield from ()
    return "nothing to do"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 6))
def test_each_task_gets_its_own_answers(sizes: list[int], in_flight: int) -> None:
    """Results are in the order of the tasks, however many calls each makes, and the limit of calls in flight is kept."""
    concurrent_calls = ScriptedCalls(echo)
    bodies = [[b"%d.%d" % (number, call) for call in range(size)] for number, size in enumerate(sizes)]
    assert run((calling(*one) for one in bodies), concurrent_calls, FakeTime(), in_flight=in_flight) == bodies
    assert concurrent_calls.most <= in_flight
    assert sorted(concurrent_calls.begun) == sorted(body for one in bodies for body in one)


def test_a_task_starts_when_there_is_room_for_its_call(time: FakeTime) -> None:
    """A task computes its first call when the call can be sent; the tasks do not all start at once."""
    concurrent_calls = ScriptedCalls(echo)
    begun: list[int] = []

    def task(number: int) -> Task[None]:
        assert len(concurrent_calls) < 2
        begun.append(number)
        yield "Op", b""

    run((task(number) for number in range(10)), concurrent_calls, time, in_flight=2)
    assert begun == list(range(10))


def test_a_task_without_calls_completes(time: FakeTime) -> None:
    """Nothing is sent for it."""
    concurrent_calls = ScriptedCalls(echo)
    assert run([idle(), calling(b"a"), idle()], concurrent_calls, time) == ["nothing to do", [b"a"], "nothing to do"]
    assert concurrent_calls.begun == [b"a"]


def test_a_retryable_call_is_retried_with_the_same_bytes(time: FakeTime) -> None:
    """A throttled call is sent again after a delay, without its task noticing, and other calls are made meanwhile."""
    failures = {b"busy": 3}

    def answer(body: bytes) -> Response | Unavailable:
        if failures.get(body, 0):
            failures[body] -= 1
            return Unavailable("not now", code="Throttling")
        return echo(body)

    concurrent_calls = ScriptedCalls(answer)
    assert run([calling(b"busy"), calling(b"a", b"b")], concurrent_calls, time, base=1.0) == [[b"busy"], [b"a", b"b"]]
    assert concurrent_calls.begun.count(b"busy") == 4
    assert time.slept == [1, 2, 4]


def test_each_call_has_a_backoff_of_its_own(time: FakeTime) -> None:
    """The second call of a task starts with the shortest delay again."""
    seen: set[tuple[bytes, int]] = set()
    tries: dict[bytes, int] = {}

    def answer(body: bytes) -> Response | Unavailable:
        tries[body] = tries.get(body, 0) + 1
        seen.add((body, tries[body]))
        return echo(body) if tries[body] == 3 else Unavailable("not now", code="x")

    run([calling(b"a", b"b")], ScriptedCalls(answer), time, base=1.0)
    assert time.slept == [1, 2, 1, 2]


def test_the_last_retryable_error_before_the_deadline_is_raised(time: FakeTime) -> None:
    """The run waits for the calls in flight, and begins nothing more."""

    def answer(body: bytes) -> Response | Unavailable:
        return Unavailable("not now", code="x") if body == b"busy" else echo(body)

    concurrent_calls = ScriptedCalls(answer)
    with pytest.raises(Unavailable, match="not now"):
        run(
            [calling(b"busy"), calling(b"a", b"b"), calling(b"never")],
            concurrent_calls,
            time,
            in_flight=2,
            deadline=time.now + 0.5,
            base=1.0,
        )
    assert concurrent_calls.begun == [b"busy", b"a"]
    assert len(concurrent_calls) == 0
    assert time.slept == []


def test_an_error_is_raised_in_its_task(time: FakeTime) -> None:
    """A task that expects an error catches it and continues."""

    def task() -> Task[str]:
        try:
            yield "Op", b"a"
        except ConditionFailed:
            yield "Op", b"b"
        return "handled"

    concurrent_calls = ScriptedCalls(lambda body: Response(400, [], b"") if body == b"a" else echo(body))
    assert run([task()], concurrent_calls, time) == ["handled"]


@pytest.mark.parametrize("where", ["answer", "task"])
def test_an_error_that_a_task_does_not_catch_ends_the_run(time: FakeTime, where: str) -> None:
    """The first such error is raised once all calls in flight are completed."""

    def task() -> Task[None]:
        if where == "task":
            raise RequestRejected("made here", code="x")
        yield "Op", b"bad"

    concurrent_calls = ScriptedCalls(lambda body: Response(400, [], b"") if body == b"bad" else echo(body))
    with pytest.raises(MdstoreError) as caught:
        run([calling(b"a", b"a2"), task(), calling(b"never")], concurrent_calls, time, in_flight=2)
    assert type(caught.value) is (RequestRejected if where == "task" else ConditionFailed)
    assert b"never" not in concurrent_calls.begun
    assert len(concurrent_calls) == 0


def test_a_run_at_its_limit_does_not_spin(time: FakeTime) -> None:
    """While the limit of calls in flight is reached, a call that is due for a retry does not cause polling."""
    polled: list[float] = []
    failures = [True]

    def answer(body: bytes) -> Response | Unavailable:
        return Unavailable("not now", code="x") if body == b"busy" and failures.pop() else echo(body)

    class WatchedCalls(ScriptedCalls):
        def completed(self, timeout: float) -> list[tuple[Any, Response | Unavailable]]:
            polled.append(timeout)
            return super().completed(timeout)

    failures = [False, False, True]
    run([calling(b"busy"), calling(*[b"x"] * 5)], WatchedCalls(answer), time, in_flight=1, base=0.0)
    assert all(timeout > 0 for timeout in polled)


def test_a_yielded_call_reaches_begin_and_read(time: FakeTime) -> None:
    """Both functions get the operation: the one that begins the call, and the one that reads the response."""
    calls: list[Call] = []

    def begin(operation: str, body: bytes) -> tuple[str, tuple[()], bytes]:
        calls.append((operation, body))
        return "url", (), body

    one: Run[Any] = Run(
        ScriptedCalls(echo),
        begin=begin,
        read=lambda operation, answer: (operation, msgspec.json.decode(answer.body)),
        retry=time.retry(),
        in_flight=1,
        deadline=None,
    )

    def task() -> Task[Any]:
        return (yield "GetItem", b"[1]")

    assert one.results([task()]) == [("GetItem", [1])]
    assert calls == [("GetItem", b"[1]")]


# -- tasks that end on their own


def busy_for(*bodies: bytes) -> Callable[[bytes], Response | Unavailable]:
    """Return a service that is never available for calls with one of `bodies`."""
    return lambda body: Unavailable("busy", code="x") if body in bodies else echo(body)


def failing(error: Exception, *bodies: bytes) -> Task[Any]:
    yield from calling(*bodies)
    raise error


def test_an_error_ends_only_its_own_task(time: FakeTime) -> None:
    """Each outcome is a task's result or its error, of whatever class; the other tasks make all their calls."""
    concurrent_calls = ScriptedCalls(busy_for(b"never"))
    own, other = RequestRejected("no", code="x"), ValueError("a bug")
    tasks = [calling(b"1", b"2"), failing(own, b"3"), calling(b"never"), failing(other), calling(b"4", b"5")]
    first, second, third, fourth, fifth = new_run(concurrent_calls, time, deadline=1_001.0).outcomes(tasks)
    assert (first, second, fourth, fifth) == ([b"1", b"2"], own, other, [b"4", b"5"])
    assert isinstance(third, Unavailable)
    assert time.now <= 1_001.0


def test_a_task_whose_time_is_over_is_closed(time: FakeTime) -> None:
    """What a task must do at its end, it does, though no call answers it."""
    ended = []

    def task() -> Task[None]:
        try:
            yield "Op", b"never"
        finally:
            ended.append(True)

    (outcome,) = new_run(ScriptedCalls(busy_for(b"never")), time, deadline=1_001.0).outcomes([task()])
    assert isinstance(outcome, Unavailable)
    assert ended == [True]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20), st.integers(1, 6))
def test_outcomes_are_in_the_order_of_the_tasks(shapes: list[tuple[int, bool]], in_flight: int) -> None:
    """Whichever tasks fail, and however many calls each makes first."""
    errors = [RequestRejected(str(number), code="x") if fails else None for number, (_, fails) in enumerate(shapes)]
    bodies = [[b"%d.%d" % (number, call) for call in range(size)] for number, (size, _) in enumerate(shapes)]
    tasks = [failing(error, *some) if error else calling(*some) for error, some in zip(errors, bodies, strict=True)]
    found = new_run(ScriptedCalls(echo), FakeTime(), in_flight=in_flight).outcomes(tasks)
    assert found == [error or some for error, some in zip(errors, bodies, strict=True)]
