"""Tasks at the same time: room, order, retries, errors. Flights are played by a list, so each step is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.aws.concurrent import Call, Run, Task
from mdstore.aws.http import Answer, Body, ConcurrentCalls, SignedHttp
from mdstore.errors import ConditionFailed, MdstoreError, RequestRejected, Unavailable
from tests.unit.endpoint import FakeTime


class PlayedFlights(ConcurrentCalls):
    """Lands what was started first. `answer` decides by the call's body; `most` is how many were in the air at once."""

    def __init__(self, answer: Callable[[bytes], Answer | Unavailable]) -> None:
        self._answer = answer
        self._air: list[tuple[Any, bytes]] = []
        self.begun: list[bytes] = []
        self.most = 0

    def __len__(self) -> int:
        return len(self._air)

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
        self._air.append((tag, body))
        self.begun.append(body)
        self.most = max(self.most, len(self._air))

    def completed(self, timeout: float) -> list[tuple[Any, Answer | Unavailable]]:  # noqa: ARG002
        if not self._air:
            return []
        tag, body = self._air.pop(0)
        return [(tag, self._answer(body))]


def said(body: bytes) -> Answer:
    return Answer(200, [], body)


def read(_: str, answer: Answer) -> Any:
    if answer.status == 400:
        raise ConditionFailed("no")
    return answer.body


def run(
    tasks: Any,
    concurrent_calls: ConcurrentCalls,
    time: FakeTime,
    *,
    in_flight: int = 4,
    deadline: float | None = None,
    base: float = 0.1,
) -> list[Any]:
    one: Run[Any] = Run(
        concurrent_calls,
        begin=lambda _, body: ("url", (), body),
        read=read,
        retry=time.retry(base=base),
        in_flight=in_flight,
        deadline=deadline,
    )
    return one.results(tasks)


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
    """Results are in the order of the tasks, whatever number of calls each makes, and the room is never exceeded."""
    concurrent_calls = PlayedFlights(said)
    bodies = [[b"%d.%d" % (number, call) for call in range(size)] for number, size in enumerate(sizes)]
    assert run((calling(*one) for one in bodies), concurrent_calls, FakeTime(), in_flight=in_flight) == bodies
    assert concurrent_calls.most <= in_flight
    assert sorted(concurrent_calls.begun) == sorted(body for one in bodies for body in one)


def test_tasks_are_begun_when_there_is_room(time: FakeTime) -> None:
    """What a task would send is computed when it can be sent, and not all at once."""
    concurrent_calls = PlayedFlights(said)
    begun: list[int] = []

    def task(number: int) -> Task[None]:
        assert len(concurrent_calls) < 2
        begun.append(number)
        yield "Op", b""

    run((task(number) for number in range(10)), concurrent_calls, time, in_flight=2)
    assert begun == list(range(10))


def test_a_task_without_calls_is_done(time: FakeTime) -> None:
    """Nothing is sent for it."""
    concurrent_calls = PlayedFlights(said)
    assert run([idle(), calling(b"a"), idle()], concurrent_calls, time) == ["nothing to do", [b"a"], "nothing to do"]
    assert concurrent_calls.begun == [b"a"]


def test_not_now_is_tried_again_with_the_same_bytes(time: FakeTime) -> None:
    """A throttled call waits and is sent again, its task does not hear of it, and others go on meanwhile."""
    left = {b"busy": 3}

    def answer(body: bytes) -> Answer | Unavailable:
        if left.get(body, 0):
            left[body] -= 1
            return Unavailable("not now", code="Throttling")
        return said(body)

    concurrent_calls = PlayedFlights(answer)
    assert run([calling(b"busy"), calling(b"a", b"b")], concurrent_calls, time, base=1.0) == [[b"busy"], [b"a", b"b"]]
    assert concurrent_calls.begun.count(b"busy") == 4
    assert time.slept == [1, 2, 4]


def test_the_count_of_tries_begins_anew_with_each_call(time: FakeTime) -> None:
    """A task's second call has its own back-off."""
    seen: set[tuple[bytes, int]] = set()
    tries: dict[bytes, int] = {}

    def answer(body: bytes) -> Answer | Unavailable:
        tries[body] = tries.get(body, 0) + 1
        seen.add((body, tries[body]))
        return said(body) if tries[body] == 3 else Unavailable("not now", code="x")

    run([calling(b"a", b"b")], PlayedFlights(answer), time, base=1.0)
    assert time.slept == [1, 2, 1, 2]


def test_the_last_not_now_before_the_deadline_is_raised(time: FakeTime) -> None:
    """What is in the air is waited for, and nothing more is begun."""

    def answer(body: bytes) -> Answer | Unavailable:
        return Unavailable("not now", code="x") if body == b"busy" else said(body)

    concurrent_calls = PlayedFlights(answer)
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


def test_an_error_is_the_tasks_own(time: FakeTime) -> None:
    """A task that expects an error takes it and goes on."""

    def task() -> Task[str]:
        try:
            yield "Op", b"a"
        except ConditionFailed:
            yield "Op", b"b"
        return "handled"

    concurrent_calls = PlayedFlights(lambda body: Answer(400, [], b"") if body == b"a" else said(body))
    assert run([task()], concurrent_calls, time) == ["handled"]


@pytest.mark.parametrize("where", ["answer", "task"])
def test_an_error_that_a_task_does_not_take_ends_the_run(time: FakeTime, where: str) -> None:
    """The first one is raised, once all that was begun has landed."""

    def task() -> Task[None]:
        if where == "task":
            raise RequestRejected("made here", code="x")
        yield "Op", b"bad"

    concurrent_calls = PlayedFlights(lambda body: Answer(400, [], b"") if body == b"bad" else said(body))
    with pytest.raises(MdstoreError) as caught:
        run([calling(b"a", b"a2"), task(), calling(b"never")], concurrent_calls, time, in_flight=2)
    assert type(caught.value) is (RequestRejected if where == "task" else ConditionFailed)
    assert b"never" not in concurrent_calls.begun
    assert len(concurrent_calls) == 0


def test_a_full_air_does_not_spin(time: FakeTime) -> None:
    """While there is no room, a call that is due again is not polled for."""
    polled: list[float] = []
    left = [True]

    def answer(body: bytes) -> Answer | Unavailable:
        return Unavailable("not now", code="x") if body == b"busy" and left.pop() else said(body)

    class Watched(PlayedFlights):
        def completed(self, timeout: float) -> list[tuple[Any, Answer | Unavailable]]:
            polled.append(timeout)
            return super().completed(timeout)

    left = [False, False, True]
    run([calling(b"busy"), calling(*[b"x"] * 5)], Watched(answer), time, in_flight=1, base=0.0)
    assert all(timeout > 0 for timeout in polled)


def test_calls_are_made_of_what_is_yielded(time: FakeTime) -> None:
    """The operation reaches both ends: what begins the call, and what reads the answer."""
    calls: list[Call] = []

    def begin(operation: str, body: bytes) -> tuple[str, tuple[()], bytes]:
        calls.append((operation, body))
        return "url", (), body

    one: Run[Any] = Run(
        PlayedFlights(said),
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
