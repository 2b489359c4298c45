"""The producer's side: when a request's message is sent, sent again, and never sent again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

from mdstore.aws.concurrent import Task
from mdstore.errors import InvalidOperations, NotFound, RequestConflict, Unavailable
from mdstore.model import MAX_AGE, Counts, Reference, State
from mdstore.settings import Settings
from mdstore.store.entities import Entities
from mdstore.store.ingestor import Ingestor
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.payload import Payloads
from mdstore.store.validation import Validator
from tests.unit.fakes import MemoryObjects

T = TypeVar("T")
SETTINGS = Settings(visibility_timeout=300)
OPERATION: dict[str, Any] = {"op": "upsert", "entity": "thing", "key": "k", "data": {"n": 1}}


class FakeLedger(Ledger):
    """Keeps states in memory. While `broken` is set, it cannot record anything."""

    def __init__(self) -> None:
        self.states: dict[str, tuple[State, float]] = {}
        self.sent_again: Counter[str] = Counter()
        self.notes: dict[str, dict[str, Any]] = {}
        self.broken = False
        self.now = 0.0

    def run(self, tasks: Iterable[Task[T]], *, in_flight: int = 1) -> list[T]:  # noqa: ARG002
        return [_result(task) for task in tasks]

    def note_task(self, request_id: str, reference: Reference, **values: Any) -> Task[RequestStatus | None]:
        if self.broken:
            raise Unavailable("no ledger", code="Test")
        if request_id in self.states:
            return self.get(request_id)
        self.states[request_id] = State.ACCEPTED, self.now
        self.notes[request_id] = {"reference": reference, **values}
        yield from ()
        return None

    def correct(self, reference: Reference) -> None:
        """Do nothing: no reference is kept."""

    def withdraw(self, request_id: str, content: str) -> None:  # noqa: ARG002
        del self.states[request_id]

    def progress(self, request_id: str) -> RequestStatus:
        return self.get(request_id)

    def get(self, request_id: str) -> RequestStatus:
        if request_id not in self.states:
            raise NotFound("request", request_id)
        state, at = self.states[request_id]
        note = self.notes[request_id]
        return RequestStatus(
            request_id=request_id, state=state, source="default", operations=note["operations"], lanes=1,
            reference=note["reference"], early=Counts(refused=note["refused"]), counts=Counts(), accepted_at=at,
            active_at=at, sent_again=self.sent_again[request_id], content=note["content"],
        )  # fmt: skip

    def reopen(self, request: RequestStatus) -> bool:
        self.states[request.request_id] = State.ACCEPTED, self.now
        self.sent_again[request.request_id] += 1
        return True


def _result(task: Task[T]) -> T:
    """Return the result of a task that makes no call."""
    with pytest.raises(StopIteration) as ended:
        next(task)
    result: T = ended.value.value
    return result


class Bench:
    """Holds an ingestor over fakes, and a clock that the test sets."""

    def __init__(self) -> None:
        self.ledger = FakeLedger()
        self.sent: list[Reference] = []
        self.objects = MemoryObjects()
        payloads = Payloads(objects=self.objects, prefix="payloads/", max_lane_bytes=2**20)
        validator = Validator(entities=Entities(), max_record_bytes=2**20)
        self.ingestor = Ingestor(
            payloads=payloads, ledger=self.ledger, validator=validator, settings=SETTINGS, clock=lambda: self.ledger.now
        )

    def submit(self, *operations: Any, request_id: str = "r", **more: Any) -> bool:
        """Submit operations, and return whether a message was sent."""
        before = len(self.sent)
        self.ingestor.accept(operations or (OPERATION,), publish=self.sent.append, request_id=request_id, **more)
        return len(self.sent) > before


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_repeated_request_is_sent_once_more_before_it_has_begun(bench: Bench) -> None:
    """Its note does not prove that its message was sent. A second copy proves it, so later repeats wait for the lease."""
    assert bench.submit()
    assert bench.submit()
    bench.ledger.now += SETTINGS.request_lease - 1
    assert not bench.submit()


def test_a_repeated_request_is_not_sent_while_it_runs_or_once_it_is_completed(bench: Bench) -> None:
    """A worker has its message, so the same request again sends nothing."""
    assert bench.submit()
    for state in (State.RUNNING, State.COMPLETED):
        bench.ledger.states["r"] = state, bench.ledger.now
        assert not bench.submit()


def test_a_repeated_request_is_sent_if_it_is_overdue_or_failed(bench: Bench) -> None:
    """A request is sent again if it failed, or if it is not final when its lease is over."""
    assert bench.submit()
    bench.ledger.states["r"] = State.RUNNING, bench.ledger.now
    bench.ledger.now += SETTINGS.request_lease + 1
    assert bench.submit()
    bench.ledger.states["r"] = State.FAILED, bench.ledger.now
    assert bench.submit()


def test_a_request_older_than_14_days_is_never_sent(bench: Bench) -> None:
    """Its receipts may have expired. The request is not reported as accepted either, unless it is known to be completed."""
    assert bench.submit()
    bench.ledger.now += MAX_AGE + 1
    for states in ({}, {"r": (State.FAILED, 0.0)}, {"r": (State.ACCEPTED, 0.0)}):
        bench.ledger.states = states
        for republish in (False, True):
            with pytest.raises(RequestConflict, match="is more than 14 days old, and not known to be completed"):
                bench.submit(republish=republish)
    bench.ledger.states["r"] = State.COMPLETED, 0.0
    assert not bench.submit()
    assert not bench.submit(republish=True)
    assert len(bench.sent) == 1


def test_an_old_payload_without_a_ledger_entry_is_not_found(bench: Bench) -> None:
    """A payload without an entry is an accepted request, until an entry would have expired."""
    assert bench.submit()
    del bench.ledger.states["r"]
    assert bench.ingestor.status("r").state is State.ACCEPTED
    bench.ledger.now += MAX_AGE + 1
    with pytest.raises(NotFound):
        bench.ingestor.status("r")


def test_a_request_that_cannot_be_noted_is_neither_stored_nor_sent(bench: Bench) -> None:
    """The note decides about the request's id, so nothing is accepted without it; a repeat is accepted."""
    bench.ledger.broken = True
    with pytest.raises(Unavailable):
        bench.submit()
    with pytest.raises(NotFound):
        bench.ingestor.status("r")
    bench.ledger.broken = False
    assert bench.submit()


def test_a_noted_request_without_a_payload_is_stored_by_its_repeat(bench: Bench) -> None:
    """A producer died after the note; whoever repeats the request stores its payload and sends it."""
    assert bench.submit()
    bench.objects.stored.clear()
    assert bench.submit()
    assert list(bench.objects.stored) == ["payloads/r"]


def test_other_content_is_a_conflict_and_sends_nothing(bench: Bench) -> None:
    """Other operations under the same request id are refused, and the first ones stay."""
    assert bench.submit()
    with pytest.raises(RequestConflict):
        bench.submit({**OPERATION, "data": {"n": 2}})
    assert len(bench.sent) == 1


def test_an_invalid_operation_stores_and_sends_nothing(bench: Bench) -> None:
    """The error has index, field and reason, and is raised before anything is stored, so the request id stays free."""
    with pytest.raises(InvalidOperations) as raised:
        bench.submit(OPERATION, {**OPERATION, "op": "replace"})
    (problem,) = raised.value.problems
    assert (problem.index, problem.field, problem.reason) == (1, "op", "Invalid enum value 'replace'")
    assert bench.submit()


LINE = b'{"op":"upsert","entity":"account","key":"b","data":{"n":NaN},"group":"transfer"}'


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (LINE, "another operation of the group is invalid"),
        (LINE[:40], "a line that cannot be read may belong to the group"),
        (LINE.replace(b"transfer", b"other"), None),
    ],
)
def test_a_broken_line_refuses_its_group(bench: Bench, line: bytes, detail: str | None) -> None:
    """A group never applies in part. If the line names no group, it may belong to any, so every group is refused."""
    debit = {"op": "upsert", "entity": "account", "key": "a", "data": {"n": -5}, "group": "transfer"}
    assert bench.submit(debit, OPERATION, line, on_invalid="refuse")

    header = bench.ingestor._payloads.header(bench.sent[0])
    refused = {one.index: one.detail for one in bench.ingestor._payloads.refused(bench.sent[0])}
    assert header.operations == 3
    assert refused.get(0) == detail
    assert 1 not in refused
    assert 2 in refused
