"""The meaning of a sequence in a history whose messages arrive in any order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest

from mdstore.model import Operation, OpName, Reason
from mdstore.store.newest_wins import by_sequence
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.validation import FieldError
from tests.unit.bench import Bench


def op(name: OpName, sequence: int | None, **more: Any) -> Operation:
    data = None if name in ("delete", "check") else {"n": sequence}
    return Operation(**{"op": name, "entity": "e", "key": "k", "data": data, "sequence": sequence, **more})


def end_of(operations: Sequence[Operation], *, newest_wins: bool = False) -> tuple[Any, int | None, bool]:
    """Apply each operation as a request of its own; return data, sequence and whether the record is deleted."""
    bench = Bench()
    for number, operation in enumerate(operations):
        bench.apply([by_sequence(operation) if newest_wins else operation], f"r{number}")
    record = bench.records.look_up([("e", "k")])["e", "k"]
    return record.data, record.sequence, record.deleted


HISTORIES: dict[str, list[Operation]] = {
    "deleted at last": [op("upsert", 1), op("upsert", 2), op("delete", 3)],
    "deleted in between": [op("upsert", 1), op("delete", 2), op("upsert", 3)],
    "deleted twice": [op("delete", 1), op("upsert", 2), op("upsert", 3), op("delete", 4)],
    "nothing but deletes": [op("delete", 1), op("delete", 2), op("delete", 3)],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_in_any_order_the_highest_sequence_decides(name: str) -> None:
    """A delete that comes before its upsert leaves a tombstone, so the older upsert does not bring the record to life."""
    history = HISTORIES[name]
    last = history[-1]
    expected = last.data, last.sequence, last.op == "delete"
    assert {str(end_of(order)) for order in permutations(history)} == {str(expected)}


def test_a_delete_of_nothing_leaves_a_whole_tombstone() -> None:
    """It has the fields of any other tombstone, and its version counts on when the record comes."""
    bench = Bench()
    assert bench.apply([op("delete", 5)]).applied == {"delete": 1}
    tombstone = bench.records.look_up([("e", "k")])["e", "k"]
    assert (tombstone.entity, tombstone.key, tombstone.version, tombstone.sequence, tombstone.deleted) == (
        "e",
        "k",
        1,
        5,
        True,
    )
    (item,) = (item for place, item in bench.dynamo.items.items() if place[0] == "records")
    assert "expires_at" in item
    assert bench.apply([op("upsert", 4)], "r2").refused == {Reason.STALE: 1}
    assert bench.apply([op("insert", 6)], "r3").applied == {"insert": 1}
    assert bench.records.get("e", "k").version == 2


def test_a_delete_without_a_sequence_still_needs_a_record() -> None:
    """Nothing says which of two operations is newer, so a delete of nothing is a mistake that its sender should hear of."""
    assert Bench().apply([op("delete", None)]).refused == {Reason.MISSING: 1}
    assert Bench().apply([op("delete", 1, expect_version=1)]).refused == {Reason.VERSION_MISMATCH: 1}


@pytest.mark.parametrize(
    ("history", "ends"),
    [
        ([op("insert", 1), op("update", 2)], {(2, 2), (1, 1)}),
        ([op("upsert", 1), op("insert", 2)], {(1, 1), (2, 2)}),
        ([op("upsert", 1), op("patch", 2)], {(2, 2), (1, 1)}),
    ],
    ids=["update", "insert", "patch"],
)
def test_other_operations_depend_on_what_is_there_when_they_arrive(
    history: list[Operation], ends: set[tuple[int, int]]
) -> None:
    """An update or a patch before its insert is missing, and an insert after an upsert exists: the older operation stays."""
    assert {(data["n"], sequence) for data, sequence, _ in map(end_of, permutations(history))} == ends


def test_with_newest_wins_inserts_and_updates_too_end_in_the_highest_sequence() -> None:
    """They become upserts, so nothing depends on what arrived before."""
    history = [op("insert", 1), op("update", 2), op("delete", 3), op("update", 4)]
    assert {str(end_of(order, newest_wins=True)) for order in permutations(history)} == {str(({"n": 4}, 4, False))}


@pytest.mark.parametrize(
    ("operation", "field"),
    [
        (op("patch", 1), "op"),
        (op("check", None, expect_version=1), "op"),
        (op("upsert", None), "sequence"),
        (op("upsert", 1, expect_version=1), "expect_version"),
        (op("delete", 1, group="g"), "group"),
    ],
)
def test_newest_wins_refuses_what_a_sequence_alone_cannot_decide(operation: Operation, field: str) -> None:
    """The refusal names the field, and says what is expected of it."""
    with pytest.raises(FieldError, match="newest_wins") as caught:
        by_sequence(operation)
    assert caught.value.field == field
    bench = Bench()
    builder = PayloadBuilder(validator=bench.validator, settings=bench.settings, newest_wins=True)
    refused = builder.add(operation)
    builder.close()
    assert refused is not None
    assert (refused.reason, refused.detail.partition(":")[0]) == (Reason.INVALID, field)
    assert builder.count == 1
