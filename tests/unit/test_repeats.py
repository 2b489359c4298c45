"""A request that is submitted again is answered, and sent again only if nobody works on it."""

from __future__ import annotations

from typing import Any

import pytest

from mdstore.errors import Unavailable
from mdstore.model import Counts, Reference, State
from mdstore.settings import Settings
from mdstore.store.entities import Entities
from mdstore.store.ingestor import Ingestor
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import LaneSummary, RequestStatus
from mdstore.store.payload import Payloads
from mdstore.store.validation import Validator
from tests.model.network import Tables
from tests.unit.fakes import MemoryObjects

SETTINGS = Settings(lane_operations=2, visibility_timeout=100, task_time_limit=200)
LEASE = 300.0  # seconds
OPERATIONS = [{"op": "upsert", "entity": "e", "key": f"k{number}", "data": {"n": number}} for number in range(20)]


class Bench:
    """An ingestor and its ledger over tables in memory, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.sent: list[Reference] = []
        self.is_broken = False
        self.payloads = Payloads(objects=MemoryObjects(), prefix="payloads/", max_lane_bytes=2**20)
        self.ledger = Ledger(dynamo=Tables("odd"), table="ledger", retention_days=15, clock=lambda: self.now)
        self.ingestor = Ingestor(
            payloads=self.payloads,
            ledger=self.ledger,
            validator=Validator(entities=Entities(), max_record_bytes=2**20),
            settings=SETTINGS,
            clock=lambda: self.now,
        )

    def submit(self, **more: Any) -> bool:
        """Submit the request, and return whether a message was sent."""
        before = len(self.sent)
        self.ingestor.accept(OPERATIONS, publish=self._publish, request_id="r", **more)
        return len(self.sent) > before

    def _publish(self, reference: Reference) -> None:
        if self.is_broken:
            raise Unavailable("no queue", code="Test")
        self.sent.append(reference)

    def start(self, by: str = "r") -> RequestStatus:
        return self.ledger.start(self.sent[0], operations=len(OPERATIONS), refused={}, by=by)

    def close_lane(self, lane: int, state: State = State.COMPLETED) -> None:
        summary = LaneSummary(lane=lane, state=state, counts=Counts(), started_at=self.now, finished_at=self.now)
        self.ledger.close_lane("r", summary)

    def times_sent(self, *, repeats: int, every: float) -> int:
        """Submit the request again and again; return how often that sent a message."""
        count = 0
        for _ in range(repeats):
            self.now += every
            count += self.submit()
        return count


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    assert made.submit()
    return made


def test_a_running_request_is_not_sent_again_while_its_lanes_end(bench: Bench) -> None:
    """A lane that ends is a sign of work: the request may run for hours, and a repeat sends nothing."""
    bench.start()
    for lane in range(8):
        bench.now += LEASE - 1
        bench.close_lane(lane)
        bench.now += 2
        assert not bench.submit()


def test_a_running_request_without_a_sign_of_work_is_sent_again_once_per_lease(bench: Bench) -> None:
    """Its message may be lost. It may also wait behind a day of others: then 288 repeats send it 8 times, and not 288 times."""
    bench.start()
    bench.now += LEASE - 1
    assert not bench.submit()
    bench.now += 2
    assert bench.submit()
    assert bench.ledger.get("r").state is State.ACCEPTED
    assert not bench.submit()
    assert bench.times_sent(repeats=288, every=LEASE + 1) == 7  # after 2, 4, 8, 16, 32, 64 and 128 leases


def test_an_accepted_request_is_sent_again_by_its_first_repeat_and_then_once_per_lease(bench: Bench) -> None:
    """The producer may have died before it sent the message. Once a repeat has sent it, only the lease counts."""
    assert bench.submit()
    assert not bench.submit()
    assert bench.times_sent(repeats=288, every=LEASE + 1) == 7


def test_a_failed_request_is_sent_again_at_once_and_then_has_a_lease(bench: Bench) -> None:
    """Two repeats of a failed request send one message, and whoever waits for its state does not see the old failure."""
    bench.start()
    bench.close_lane(0, State.FAILED)
    bench.ledger.fail("r", "a lane failed")
    assert bench.submit()
    again = bench.ledger.get("r")
    assert (again.state, again.error, again.finished_at, again.sent_again) == (State.ACCEPTED, "", None, 1)
    assert not bench.submit()
    assert bench.start().state is State.RUNNING


def test_of_many_callers_one_sends_the_request_again(bench: Bench) -> None:
    """All of them may find the lease over; the ledger lets one of them send it."""
    bench.now += LEASE + 1
    found = bench.ledger.progress("r")
    assert [bench.ledger.reopen(found) for _ in range(3)] == [True, False, False]
    bench.now += 2 * LEASE + 1
    found = bench.ledger.progress("r")
    assert [bench.ledger.reopen(found) for _ in range(3)] == [True, False, False]


def test_a_completed_request_is_not_reopened(bench: Bench) -> None:
    """What was read as running may be completed by now."""
    running = bench.start()
    for lane in range(running.lanes):
        bench.close_lane(lane)
    assert bench.ledger.finish("r").state is State.COMPLETED
    assert not bench.ledger.reopen(running)


def test_a_repeat_that_could_not_be_sent_is_sent_by_the_next_one(bench: Bench) -> None:
    """The lease is not held by a message that never reached SQS."""
    bench.is_broken = True
    with pytest.raises(Unavailable):
        bench.submit()
    assert bench.ledger.get("r").state is State.ACCEPTED
    bench.is_broken = False
    assert bench.submit()
    bench.now += 2 * LEASE + 1
    bench.is_broken = True
    with pytest.raises(Unavailable):
        bench.submit()
    assert bench.ledger.get("r").state is State.FAILED
    bench.is_broken = False
    assert bench.submit()


def test_a_task_that_waits_for_its_own_result_is_always_sent(bench: Bench) -> None:
    """It must not fail a request that others work on, even if it cannot be sent itself."""
    bench.start()
    assert bench.submit(republish=True)
    bench.is_broken = True
    with pytest.raises(Unavailable):
        bench.submit(republish=True)
    assert bench.ledger.get("r").state is State.RUNNING
