"""What each op does to its record, or why it is refused: the README's table, as DynamoDB's own conditions have it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from mdstore.aws.blobs import Blob
from mdstore.errors import TransactionCancelled
from mdstore.model import OpName, Reason
from mdstore.store.operations import Indexed
from mdstore.store.writes import explain_rejection
from tests.conformance.bench import TOMBSTONE_EXPIRES_AT, UPDATED_AT, Bench, codes

pytestmark = pytest.mark.double

EXISTS, MISSING, MISMATCH, STALE = Reason.EXISTS, Reason.MISSING, Reason.VERSION_MISMATCH, Reason.STALE
Comparison = Reason | None

#: A record before the operation: all but the absent have version 3.
STATES: dict[str, dict[str, Any] | None] = {
    "absent": None,
    "live": {"version": 3, "data": {"n": 1}},
    "live-100": {"version": 3, "data": {"n": 1}, "sequence": 100},
    "tomb": {"version": 3, "deleted": True, "expires_at": 1_800_000_000},
    "tomb-100": {"version": 3, "deleted": True, "expires_at": 1_800_000_000, "sequence": 100},
}
#: What each op says of an absent record, a live one and a tombstone.
PLAIN: dict[OpName, tuple[Comparison, Comparison, Comparison]] = {
    "insert": (None, EXISTS, None),
    "update": (MISSING, None, MISSING),
    "patch": (MISSING, None, MISSING),
    "upsert": (None, None, None),
    "delete": (MISSING, None, MISSING),
    "check": (MISSING, None, MISSING),
}
#: The same where the operation expects another version than the record's. An insert cannot expect one.
WRONG_VERSION: dict[OpName, tuple[Comparison, Comparison, Comparison]] = {
    "update": (MISSING, MISMATCH, MISSING),
    "patch": (MISSING, MISMATCH, MISSING),
    "upsert": (MISMATCH, MISMATCH, MISMATCH),
    "delete": (MISSING, MISMATCH, MISSING),
    "check": (MISSING, MISMATCH, MISSING),
}
#: An expected version that is the record's: a tombstone's does not count.
RIGHT_VERSION: dict[OpName, tuple[Comparison, Comparison, Comparison]] = {
    op: (row[0], None, row[2]) for op, row in WRONG_VERSION.items()
}
EXPECTING = {None: PLAIN, 3: RIGHT_VERSION, 2: WRONG_VERSION}

Case = tuple[OpName, str, int | None, int | None, Comparison]


def cases() -> Iterator[Case]:
    """Every op on every state, with every expected version and sequence that it may have, and what it is told."""
    for op, state, expected, sequence in product(PLAIN, STATES, EXPECTING, (None, 99, 100, 101)):
        if op not in EXPECTING[expected] or (op == "check" and sequence is not None):
            continue
        # A delete with a sequence needs no record, like an upsert: it leaves a tombstone.
        row: OpName = "upsert" if op == "delete" and sequence is not None else op
        rejection = EXPECTING[expected][row][("absent", "live", "tomb").index(state.partition("-")[0])]
        if state.endswith("-100") and sequence is not None and sequence <= 100:
            rejection = STALE
        yield op, state, expected, sequence, rejection


def named(case: Case) -> str:
    """A case in words: op, state, `v` expected version, `s` sequence."""
    op, state, expected, sequence, _ = case
    numbers = {"v": expected, "s": sequence}
    return " ".join([op, state, *(f"{letter}{number}" for letter, number in numbers.items() if number)])


def placed(bench: Bench, state: str, key: str = "k") -> dict[str, Any] | None:
    """Put a record into `state`; returns its values."""
    found = STATES[state]
    if found is not None:
        bench.store(key, updated_at=1, updated_by="before", **found)
    return bench.values(key)


def settled(bench: Bench, operation: Indexed) -> Comparison:
    """Send an operation with its receipt until it applies or is refused, as the writer does; returns the refusal."""
    for over_tombstone in (False, True):
        reasons = sent(bench, bench.action(operation, over_tombstone=over_tombstone))
        if not reasons:
            return None
        assert codes(reasons) == ["ConditionalCheckFailed", "None"]
        assert bench.receipt_numbers() == []
        rejection = explain_rejection(operation, reasons[0].get("Item"))
        if rejection is not None:
            return rejection[0]
        assert operation.op == "insert", "cancelled for no reason"
    raise AssertionError("an insert over a tombstone was cancelled twice")


def sent(bench: Bench, action: dict[str, Any]) -> list[dict[str, Any]]:
    """The reasons against an action; none where it applied."""
    try:
        bench.send(action, bench.receipt_put())
    except TransactionCancelled as cancelled:
        return list(cancelled.reasons)
    return []


def after(op: OpName, before: dict[str, Any] | None, sequence: int | None) -> dict[str, Any] | None:
    """What the record becomes, less its key."""
    if op == "check":
        return before
    kept = {"sequence": before["sequence"]} if before and "sequence" in before else {}
    if sequence is not None:
        kept = {"sequence": sequence}
    state = {"deleted": True, "expires_at": TOMBSTONE_EXPIRES_AT} if op == "delete" else {"data": {"n": 2}}
    return {"version": before["version"] + 1 if before else 1, "updated_at": UPDATED_AT, **state, **kept}


#: A patch is judged before it is written, and then written on a condition of its own.
WRITTEN = [case for case in cases() if case[0] != "patch"]


@pytest.mark.parametrize("case", WRITTEN, ids=named)
def test_an_operation_applies_or_is_refused(bench: Bench, case: Case) -> None:
    """It has its whole effect and its receipt, or its reason and no effect at all."""
    op, state, expected, sequence, rejection = case
    before = placed(bench, state)
    operation = bench.operation(op, "k", expect_version=expected, sequence=sequence)
    assert settled(bench, operation) == rejection
    found = bench.values("k")
    if rejection is not None:
        assert found == before
        return
    assert bench.receipt_numbers() == [0]
    wanted = after(op, before, sequence)
    assert wanted is not None
    if op != "check":
        wanted |= {
            "pk": f"{bench.entity}#k",
            "entity": bench.entity,
            "key": "k",
            "updated_by": f"{bench.request_id}/0/0",
        }
    assert found == wanted


@pytest.mark.parametrize("sequence", [None, 100, 101])
@pytest.mark.parametrize("based_on", [2, 3, 4])
@pytest.mark.parametrize("state", STATES)
def test_a_patch_applies_to_the_version_that_it_was_merged_into(
    bench: Bench, state: str, based_on: int, sequence: int | None
) -> None:
    """A write that was computed from another version, or from what is gone, is cancelled with the item as it is now."""
    before = placed(bench, state)
    operation = bench.operation("patch", "k", sequence=sequence)
    is_stale = state.endswith("-100") and sequence == 100
    reasons = sent(bench, bench.action(operation, based_on=based_on))
    if state.startswith("live") and based_on == 3 and not is_stale:
        assert reasons == []
        found = bench.values("k")
        assert found is not None
        assert (found["version"], found["data"]) == (4, {"n": 2})
        return
    assert codes(reasons) == ["ConditionalCheckFailed", "None"]
    assert reasons[0].get("Item") == bench.item("k")
    assert bench.values("k") == before


@pytest.mark.parametrize(
    ("stored", "given"),
    [(0, -1), (-7, -8), (10**37, 10**37 - 1), (10**37 - 1, 10**37 - 1), (2**53 + 1, 2**53), (9, 9), (99, 100), (9, 10)],
)
def test_sequences_are_compared_exactly(bench: Bench, stored: int, given: int) -> None:
    """As numbers, neither as text nor as floats, to the last of 38 digits."""
    bench.send(bench.act("insert", "k", sequence=stored))
    rejection = settled(bench, bench.operation("upsert", "k", sequence=given))
    assert rejection == (STALE if given <= stored else None)


def test_versions_count_every_write(bench: Bench) -> None:
    """One at the insert, one more at each write, also through delete and re-insert."""
    operations: list[OpName] = ["insert", "update", "upsert", "delete", "insert", "upsert"]
    for number, op in enumerate(operations, start=1):
        action = bench.action(bench.operation(op, "k"), over_tombstone=number > 1)
        bench.send(action, bench.receipt_put(number))
        found = bench.values("k")
        assert found is not None
        assert found["version"] == number
    assert bench.receipt_numbers() == [1, 2, 3, 4, 5, 6]


def test_data_and_pointer_replace_each_other(bench: Bench) -> None:
    """A record has its data or a pointer to it, and a tombstone neither."""
    blob = Blob(key="blobs/x", digest="d", size=10)
    shapes: list[tuple[OpName, Any, str | None]] = [
        ("insert", blob, "blob"),
        ("update", None, "data"),
        ("upsert", blob, "blob"),
        ("delete", None, None),
        ("upsert", None, "data"),
    ]
    for number, (op, data, shape) in enumerate(shapes):
        bench.send(bench.act(op, "k", data=data), bench.receipt_put(number))
        found = bench.values("k")
        assert found is not None
        assert {"data", "blob", "deleted"} & found.keys() == {shape or "deleted"}
