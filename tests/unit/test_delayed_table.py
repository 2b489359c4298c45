"""The delayed table moves each message to its queue in time, at least once, whichever worker moves it and whatever fails."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.aws.retry import Retry
from mdstore.errors import DeploymentBroken, InvalidRequest, Unavailable
from mdstore.queue.delayed.table import (
    INTERVAL,
    LEASE,
    MAX_BODY,
    MAX_RUN,
    PAUSE,
    RETENTION,
    SHARDS,
    DelayedMessage,
    DelayedTable,
)
from tests.unit.fake_delayed_table import START, Clock, MemoryTable

HOUR = 3_600.0


class Queue:
    """Accepts messages as SQS would.

    It refuses messages whose ids are in `refused`; batches for queues in `failing` raise.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.sent: list[DelayedMessage] = []
        self.batches: list[list[DelayedMessage]] = []
        self.failing: dict[str, Exception] = {}
        self.refused: set[str] = set()

    def __call__(self, batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
        self.batches.append(list(batch))
        assert len({one.queue for one in batch}) == 1
        if batch[0].queue in self.failing:
            raise self.failing[batch[0].queue]
        accepted = [one for one in batch if one.deduplication_id not in self.refused]
        self.sent += accepted
        return accepted

    @property
    def deduplication_ids(self) -> list[str]:
        return [one.deduplication_id for one in self.sent]


class Environment:
    """Holds one table, one clock and one queue."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.dynamo = MemoryTable()
        self.queue = Queue(self.clock)
        self.table = self.another()

    def another(self, skew: float = 0.0) -> DelayedTable:
        """Return the table as another process has it, whose clock is `skew` seconds ahead."""
        return DelayedTable(dynamo=self.dynamo, table="due", clock=lambda: self.clock() + skew)

    def put(self, deduplication_id: str, ahead: float, *, queue: str = "q", body: str = "{}") -> bool:
        return self.table.put(queue, body, self.clock() + ahead, deduplication_id=deduplication_id)

    def move(self) -> int:
        return self.table.move(self.queue)


@pytest.fixture
def environment() -> Environment:
    return Environment()


def test_a_message_is_moved_when_sqs_can_delay_it(environment: Environment) -> None:
    """It is not moved before 900 s are left. Then SQS delays it for the rest, rounded up so that it is never early."""
    due = environment.clock() + 2 * HOUR
    assert environment.table.put("q", '{"a": "é"}', due, deduplication_id="t1:0", group_id="erp")
    environment.clock.now = due - 900.1
    assert environment.move() == 0
    environment.clock.now = due - 888.7
    assert environment.move() == 1
    (one,) = environment.queue.sent
    assert (one.queue, one.body, one.deduplication_id, one.group_id, one.due_at) == (
        "q",
        '{"a": "é"}',
        "t1:0",
        "erp",
        due,
    )
    assert one.delay_seconds == 889
    assert not environment.dynamo.messages


@pytest.mark.parametrize(
    ("ahead", "waited", "delay"), [(900.4, 0.4, 900), (30, 0, 30), (0.2, 0, 1), (0, 5, 0), (-HOUR, 0, 0)]
)
def test_a_message_that_is_due_soon_is_moved_at_once(
    environment: Environment, ahead: float, waited: float, delay: int
) -> None:
    """A message whose due time is near, or past, is not lost."""
    environment.put("t1:0", ahead)
    environment.clock.now += waited
    assert environment.move() == 1
    assert environment.queue.sent[0].delay_seconds == delay


def test_no_delay_is_longer_than_sqs_allows(environment: Environment) -> None:
    """Rounding up fractions of a second never yields 901 s."""
    for number in range(50):
        due = START + HOUR + number * 1.1
        environment.table.put("q", "{}", due, deduplication_id="t1:0")
        environment.clock.now = due - 900.0004
        environment.another().move(environment.queue)
        environment.clock.now += LEASE
        environment.another().move(environment.queue)
        environment.clock.now = START
        environment.dynamo.items = {}
        environment.table = environment.another()
    assert {one.delay_seconds for one in environment.queue.sent} <= {840, 900}
    assert len(environment.queue.sent) == 50


def test_a_fifo_queue_gets_its_messages_when_they_are_due(environment: Environment) -> None:
    """A FIFO queue cannot delay a single message."""
    environment.put("t1:0", HOUR, queue="q.fifo")
    environment.clock.now += HOUR - 1
    assert environment.move() == 0
    environment.clock.now += 1 + PAUSE
    assert environment.move() == 1
    assert environment.queue.sent[0].delay_seconds is None


def test_putting_the_same_message_again_changes_nothing(environment: Environment) -> None:
    """A put is repeated when its response was lost."""
    assert environment.put("t1:0", HOUR, body="first")
    assert not environment.put("t1:0", HOUR, body="second")
    assert environment.put("t1:1", HOUR)
    assert environment.put("t1:0", HOUR, queue="another")
    assert environment.put("t1:0", 2 * HOUR)
    assert environment.put("near", 60)
    environment.clock.now += 30
    assert not environment.put("near", 30)
    environment.clock.now += 3 * HOUR
    assert environment.move() == 5
    assert {one.body for one in environment.queue.sent if one.deduplication_id == "t1:0"} == {"first", "{}"}


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"due_at": math.nan}, "due_at", "Unix seconds"),
        ({"due_at": math.inf}, "due_at", "ten years"),
        ({"due_at": START + 11 * 366 * 86_400}, "due_at", "ten years"),
        ({"due_at": START * 1000}, "due_at", "Unix seconds"),
        ({"due_at": 3_600}, "due_at", "Unix seconds"),
        ({"due_at": "soon"}, "due_at", "got 'soon'"),
        ({"queue": "a queue"}, "queue", "SQS queue"),
        ({"queue": "q" * 76 + ".fifo"}, "queue", "SQS queue"),
        ({"deduplication_id": ""}, "deduplication_id", "1-1000"),
        ({"group_id": "a b"}, "group_id", "1-128"),
        ({"body": ""}, "body", "got '0 bytes'"),
        ({"body": "é" * (MAX_BODY // 2) + "x"}, "body", f"got '{MAX_BODY + 1} bytes'"),
        ({"body": "\ud800"}, "body", "Unicode"),
    ],
)
def test_invalid_messages_are_refused(environment: Environment, changes: dict[str, Any], field: str, text: str) -> None:
    """The error names the field, its value and what was expected; nothing is written."""
    values = {"queue": "q", "body": "{}", "due_at": START + HOUR, "deduplication_id": "t1:0", **changes}
    with pytest.raises(InvalidRequest, match=text) as caught:
        environment.table.put(values.pop("queue"), values.pop("body"), values.pop("due_at"), **values)
    assert caught.value.field == field
    assert not environment.dynamo.items


def test_a_message_expires_long_after_it_is_due(environment: Environment) -> None:
    """The TTL removes messages that no worker moved for months, never before they are due, even if that is 9 years ahead."""
    environment.put("soon", 10)
    environment.put("late", 9 * 365 * 86_400)
    for item in environment.dynamo.messages:
        assert int(item["expires_at"]["N"]) - int(item["due"]["N"]) / 1000 >= RETENTION - 900


def test_messages_due_at_one_moment_are_spread_over_the_shards(environment: Environment) -> None:
    """No partition gets more than its share of the messages that are due at the same time."""
    for number in range(1_600):
        environment.put(f"t{number}:0", 2 * HOUR)
    sizes = Counter(item["pk"]["S"] for item in environment.dynamo.messages)
    assert set(sizes) == {f"2026-11-25T16#{shard}" for shard in range(SHARDS)}
    assert max(sizes.values()) < 300


def test_checking_a_table_that_was_never_used_costs_one_read(environment: Environment) -> None:
    """Deployments that do not use the table pay one read unit a check."""
    assert environment.move() == 0
    assert environment.dynamo.calls == ["GetItem"]


def test_the_cost_of_a_check_that_finds_nothing(environment: Environment) -> None:
    """Each shard costs a lease, two reads and the return of the lease. A worker that checks soon after pays one read."""
    environment.put("t1:0", 10 * HOUR)
    environment.clock.now += 3 * HOUR
    environment.move()
    environment.clock.now += INTERVAL
    environment.dynamo.calls.clear()
    environment.move()
    assert Counter(environment.dynamo.calls) == {"GetItem": 1, "UpdateItem": 2 * SHARDS, "Query": 2 * SHARDS}
    environment.dynamo.calls.clear()
    environment.clock.now += PAUSE / 2
    environment.another().move(environment.queue)
    assert environment.dynamo.calls == ["GetItem"]


def test_after_a_month_without_a_worker_every_message_is_moved(environment: Environment) -> None:
    """No index of hours is needed: each hour since then is read once, and never again."""
    for day in range(30):
        environment.put(f"t{day}:0", day * 86_400.0 + 7)
    environment.clock.now += 30 * 86_400
    assert environment.move() == 30
    assert sorted(environment.queue.deduplication_ids) == sorted(f"t{day}:0" for day in range(30))
    assert environment.dynamo.calls.count("Query") <= SHARDS * (30 * 24 + 3)
    environment.clock.now += INTERVAL
    environment.dynamo.calls.clear()
    environment.move()
    assert environment.dynamo.calls.count("Query") == 2 * SHARDS


def test_a_leased_run_that_ends_early_keeps_its_progress(environment: Environment) -> None:
    """Many empty hours take several leased runs, and each continues where the one before ended."""
    environment.put("t1:0", 7)
    environment.clock.now += 50 * HOUR
    steps = iter(range(10**6))

    def clock() -> float:
        return environment.clock() + next(steps) * MAX_RUN / 50  # the work itself takes time

    table = DelayedTable(dynamo=environment.dynamo, table="due", clock=clock)
    table.move(environment.queue)
    firsts = [
        int(item[f"first#{n}"]["N"])
        for item in environment.dynamo.items.values()
        for n in range(SHARDS)
        if f"first#{n}" in item
    ]
    assert firsts
    assert all(START / HOUR - 1 <= first < START / HOUR + 49 for first in firsts)
    for _ in range(20):
        table.move(environment.queue)
    assert environment.queue.deduplication_ids == ["t1:0"]


@pytest.mark.parametrize("skew", [-14 * 60, 14 * 60])
def test_differing_clocks_lose_no_messages(environment: Environment, skew: float) -> None:
    """AWS accepts calls whose time is off by a quarter of an hour; the messages of such a process are moved too."""
    environment.put("first", HOUR)  # at the beginning of an hour, like the moment of the second put
    other = environment.another(skew)
    other.put("q", "{}", other.now() + 1, deduplication_id="then")
    environment.clock.now += 6 * HOUR
    environment.another(max(skew, 0)).move(environment.queue)
    other.put("q", "{}", other.now() + 1, deduplication_id="later")
    for _ in range(3):
        environment.clock.now += 2 * HOUR
        environment.move()
    assert sorted(environment.queue.deduplication_ids) == ["first", "later", "then"]


def test_concurrent_movers_do_not_move_the_same_messages(environment: Environment) -> None:
    """While one worker moves a shard, other workers find it leased."""
    for number in range(200):
        environment.put(f"t{number}:0", 1)
    other = environment.another()
    once = threading.Lock()

    def send(batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
        if once.acquire(blocking=False):
            other.move(environment.queue)
        return environment.queue(batch)

    environment.table.move(send)
    assert sorted(environment.queue.deduplication_ids) == sorted(f"t{number}:0" for number in range(200))


def test_movers_that_read_the_same_state_lease_a_shard_once(environment: Environment) -> None:
    """Both have read that the shard is free; the conditional write of the lease decides."""
    environment.put("t1:0", 1)
    environment.dynamo.after_read = lambda: environment.another().move(environment.queue)
    assert environment.move() == 0
    assert environment.queue.deduplication_ids == ["t1:0"]
    assert Counter(environment.dynamo.calls)["Query"] == 2 * SHARDS


def test_a_mover_whose_lease_has_ended_does_not_end_the_next_lease(environment: Environment) -> None:
    """A process may be suspended for minutes in the middle of a leased run."""
    for number in range(100):
        environment.put(f"t{number}:0", 1)
    states: list[dict[str, Any]] = []

    def send(batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
        if not states:
            states.append({})
            environment.clock.now += LEASE + 1
            environment.another().move(environment.queue)
            states.append(environment.dynamo.state)
        return environment.queue(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdstore.queue.delayed.table.THREADS", 1)
        environment.table.move(send)
    assert len(states) == 2
    assert environment.dynamo.state == states[1]


def test_a_mover_that_dies_after_sending_loses_nothing(environment: Environment) -> None:
    """Messages that were not deleted are sent again, but only after the lease has ended."""
    for number in range(30):
        environment.put(f"t{number}:0", 1)
    environment.dynamo.failing["BatchWriteItem"] = Unavailable("gone", code="NoAnswer")
    with pytest.raises(Unavailable):
        environment.move()
    before = len(environment.queue.sent)
    assert before
    environment.dynamo.failing.clear()
    environment.clock.now += LEASE / 2
    assert environment.move() == 0
    environment.clock.now += LEASE
    assert environment.move() == 30
    assert set(environment.queue.deduplication_ids) == {f"t{number}:0" for number in range(30)}
    assert len(environment.queue.sent) == before + 30
    assert not environment.dynamo.messages


def test_a_batch_is_what_one_call_to_sqs_takes(environment: Environment) -> None:
    """A batch has at most ten messages of one queue; `Sqs.send` splits it by bytes."""
    for number in range(300):
        environment.put(f"small{number}", 1, queue=f"q{number % 2}")
    for number in range(40):
        environment.put(f"large{number}", 1, body="x" * MAX_BODY)
    environment.dynamo.page = 60
    assert environment.move() == 340
    assert max(len(batch) for batch in environment.queue.batches) == 10
    assert len(environment.queue.batches) < 34 + 4 + 6 * SHARDS


def test_messages_that_were_not_sent_stay_in_the_table(
    environment: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that SQS refuses, or a queue that fails, does not block others, and is retried after a while."""
    for number in range(200):
        environment.put(f"t{number}:0", 1)
        environment.put(f"broken{number}", 1, queue="broken")
    environment.queue.refused = {"t3:0"}
    environment.queue.failing["broken"] = DeploymentBroken("no such queue", code="QueueDoesNotExist")
    with caplog.at_level(logging.ERROR, "mdstore.events"):
        assert environment.move() == 199
        environment.clock.now += LEASE / 2
        assert environment.move() == 0
    assert sum("due.kept queue=broken" in text for text in caplog.messages) == SHARDS
    environment.queue.refused.clear()
    environment.queue.failing.clear()
    environment.clock.now += LEASE
    assert environment.move() == 201
    assert Counter(environment.queue.deduplication_ids) == Counter(
        [f"t{n}:0" for n in range(200)] + [f"broken{n}" for n in range(200)]
    )


def test_a_page_whose_messages_stay_does_not_block_later_pages(environment: Environment) -> None:
    """A leased run continues with the next page."""
    for number in range(100):
        environment.put(f"t{number}:0", 1)
    environment.queue.refused = {f"t{number}:0" for number in range(99)}
    environment.dynamo.page = 2
    assert environment.table.move(environment.queue, stopping=lambda: len(environment.queue.batches) > 200) == 1
    assert len(environment.queue.batches) < 100


def test_an_hour_with_messages_left_is_read_again(environment: Environment) -> None:
    """A message that SQS refused for days is still found."""
    environment.put("t1:0", 1)
    environment.queue.refused = {"t1:0"}
    for _ in range(100):
        environment.clock.now += HOUR
        environment.move()
    environment.queue.refused.clear()
    environment.clock.now += HOUR
    assert environment.move() == 1


def test_stopping_ends_before_the_next_batch_and_frees_the_shard(environment: Environment) -> None:
    """The next worker continues at once with the messages that were not sent."""
    for number in range(1_600):
        environment.put(f"t{number}:0", 1)
    environment.table.move(environment.queue, stopping=lambda: len(environment.queue.batches) >= 3)
    assert 3 <= len(environment.queue.batches) <= 8
    environment.clock.now += 0.01
    environment.another().move(environment.queue)
    assert sorted(environment.queue.deduplication_ids) == sorted(f"t{number}:0" for number in range(1_600))


def test_items_that_dynamodb_did_not_delete_are_deleted_again(environment: Environment) -> None:
    """A batch write may succeed and still leave some of its items unprocessed."""
    environment.dynamo.retry = Retry(sleep=lambda _: None)
    for number in range(5):
        environment.put(f"t{number}:0", 1)
    environment.dynamo.unprocessed = 1
    environment.move()
    assert not environment.dynamo.messages


# -- any order of steps

Steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.floats(0, 6 * HOUR)),
        st.tuples(st.just("wait"), st.floats(0, 3 * HOUR)),
        st.tuples(st.sampled_from(["move", "refuse", "raise", "lose", "stop"]), st.floats(-600, 600)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(Steps)
def test_no_message_is_lost_or_early(steps: list[tuple[str, float]]) -> None:
    """Each message is sent, and none arrives before it is due, for any order of steps and failures and any clock skew."""
    environment = Environment()
    wanted: dict[str, float] = {}

    def send(batch: Sequence[DelayedMessage], mode: str, skew: float) -> Sequence[DelayedMessage]:
        if mode == "raise":
            raise Unavailable("not now", code="ServiceUnavailable")
        if mode == "refuse":
            batch = batch[::2]
        for one in batch:
            assert one.delay_seconds is not None
            arrives = environment.clock() + skew + one.delay_seconds
            assert one.due_at - 0.001 <= arrives
            assert arrives <= max(one.due_at, environment.clock() + skew) + 1
        return environment.queue(batch)

    for number, (step, amount) in enumerate(steps):
        if step == "wait":
            environment.clock.now += amount
        elif step == "put":
            wanted[f"t{number}"] = environment.clock() + amount
            environment.another().put("q", "{}", environment.clock() + amount, deduplication_id=f"t{number}")
        else:
            table = environment.another(amount)
            if step == "lose":
                environment.dynamo.failing["BatchWriteItem"] = Unavailable("gone", code="NoAnswer")
            try:
                table.move(
                    lambda batch, mode=step, skew=amount: send(batch, mode, skew),  # type: ignore[misc]
                    stopping=lambda stops=step == "stop": stops and len(environment.queue.sent) % 2 == 1,  # type: ignore[misc]
                )
            except Unavailable:
                assert step == "lose"
            environment.dynamo.failing.clear()
    for _ in range(3):
        environment.clock.now += 12 * HOUR
        environment.move()
    assert set(environment.queue.deduplication_ids) == set(wanted)
    assert not environment.dynamo.messages
