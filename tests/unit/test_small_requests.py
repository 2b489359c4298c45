"""Small requests are applied by tasks that run side by side: each ends as it would alone, in as few calls, and on its own."""

from __future__ import annotations

import random
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.errors import DeploymentBroken, IntegrityError, LaneUnfinished, Unavailable
from mdstore.model import MAX_AGE, Counts, Operation, Reference, State
from mdstore.settings import DAY, load_settings
from mdstore.store.batch import encode_batch, new_batch_id
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.tasks import StoreApp, create_store_app
from mdstore.tasks.ingest import IngestRequest, IngestTask
from mdstore.tasks.task import StoreTask
from tests.unit.bench import Bench
from tests.unit.fakes import Actions
from tests.unit.test_writer_parts import op, random_operations


class Ingest(IngestTask):
    """The task over a store in memory."""

    name = "mdstore.ingest"
    store: Any = None


@pytest.fixture
def bench() -> Bench:
    return Bench()


def ingest(bench: Bench) -> Ingest:
    """Return the task, which has a bench's store."""
    task = Ingest()
    entities = SimpleNamespace(report_other_models=lambda *_, **__: None)
    aws = SimpleNamespace(dynamo=bench.dynamo)
    task.store = SimpleNamespace(aws=aws, payloads=bench.payloads, entities=entities, writer=bench.writer())
    return task


def prepare(bench: Bench, *references: Any) -> list[RequestStatus | Exception | None]:
    """Apply requests side by side, as the messages of a job, and return their outcomes."""
    return ingest(bench).prepare([[msgspec.to_builtins(one)] for one in references])


def upsert(key: str) -> Operation:
    return op("upsert", key, n=1)


def test_a_small_request_takes_a_read_a_transaction_and_a_write(bench: Bench) -> None:
    """One ranged read gives header and lane, and one write completes the request."""
    reference = bench.request([upsert("a"), upsert("b")])
    (status,) = prepare(bench, reference)
    assert isinstance(status, RequestStatus)
    assert (status.state, status.counts, status.operations) == (State.COMPLETED, Counts(applied={"upsert": 2}), 2)
    assert [key for key, _, _ in bench.objects.gets] == [reference.payload]
    assert bench.dynamo.calls == ["TransactWriteItems", "UpdateItem"]


def test_a_request_whose_operations_were_all_refused_is_completed(bench: Bench) -> None:
    """It has no lane, so there is nothing to apply."""
    reference = bench.request([upsert("a")])
    (payload,) = bench.dynamo.run([bench.payloads.open_task(reference)])
    refused = msgspec.structs.replace(payload.header, lanes=(), refused_counts={"invalid": 1})
    empty = payload._replace(header=refused, reference=msgspec.structs.replace(reference, lanes=0))
    (status,) = bench.dynamo.run([bench.writer().apply_small_task(empty)])
    assert status is not None
    assert (status.state, status.counts) == (State.COMPLETED, Counts(refused={"invalid": 1}))


@settings(deadline=None, max_examples=100)
@given(random_operations, st.booleans())
def test_a_small_request_ends_as_it_would_alone(operations: list[Operation], was_applied: bool) -> None:
    """Records, receipts and counts are those of the other way, on the first delivery and on a later one."""
    seen: set[tuple[str | None, str]] = set()
    lane = []
    for operation in operations:
        place = operation.group, operation.key
        if operation.group is None or place not in seen:
            lane.append(operation)
        seen.add(place)
    if not lane:
        return
    alone, together = Bench(), Bench()
    expected = alone.writer().apply_request(alone.request(lane))
    reference = together.request(lane)
    if was_applied:
        together.writer().apply_lane(reference, 0)
    (found,) = prepare(together, reference)
    if found is None:  # it has too many waves
        found = together.writer().apply_request(reference)
    assert isinstance(found, RequestStatus)
    assert msgspec.structs.replace(found, reference=expected.reference) == expected
    assert records_and_receipts(together) == records_and_receipts(alone)


def records_and_receipts(bench: Bench) -> Any:
    return {place: item for place, item in bench.snapshot().items() if place[2] != "request"}


def noise(size: int) -> str:
    return "".join(random.Random(1).choices("0123456789abcdef", k=size))


@pytest.mark.parametrize(
    "operations",
    [
        [upsert(f"k{number}") for number in range(101)],
        [op("upsert", "k", n=1), *(op("patch", "k", n=number) for number in range(4))],
        [Operation(op="upsert", entity="e", key="k", data={"a": noise(200_000)})],
        [Operation(op="upsert", entity="e", key=f"k{number}", data={"a": "a" * 300_000}) for number in range(4)],
    ],
    ids=["operations", "waves", "bytes", "bytes that are compressed well"],
)
def test_a_request_that_is_not_small_is_left_alone(bench: Bench, operations: list[Operation]) -> None:
    """Whatever its message says of its size, nothing is written: its task applies it, in its turn."""
    assert prepare(bench, bench.request(operations)) == [None]
    assert bench.dynamo.items == {}


def test_a_batch_is_left_alone(bench: Bench) -> None:
    """Whatever its message says, it is not one request: each of its requests has a state of its own."""
    builders = [PayloadBuilder(validator=bench.validator, settings=bench.settings) for _ in range(2)]
    for number, builder in enumerate(builders):
        builder.add(upsert(f"k{number}"))
    requests = [(f"r{number}", builder) for number, builder in enumerate(builders)]
    encoded = encode_batch(new_batch_id(), "shop", requests, created_at=1_000, models="none")
    with closing(encoded.body):
        assert bench.payloads.put_batch(encoded)
    assert prepare(bench, bench.payloads.reference(encoded)) == [None]
    assert bench.dynamo.items == {}


def test_each_request_ends_on_its_own(bench: Bench) -> None:
    """One is forged, one throttled, one meets a missing table, one is no reference, one is too large: the others succeed."""

    def answer(actions: Actions) -> None:
        key = next(iter(actions[0].values()))["Key"]["pk"]["S"]
        if key == "e#busy":
            raise Unavailable("busy", code="ThrottlingException")
        if key == "e#gone":
            raise DeploymentBroken("no table", code="ResourceNotFoundException")

    bench.dynamo.before = answer
    good = [bench.request([upsert(f"good{number}")], f"good{number}") for number in range(3)]
    forged = msgspec.structs.replace(bench.request([upsert("forged")], "forged"), digest="0" * 64)
    busy, gone = (bench.request([upsert(key)], key) for key in ("busy", "gone"))
    large = bench.request([upsert(f"large{number}") for number in range(101)], "large")
    found = prepare(bench, good[0], forged, busy, {"payload": 7}, good[1], gone, large, good[2])
    kinds = [type(one) for one in found]
    ok = RequestStatus
    assert kinds == [ok, IntegrityError, Unavailable, type(None), ok, DeploymentBroken, type(None), ok]
    assert {key for _, key in bench.records.look_up([("e", "busy"), ("e", "forged"), ("e", "gone")])} == set()
    assert [bench.data(f"good{number}") for number in range(3)] == [{"n": 1}] * 3


def test_an_old_request_is_not_applied(bench: Bench) -> None:
    """Its receipts may be gone, so it could be applied twice."""
    reference = bench.request([upsert("a")])
    (payload,) = bench.dynamo.run([bench.payloads.open_task(reference)])
    bench.now = payload.header.created_at + MAX_AGE + DAY
    (found,) = prepare(bench, reference)
    assert isinstance(found, IntegrityError)


def test_damaged_bytes_are_read_again(bench: Bench) -> None:
    """A lane that was damaged in transit is read once more, and only that lane."""
    reference = bench.request([upsert("a")])
    (payload,) = bench.dynamo.run([bench.payloads.open_task(reference)])
    del bench.objects.gets[:]
    whole, reads, place = bench.objects.get, iter([True]), payload.body_start

    def damage(key: str, start: int, end: int) -> bytes:
        found = bytearray(whole(key, start, end))
        if next(reads, False):
            found[place] ^= 1
        return bytes(found)

    bench.objects.get = damage  # type: ignore[method-assign]
    (found,) = prepare(bench, reference)
    assert isinstance(found, RequestStatus)
    assert [start > 0 for _, start, _ in bench.objects.gets] == [False, True]


def test_turns_are_for_long_lanes_only(bench: Bench) -> None:
    """A small request never gives way to others: it would cost more than it saves."""
    bench.turn, bench.turn_waves = 0, 1
    operations = [op("upsert", "k", n=1), *(op("patch", "k", n=number) for number in range(3))]
    with pytest.raises(LaneUnfinished):
        bench.apply(operations, "alone")
    (found,) = prepare(bench, bench.request(operations, "together"))
    assert isinstance(found, RequestStatus)


# -- which messages join a job

HEADERS = {"task": "mdstore.ingest", "operations": 1, "receives": 1, "group": None}


@pytest.fixture(scope="module")
def app() -> StoreApp:
    return create_store_app(load_settings({}).settings, set_as_current=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"operations": 100}, True),
        ({"retries": 3}, True),  # it was postponed, which proves nothing against it
        ({"operations": 101}, False),
        ({"operations": 0}, False),
        ({"operations": -1}, False),
        ({"operations": True}, False),
        ({"operations": "1"}, False),
        ({"operations": None}, False),
        ({"task": "mdstore.finish"}, False),
        ({"receives": 2}, False),  # it may be the one that killed its process
        ({"group": "g"}, False),
    ],
    ids=str,
)
def test_a_message_is_small_by_its_headers(app: StoreApp, changes: dict[str, Any], expected: bool) -> None:
    """It says so, it is delivered for the first time, and it is no part of a group."""
    assert app.is_small({**HEADERS, **changes}) is expected


def test_a_message_with_a_single_delivery_runs_alone() -> None:
    """A job that another message kills would use it up."""
    settings_ = load_settings({"MDSTORE_MAX_RECEIVES": "1"}).settings
    assert not create_store_app(settings_, set_as_current=False).is_small(HEADERS)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ([[{"lanes": 1}], {}, {"callbacks": None, "chain": None}], True),
        ([[{"lanes": 0}], {}, None], True),
        ([[{"lanes": 2}], {}, {}], False),
        ([[{"lanes": 1}, 2], {}, {}], False),
        ([[{"lanes": 1}], {"a": 1}, {}], False),
        ([[7], {}, {}], False),
        ([[], {}, {}], False),
        *(([[{"lanes": 1}], {}, {part: [{}]}], False) for part in ("callbacks", "errbacks", "chain", "chord")),
    ],
    ids=str,
)
def test_a_request_is_small_by_its_body(app: StoreApp, payload: list[Any], expected: bool) -> None:
    """It has at most one lane, and nothing follows it."""
    request = SimpleNamespace(app=app, request_dict=HEADERS, message=SimpleNamespace(payload=payload))
    assert IngestRequest.is_small.fget(request) is expected  # type: ignore[attr-defined]


def sent(app: StoreApp, monkeypatch: pytest.MonkeyPatch, request_id: str, **options: Any) -> dict[str, Any]:
    """Return the options with which the message of a request is sent."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(StoreTask, "apply_async", lambda _self, *_args, **given: found.update(given))
    reference = Reference(v=2, request_id=request_id, payload="p", digest="d", lanes=1, source="shop")
    app.tasks["mdstore.ingest"].publish(reference, **options)
    return found


def test_the_result_of_a_request_without_a_task_of_its_own_is_not_stored(
    app: StoreApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its message tells its size. A caller of Celery gets the result, and keeps his own headers."""
    assert sent(app, monkeypatch, "r", operations=3) == {
        "task_id": "r", "MessageGroupId": "shop", "ignore_result": True, "headers": {"operations": 3},
    }  # fmt: skip
    own = sent(app, monkeypatch, "r", operations=3, task_id="t", options={"headers": {"mine": 1}, "priority": 2})
    assert own == {
        "task_id": "t", "MessageGroupId": "shop", "priority": 2, "headers": {"mine": 1, "operations": 3},
    }  # fmt: skip
    assert "ignore_result" not in sent(app, monkeypatch, "r", options={})


def test_the_message_of_a_batch_does_not_tell_its_size(app: StoreApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs alone: its requests are side by side already."""
    assert "headers" not in sent(app, monkeypatch, new_batch_id())
