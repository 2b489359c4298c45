"""Several queues share a worker's room: every one is polled, a backlog gets all the room, and shares follow the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from mdstore.aws.sqs import Message
from mdstore.queue.broker.poller import Held, Poller
from mdstore.queue.broker.schedule import Poll, Schedule
from tests.unit.fake_sqs import FakeSqs
from tests.waiting import until

WAIT = 10


class World:
    """A schedule with backlogs of its own, in simulated time: a drain answers at once, and a listening poll when it must."""

    def __init__(
        self, queues: int, *, room: int, ahead: int = 10, rate: float = 0.0, weights: Mapping[str, int] | None = None
    ) -> None:
        self.now = 1.0
        self.rate = rate
        self.held: list[str] = []
        self.most_held = 0
        self.done: Counter[str] = Counter()
        self.backlog = {f"q{number}": 0 for number in range(queues)}
        self.polls: list[Poll] = []
        self.under_way: list[tuple[float, Poll]] = []
        self.schedule = Schedule(
            wait_time=WAIT,
            ahead=ahead,
            room=lambda: room,
            rate=lambda: self.rate,
            clock=lambda: self.now,
            weights=weights,
        )
        for name in self.backlog:
            self.schedule.add(name, name, needs_room=True)

    def run(self, seconds: float, *, step: float = 0.1, done_per_step: int = 0) -> None:
        """Let time pass; a call takes one step."""
        for _ in range(round(seconds / step)):
            self.now += step
            for _ in range(min(done_per_step, len(self.held))):
                self.done[self.held.pop(0)] += 1
            self._end_polls()
            while poll := self.schedule.next(len(self.held), takes_urgent=True):
                self.schedule.begin(poll)
                self.polls.append(poll)
                self.under_way.append((self.now + poll.wait, poll))

    def _end_polls(self) -> None:
        for ends_at, poll in list(self.under_way):
            name = poll.queue.name
            count = min(poll.count, self.backlog[name])
            if not count and self.now < ends_at:
                continue
            self.under_way.remove((ends_at, poll))
            self.backlog[name] -= count
            self.held += [name] * count
            self.most_held = max(self.most_held, len(self.held))
            self.schedule.received(poll, count)
            poll.queue.polls -= 1

    def times(self) -> Counter[str]:
        return Counter(poll.queue.name for poll in self.polls)


@pytest.mark.parametrize("room", [1, 2, 16])
@pytest.mark.parametrize("ahead", [1, 10])
@pytest.mark.parametrize("queues", [2, 3, 20])
def test_idle_queues_are_all_polled_and_cost_little(queues: int, room: int, ahead: int) -> None:
    world = World(queues, room=room, ahead=ahead)
    world.run(200)
    times = world.times()
    assert len(times) == queues
    assert max(times.values()) <= min(times.values()) + 3
    if room * (ahead - 1) >= queues:
        assert max(times.values()) <= 200 / WAIT + 2  # one long poll after another
        assert world.polls[-1].wait == WAIT
    assert (
        len(world.polls) <= max(queues, WAIT) * 200 / WAIT + 2 * queues
    )  # at most one call a second where room is tight


@pytest.mark.parametrize("room", [1, 2, 16])
@pytest.mark.parametrize("ahead", [1, 10])
@pytest.mark.parametrize("queues", [2, 3, 20])
def test_a_message_of_any_idle_queue_is_received_within_a_wait_time(queues: int, room: int, ahead: int) -> None:
    for name in ("q0", f"q{queues - 1}"):
        world = World(queues, room=room, ahead=ahead)
        world.run(30)
        world.backlog[name] = 1
        world.run(max(WAIT, queues if room == 1 == ahead else 0) + 2)
        assert world.held == [name]


@pytest.mark.parametrize("queues", [2, 3, 20])
@pytest.mark.parametrize(("room", "ahead"), [(1, 1), (1, 10), (2, 10), (16, 1)])
def test_loaded_queues_get_equal_shares_and_the_bound_holds(queues: int, room: int, ahead: int) -> None:
    world = World(queues, room=room, ahead=ahead, rate=1_000.0)
    world.run(30)
    for name in world.backlog:
        world.backlog[name] = 100_000
    world.run(2 * WAIT, done_per_step=room)  # until each queue was found to have a backlog
    world.done.clear()
    world.run(60, done_per_step=room)
    assert world.most_held <= room * ahead
    assert max(world.done.values()) - min(world.done.values()) <= 2 * room * ahead
    assert sum(world.done.values()) >= 0.45 * room * 60 / 0.1  # a slot with nothing ahead is empty during its call


@pytest.mark.parametrize(("room", "ahead"), [(1, 1), (2, 1), (2, 10), (1, 10)])
def test_a_backlog_gets_the_room_that_idle_queues_do_not_use(room: int, ahead: int) -> None:
    def done(queues: int) -> int:
        world = World(queues, room=room, ahead=ahead, rate=1_000.0)
        world.run(60)
        world.backlog["q0"] = 100_000
        world.run(WAIT, done_per_step=room)  # polls of idle queues that have begun may wait until now
        before = world.done["q0"]
        world.run(50, done_per_step=room)
        assert all(world.times()[name] > 1 for name in world.backlog)
        return world.done["q0"] - before

    assert done(20) > 0.85 * done(1)
    assert done(2) > 0.85 * done(1)


def test_a_busy_queue_keeps_no_message_of_another_queue_waiting_for_long() -> None:
    world = World(20, room=1, ahead=1)
    world.backlog["q0"] = 1_000_000
    world.run(60, done_per_step=1)
    world.backlog["q7"] = 1
    world.run(21, done_per_step=1)
    assert world.done["q7"] == 1


def test_a_worker_that_works_on_as_much_as_it_can_asks_for_nothing() -> None:
    world = World(3, room=2)
    world.backlog["q1"] = 2
    world.run(2)
    begun = len(world.polls)
    assert len(world.held) == 2
    world.run(60)
    assert len(world.polls) == begun


def test_shares_follow_the_weights() -> None:
    world = World(3, room=2, rate=1_000.0, weights={"q0": 5, "q1": 2})
    for name in world.backlog:
        world.backlog[name] = 100_000
    world.run(200, done_per_step=2)
    assert world.done["q0"] / world.done["q2"] == pytest.approx(5, rel=0.05)
    assert world.done["q1"] / world.done["q2"] == pytest.approx(2, rel=0.05)


def test_a_queue_that_was_idle_for_long_gets_no_more_than_its_share_afterwards() -> None:
    world = World(2, room=2, rate=1_000.0)
    world.backlog["q0"] = 1_000_000
    world.run(100, done_per_step=2)
    before = world.done["q0"]
    world.backlog["q1"] = 1_000_000
    world.run(20, done_per_step=2)
    assert world.done["q1"] <= world.done["q0"] - before + 30
    assert world.done["q1"] >= 0.8 * (world.done["q0"] - before)


# -- with threads


@contextmanager
def poller(sqs: FakeSqs, names: list[str], *, room: int = 1, ahead: int = 1, **options: Any) -> Iterator[Poller]:
    made = Poller(
        sqs=sqs,
        wait_time=1,
        visibility=60,
        ahead=ahead,
        room=lambda: room,
        open_message=lambda _, message: message.body,
        wake=lambda: None,
        **options,
    )
    for name in names:
        made.consume(name, name, needs_room=True)
    try:
        yield made
    finally:
        made.close(5.0)


def take(made: Poller) -> Held:
    held = made.take(timeout=10.0)
    assert held is not None
    return held


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("ahead", [1, 10])
def test_an_idle_worker_serves_each_of_its_queues(count: int, ahead: int) -> None:
    sqs = FakeSqs()
    names = [f"q{number}" for number in range(count)]
    with poller(sqs, names, ahead=ahead) as made:
        for name in {names[-1], names[count // 2], names[0]}:
            sqs.arrive(name, f"for {name}")
            held = take(made)
            assert held.payload == f"for {name}"
            made.delete(held)


def test_two_queues_with_a_backlog_are_served_in_turn_within_the_bound() -> None:
    sqs = FakeSqs()
    for number in range(200):
        sqs.arrive("a", f"a{number}")
        sqs.arrive("b", f"b{number}")
    order = []
    with poller(sqs, ["a", "b"], room=2, ahead=5) as made:
        for _ in range(200):
            held = take(made)
            assert made.count() <= 10
            order.append(held.queue)
            made.delete(held)
    assert 80 <= order.count("a") <= 120


def test_closing_and_cancelling_end_the_receivers() -> None:
    sqs = FakeSqs()
    with poller(sqs, [f"q{number}" for number in range(10)], ahead=20) as made:
        for number in range(10):
            made.cancel(f"q{number}")
            made.consume(f"new{number}", f"new{number}", needs_room=True)
        sqs.arrive("new9", "m")
        assert take(made).payload == "m"
        assert made._receivers <= 20
    until(lambda: made._receivers == 0)


def test_one_queue_that_cannot_be_received_from_does_not_hold_up_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    sqs = FakeSqs()
    receive = sqs.receive

    def broken(url: str, *args: Any, **kwargs: Any) -> list[Message]:
        if url == "bad":
            raise KeyError(url)
        return receive(url, *args, **kwargs)

    monkeypatch.setattr(sqs, "receive", broken)
    with poller(sqs, ["bad", "good"]) as made:
        for number in range(5):
            sqs.arrive("good", f"m{number}")
            made.delete(take(made))


def test_a_receiver_outlives_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdstore.queue.broker.poller._RECEIVE_AGAIN", 0.05)
    sqs = FakeSqs()
    errors = [KeyError("room"), KeyError("room")]
    with poller(sqs, ["a"]) as made:

        def room() -> int:
            if errors:
                raise errors.pop()
            return 1

        made._schedule._room = room
        until(lambda: not errors)
        sqs.arrive("a", "m")
        assert take(made).payload == "m"
