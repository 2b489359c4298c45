"""What large requests cost those who verify them, and those who wait for them."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest

from mdstore.client import Client
from mdstore.model import Counts, Outcome, Reference, State
from mdstore.store.entities import Entities
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.verify import Verifier

LANES, LANE = 200, 1_000


def request_of(*, operations: int, lanes: int, state: State = State.COMPLETED) -> RequestStatus:
    reference = Reference(v=1, request_id="r", payload="", digest="", lanes=lanes, source="shop")
    return RequestStatus(
        request_id="r", state=state, source="shop", operations=operations, lanes=lanes, reference=reference,
        early=Counts(), counts=Counts(applied={"upsert": operations}), accepted_at=0,
    )  # fmt: skip


class FakeOutcomes:
    """Outcomes of lanes that hold every `LANES`-th operation; `change` replaces those of one lane."""

    def __init__(self) -> None:
        self.change: dict[int, list[int]] = {}

    def part(self, _: RequestStatus, part: int) -> list[Outcome]:
        lane = part - 1
        indexes = self.change.get(lane, range(lane, LANES * LANE, LANES)) if part else []
        return [Outcome(index=index, outcome="applied") for index in indexes]


@pytest.fixture
def outcomes() -> FakeOutcomes:
    return FakeOutcomes()


@pytest.fixture
def verifier(outcomes: FakeOutcomes, monkeypatch: pytest.MonkeyPatch) -> Verifier:
    """A verifier of outcomes only, without lanes and records."""
    nothing: Any = None
    payloads: Any = SimpleNamespace(header=lambda _: SimpleNamespace(models="none"))
    made = Verifier(payloads=payloads, ledger=nothing, records=nothing, entities=Entities())
    monkeypatch.setattr(made, "_outcomes", outcomes)
    monkeypatch.setattr(made, "_verify_effects", lambda *_: None)
    return made


def test_verify_takes_a_byte_for_each_operation(verifier: Verifier) -> None:
    """So 10 million operations take 10 MB and not a gigabyte; only one lane's outcomes are in memory at once."""
    tracemalloc.start()
    try:
        found = verifier.verify(request_of(operations=LANES * LANE, lanes=LANES))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (found.ok, found.operations) == (True, LANES * LANE)
    assert peak < LANES * LANE + 2_000_000


@pytest.mark.parametrize(
    ("indexes", "faults"),
    [
        ([*range(7, LANES * LANE - LANES, LANES)], {"1 of 200000 operations have no outcome"}),
        ([*range(7, LANES * LANE, LANES), 7], {"operation 7 has two outcomes"}),
        (
            [*range(7, LANES * LANE, LANES), LANES * LANE],
            {"operation 200000 has an outcome, but the request has 200000 operations"},
        ),
    ],
    ids=["missing", "twice", "beyond"],
)
def test_verify_finds_outcomes_that_are_missing_or_too_many(
    verifier: Verifier, outcomes: FakeOutcomes, indexes: list[int], faults: set[str]
) -> None:
    """Each operation of the request has one outcome, and there are no others."""
    outcomes.change[7] = indexes
    found = verifier.verify(request_of(operations=LANES * LANE, lanes=LANES))
    assert {text for text in found.faults if "ledger" not in text} == faults


class CountingClient(Client):
    """Counts what it asks, on a clock of its own, until the request is completed after `seconds`."""

    def __init__(self, clock: list[float], *, lanes: int, seconds: float) -> None:
        super().__init__()
        self.clock, self.lanes, self.seconds = clock, lanes, seconds
        self.summaries: list[float] = []
        self.states: list[float] = []

    def _now(self) -> RequestStatus:
        state = State.COMPLETED if self.clock[0] >= self.seconds else State.RUNNING
        return request_of(operations=1_000 * self.lanes, lanes=self.lanes, state=state)

    def status(self, _: str) -> RequestStatus:
        self.summaries.append(self.clock[0])
        return self._now()

    def _state(self, _: str) -> RequestStatus:
        self.states.append(self.clock[0])
        return self._now()


@pytest.mark.parametrize(("lanes", "most"), [(1, 300), (100, 300), (1_000, 61), (5_000, 13)])
def test_progress_asks_for_fewer_summaries_the_more_lanes_there_are(
    monkeypatch: pytest.MonkeyPatch, lanes: int, most: int
) -> None:
    """In a minute, one client reads at most 65,000 summaries of lanes; it learns of the end as soon as without progress."""
    clock = [0.0]
    monkeypatch.setattr("mdstore.client.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("mdstore.client.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    client = CountingClient(clock, lanes=lanes, seconds=60.0)
    shown: list[RequestStatus] = []
    assert client.wait("r", timeout=100, progress=shown.append).state is State.COMPLETED
    assert len(client.summaries) <= most + 10  # the first ones come faster
    assert clock[0] < 60.3
    assert [one.state for one in (shown[0], shown[-1])] == [State.RUNNING, State.COMPLETED]
    assert (
        max(later - earlier for earlier, later in zip(client.summaries, client.summaries[1:], strict=False))
        < 0.3 + lanes / 1_000
    )
