"""Writes of one item: the conditions that decide a request's state, and the values that an update returns."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import pytest

from mdstore.aws.dynamodb.attributes import from_item, to_item
from mdstore.errors import ConditionFailed, RequestRejected
from mdstore.model import Counts, Reference, State
from mdstore.queue import create_app
from mdstore.queue.results.chord_state import ChordStates
from mdstore.queue.results.shard import Part
from mdstore.store.ledger_items import LaneSummary, RequestStatus
from tests.conformance.bench import Bench
from tests.waiting import until


def reference(bench: Bench, lanes: int = 2) -> Reference:
    """Return the reference that a message of the request would hold."""
    return Reference(v=1, request_id=bench.request_id, payload="p", digest="d", lanes=lanes, source="shop")


def summary(lane: int, state: State = State.COMPLETED, **applied: int) -> LaneSummary:
    """Return a lane's summary, with times that are exact in milliseconds."""
    return LaneSummary(
        lane=lane, state=state, counts=Counts(applied=applied), started_at=1.5, finished_at=2.25, error=""
    )


def note(
    bench: Bench, known: Reference, *, operations: int, refused: dict[str, int], replaces: str = ""
) -> RequestStatus | None:
    """Note a request, and return the one that has its id, if any."""
    task = bench.ledger.note_task(
        bench.request_id, known, content="digest", operations=operations, refused=refused, replaces=replaces
    )
    return bench.ledger.run([task])[0]


# -- the ledger


def test_a_request_goes_through_its_states(bench: Bench) -> None:
    """A request is accepted once, runs, and is completed by its lanes' summaries; each change returns the whole request."""
    known = reference(bench)
    assert note(bench, known, operations=5, refused={"invalid": 1}) is None
    accepted = note(bench, known, operations=5, refused={"invalid": 1})
    assert accepted == bench.ledger.get(bench.request_id)
    assert (accepted.state, accepted.content) == (State.ACCEPTED, "digest")
    running = bench.ledger.start(known, operations=5, refused={"invalid": 1})
    assert (running.state, running.operations, running.source) == (State.RUNNING, 5, "shop")
    assert running == bench.ledger.get(bench.request_id)
    assert bench.ledger.start(known, operations=5, refused={}) == running

    assert bench.ledger.finish(bench.request_id).state is State.RUNNING
    bench.ledger.close_lane(bench.request_id, summary(0, insert=2))
    bench.ledger.close_lane(bench.request_id, summary(1, upsert=2))
    completed = bench.ledger.finish(bench.request_id)
    assert completed.counts == Counts(applied={"insert": 2, "upsert": 2}, refused={"invalid": 1})
    assert completed == bench.ledger.get(bench.request_id)
    assert bench.ledger.finish(bench.request_id) == completed
    bench.ledger.fail(bench.request_id, "too late")
    assert bench.ledger.start(known, operations=5, refused={}) == completed


def test_a_worker_may_record_a_request_first(bench: Bench) -> None:
    """If a worker has started a request, the producer's later record of its acceptance changes nothing."""
    running = bench.ledger.start(reference(bench), operations=5, refused={})
    assert note(bench, reference(bench), operations=5, refused={}) == running
    assert bench.ledger.get(bench.request_id) == running


def test_a_request_of_one_lane_is_completed_in_one_write(bench: Bench) -> None:
    """A request without an earlier record becomes completed in one write, and a repeat changes nothing."""
    known = reference(bench, lanes=1)
    completed = bench.ledger.complete(known, operations=2, refused={}, lane=summary(0, insert=2))
    assert (completed.state, completed.started_at, completed.finished_at) == (State.COMPLETED, 1.5, 2.25)
    assert bench.ledger.complete(known, operations=2, refused={}, lane=summary(0, insert=1)) == completed


def test_a_failed_request_may_be_completed(bench: Bench) -> None:
    """A failed request that is completed loses its error."""
    known = reference(bench, lanes=1)
    note(bench, known, operations=2, refused={})
    bench.ledger.fail(bench.request_id, "table missing")
    assert bench.ledger.get(bench.request_id).error == "table missing"
    completed = bench.ledger.complete(known, operations=2, refused={}, lane=summary(0, insert=2))
    assert (completed.state, completed.error) == (State.COMPLETED, "")


def test_a_completed_lane_stays_completed(bench: Bench) -> None:
    """A failed summary of a lane is replaced, and a completed one is not."""
    note(bench, reference(bench), operations=5, refused={})
    for lane in (summary(0, State.FAILED), summary(0, insert=1), summary(0, State.FAILED), summary(0, insert=9)):
        bench.ledger.close_lane(bench.request_id, lane)
    assert bench.ledger.lanes(bench.request_id) == [summary(0, insert=1)]


# -- conditions


@pytest.mark.parametrize("operation", ["PutItem", "UpdateItem", "DeleteItem"])
def test_a_write_whose_condition_fails_writes_nothing(bench: Bench, operation: str) -> None:
    """The error is ConditionFailed, and a refused update does not create an empty item."""
    body: dict[str, Any] = {"TableName": bench.table, "ConditionExpression": "attribute_exists(#a) AND #a = :a"}
    body["ExpressionAttributeNames"] = {"#a": "state"}
    body["ExpressionAttributeValues"] = {":a": {"S": "x"}}
    key = bench.key("k")
    body |= {"Item": key} if operation == "PutItem" else {"Key": key}
    if operation == "UpdateItem":
        body["UpdateExpression"] = "SET #a = :a"
    with pytest.raises(ConditionFailed):
        bench.dynamo.call(operation, body)
    assert bench.item("k") is None

    bench.store("k", state="y")
    with pytest.raises(ConditionFailed):
        bench.dynamo.call(operation, body)
    found = bench.values("k")
    assert found is not None
    assert found["state"] == "y"

    bench.store("k", state="x")
    bench.dynamo.call(operation, body)


@pytest.mark.parametrize(
    ("condition", "passes"),
    [
        ("attribute_not_exists(pk) OR #s IN (:x, :y)", True),
        ("#s IN (:y, :z)", False),
        ("NOT (attribute_exists(pk))", False),
        ("NOT (attribute_exists(pk) AND #s = :y)", True),
        ("#s <> :y", True),
        ("#s <> :x", False),
        ("NOT (attribute_exists(#missing) AND #missing = :x)", True),
        ("#missing = :x", False),
        ("#missing < :x", False),
        ("attribute_not_exists(#missing) AND (#s = :y OR #s = :x)", True),
        ("attribute_not_exists(#missing) AND #s = :y OR #s = :x", True),
        ("attribute_exists(#missing) AND #s = :y", False),
    ],
)
def test_conditions_mean_what_they_say(bench: Bench, condition: str, passes: bool) -> None:
    """AND binds before OR, NOT negates a group, and comparisons with a missing attribute are false."""
    bench.store("k", state="x")
    names = {"#s": "state", "#missing": "missing"}
    values = to_item({":x": "x", ":y": "y", ":z": "z"})
    body: dict[str, Any] = {"TableName": bench.table, "Key": bench.key("k"), "ConditionExpression": condition}
    body["UpdateExpression"] = "SET done = :done"
    body["ExpressionAttributeNames"] = {name: real for name, real in names.items() if name in condition}
    body["ExpressionAttributeValues"] = {name: value for name, value in values.items() if name in condition}
    body["ExpressionAttributeValues"] |= {":done": {"BOOL": True}}
    if not body["ExpressionAttributeNames"]:
        del body["ExpressionAttributeNames"]
    try:
        bench.dynamo.call("UpdateItem", body)
    except ConditionFailed:
        assert not passes
    else:
        assert passes


# -- updates


def update(bench: Bench, expression: str, values: dict[str, Any], **names: str) -> dict[str, Any]:
    """Update one record; returns the new values that DynamoDB answers with."""
    body: dict[str, Any] = {
        "TableName": bench.table,
        "Key": bench.key("k"),
        "UpdateExpression": expression,
        "ExpressionAttributeValues": values,
        "ReturnValues": "ALL_NEW",
    }
    if names:
        body["ExpressionAttributeNames"] = {f"#{name}": real for name, real in names.items()}
    return from_item(bench.dynamo.call("UpdateItem", body)["Attributes"])


def test_an_update_returns_the_whole_item(bench: Bench) -> None:
    """`ALL_NEW` includes the key and the attributes that the update did not change."""
    bench.store("k", kept={"a": [1]}, changed=1, gone=1)
    expression = "SET changed = :two, fresh = if_not_exists(fresh, :two), kept = if_not_exists(kept, :two) REMOVE gone"
    found = update(bench, expression, to_item({":two": 2}))
    assert found == bench.values("k")
    assert {name: found.get(name) for name in ("kept", "changed", "fresh", "gone")} == {
        "kept": {"a": [1]},
        "changed": 2,
        "fresh": 2,
        "gone": None,
    }


def test_an_update_reads_the_values_before_it(bench: Bench) -> None:
    """Each part of an expression reads the item as it was before the update, whatever the order of the parts."""
    bench.store("k", a=1, b=10)
    found = update(bench, "SET a = b, b = a, c = if_not_exists(c, :zero) + :one", to_item({":zero": 0, ":one": 1}))
    assert (found["a"], found["b"], found["c"]) == (10, 1, 1)


def test_parts_of_a_chord_are_a_set(bench: Bench) -> None:
    """ADD creates the set and adds each part once; DELETE removes parts, and a set that becomes empty disappears."""
    parts = {":p": {"NS": ["3"]}}
    assert update(bench, "ADD parts :p", parts)["parts"] == {3}
    assert update(bench, "ADD parts :p", parts)["parts"] == {3}
    assert update(bench, "ADD parts :p", {":p": {"NS": ["1", "3", "2"]}})["parts"] == {1, 2, 3}
    assert update(bench, "DELETE parts :p", parts)["parts"] == {1, 2}
    assert update(bench, "DELETE parts :p", parts)["parts"] == {1, 2}
    assert "parts" not in update(bench, "DELETE parts :p", {":p": {"NS": ["1", "2"]}})
    assert "parts" not in update(bench, "DELETE parts :p", parts)


def test_a_part_is_recorded_in_one_update(bench: Bench) -> None:
    """One expression may have SET and ADD, whether the item exists or not, and ADD works on a set of bytes too."""
    values: dict[str, Any] = {":p": {"BS": ["AAEC"]}, ":at": {"N": "9"}}
    assert update(bench, "SET #at = :at ADD #ok :p", values, at="at", ok="ok")["at"] == 9
    values = {":p": {"BS": ["AAEC", "AAED"]}, ":at": {"N": "10"}}
    found = update(bench, "SET #at = :at ADD #ok :p", values, at="at", ok="ok")
    assert (found["at"], sorted(found["ok"])) == (10, [b"\x00\x01\x02", b"\x00\x01\x03"])


def test_adding_a_set_to_a_text_is_refused(bench: Bench) -> None:
    """Adding a set to an attribute that is not a set is malformed."""
    bench.store("k", parts="text")
    with pytest.raises(RequestRejected, match="ValidationException"):
        update(bench, "ADD parts :p", {":p": {"NS": ["1"]}})


def test_the_result_backend_keeps_its_promises(bench: Bench) -> None:
    """Stored values are returned, unknown keys give None, and a success is never replaced."""
    backend: Any = create_app(bench.target.settings).backend
    keys = [f"{bench.entity}-{number}" for number in range(120)]
    for key in keys[:110]:
        backend.set(key, f"ü {key}")
    assert backend.mget([*keys, keys[0]]) == [*(f"ü {key}" for key in keys[:110]), *[None] * 10, f"ü {keys[0]}"]
    backend.delete(keys[0])
    assert backend.get(keys[0]) is None
    for state, value in (("STARTED", None), ("SUCCESS", 1), ("FAILURE", ValueError())):
        backend.store_result(keys[0], value, state)
    assert backend.get_result(keys[0]) == 1


def test_the_chord_state_keeps_its_promises(bench: Bench) -> None:
    """Each part counts once, over several shards, and a chord is in the index of open chords until it is dispatched."""
    chord_states = ChordStates(
        dynamo=bench.dynamo, table=bench.target.settings.results_table, retention=86_400, shard=2
    )
    name = bench.entity
    chord_states.open(name, callback="{}")
    chord_states.open(name, callback="another")
    chord_states.resize(name, 3)
    chord_states.extend(name, "added")
    parts = [Part(0, str(uuid4())), Part(1, "one"), Part(2, str(uuid4()))]
    for _ in range(2):
        for part in parts:
            assert not chord_states.record_part(name, part, ok=part.index != 1).complete
    later = time.time() + 65
    until(lambda: name in chord_states.undispatched(later))
    found = chord_states.read(name, later)
    assert found is not None
    assert (found.size, found.complete) == (3, False)
    assert chord_states.read(name, later) is None
    until(lambda: name not in chord_states.undispatched(later))
    done = chord_states.record_part(name, Part(0, "added"), ok=True)
    assert (done.complete, done.clean, done.given) == (True, False, {"callback": "{}"})
    assert chord_states.returned(name).failed == [parts[1]]
    assert chord_states.record_part(name, parts[1], ok=True).clean
    # An earlier call has claimed the dispatch.
    assert not chord_states.record_part(name, Part(0, "added"), ok=True).complete
    chord_states.mark_dispatched(name, "success")
    chord_states.mark_dispatched(name, "failure")
    until(lambda: name not in chord_states.undispatched(later + 1_000))
    assert chord_states.read(name, later + 1_000) is None
    assert chord_states.counted(name).dispatched == "success"
    with pytest.raises(ConditionFailed):
        chord_states.extend("nobody", "added")
