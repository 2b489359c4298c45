"""Each op has the effect, or the refusal, that the README's table says, by DynamoDB's own conditions."""

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
Rejection = Reason | None

#: States of a record before the operation. All that exist have version 3.
STATES: dict[str, dict[str, Any] | None] = {
    "absent": None,
    "live": {"version": 3, "data": {"n": 1}},
    "live-100": {"version": 3, "data": {"n": 1}, "sequence": 100},
    "tomb": {"version": 3, "deleted": True, "expires_at": 1_800_000_000},
    "tomb-100": {"version": 3, "deleted": True, "expires_at": 1_800_000_000, "sequence": 100},
}
#: The refusal of each op, or None if it applies, on an absent record, a live one and a tombstone.
PLAIN: dict[OpName, tuple[Rejection, Rejection, Rejection]] = {
    "insert": (None, EXISTS, None),
    "update": (MISSING, None, MISSING),
    "patch": (MISSING, None, MISSING),
    "upsert": (None, None, None),
    "delete": (MISSING, None, MISSING),
    "check": (MISSING, None, MISSING),
}
#: The same if the operation expects another version than the record's. An insert cannot expect a version.
WRONG_VERSION: dict[OpName, tuple[Rejection, Rejection, Rejection]] = {
    "update": (MISSING, MISMATCH, MISSING),
    "patch": (MISSING, MISMATCH, MISSING),
    "upsert": (MISMATCH, MISMATCH, MISMATCH),
    "delete": (MISSING, MISMATCH, MISSING),
    "check": (MISSING, MISMATCH, MISSING),
}
#: The same if the operation expects the record's version. A tombstone's version does not count.
RIGHT_VERSION: dict[OpName, tuple[Rejection, Rejection, Rejection]] = {
    op: (row[0], None, row[2]) for op, row in WRONG_VERSION.items()
}
EXPECTING = {None: PLAIN, 3: RIGHT_VERSION, 2: WRONG_VERSION}

Case = tuple[OpName, str, int | None, int | None, Rejection]


def cases() -> Iterator[Case]:
    """Yield every op on every state, with every expected version and sequence that it may have, and its refusal."""
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
    """Return the id of a case: op, state, `v` and the expected version, `s` and the sequence."""
    op, state, expected, sequence, _ = case
    numbers = {"v": expected, "s": sequence}
    return " ".join([op, state, *(f"{letter}{number}" for letter, number in numbers.items() if number)])


def put_into_state(bench: Bench, state: str, key: str = "k") -> dict[str, Any] | None:
    """Put a record into `state`; returns its values."""
    found = STATES[state]
    if found is not None:
        bench.store(key, updated_at=1, updated_by="before", **found)
    return bench.values(key)


def rejection_of(bench: Bench, operation: Indexed) -> Rejection:
    """Send an operation with its receipt, as the writer does, until it applies or is refused; returns the reason, or None."""
    for over_tombstone in (False, True):
        reasons = send_with_receipt(bench, bench.action(operation, over_tombstone=over_tombstone))
        if not reasons:
            return None
        assert codes(reasons) == ["ConditionalCheckFailed", "None"]
        assert bench.receipt_numbers() == []
        rejection = explain_rejection(operation, reasons[0].get("Item"))
        if rejection is not None:
            return rejection[0]
        assert operation.op == "insert", "cancelled for no reason"
    raise AssertionError("an insert over a tombstone was cancelled twice")


def send_with_receipt(bench: Bench, action: dict[str, Any]) -> list[dict[str, Any]]:
    """Send an action with a receipt; returns the reasons of its cancellation, or none if it applied."""
    try:
        bench.send(action, bench.receipt_put())
    except TransactionCancelled as cancelled:
        return list(cancelled.reasons)
    return []


def after(op: OpName, before: dict[str, Any] | None, sequence: int | None) -> dict[str, Any] | None:
    """Return the record after the operation, without its key."""
    if op == "check":
        return before
    kept = {"sequence": before["sequence"]} if before and "sequence" in before else {}
    if sequence is not None:
        kept = {"sequence": sequence}
    state = {"deleted": True, "expires_at": TOMBSTONE_EXPIRES_AT} if op == "delete" else {"data": {"n": 2}}
    return {"version": before["version"] + 1 if before else 1, "updated_at": UPDATED_AT, **state, **kept}


#: All ops but `patch`. The writer decides itself whether a patch is refused, and writes it with another condition.
WRITTEN = [case for case in cases() if case[0] != "patch"]


@pytest.mark.parametrize("case", WRITTEN, ids=named)
def test_an_operation_applies_or_is_refused(bench: Bench, case: Case) -> None:
    """An operation has its whole effect and a receipt, or a reason and no effect at all."""
    op, state, expected, sequence, rejection = case
    before = put_into_state(bench, state)
    operation = bench.operation(op, "k", expect_version=expected, sequence=sequence)
    assert rejection_of(bench, operation) == rejection
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
    """A patch merged into another version, or into a record that no longer exists, is cancelled and shows the current item."""
    before = put_into_state(bench, state)
    operation = bench.operation("patch", "k", sequence=sequence)
    is_stale = state.endswith("-100") and sequence == 100
    reasons = send_with_receipt(bench, bench.action(operation, based_on=based_on))
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
    """Sequences are compared as numbers of 38 digits, not as text or floats."""
    bench.send(bench.act("insert", "k", sequence=stored))
    rejection = rejection_of(bench, bench.operation("upsert", "k", sequence=given))
    assert rejection == (STALE if given <= stored else None)


def test_versions_count_every_write(bench: Bench) -> None:
    """The version is 1 after the insert and one higher after each write, also after a delete and a re-insert."""
    operations: list[OpName] = ["insert", "update", "upsert", "delete", "insert", "upsert"]
    for number, op in enumerate(operations, start=1):
        action = bench.action(bench.operation(op, "k"), over_tombstone=number > 1)
        bench.send(action, bench.receipt_put(number))
        found = bench.values("k")
        assert found is not None
        assert found["version"] == number
    assert bench.receipt_numbers() == [1, 2, 3, 4, 5, 6]


def test_data_and_pointer_replace_each_other(bench: Bench) -> None:
    """A record has either data or a pointer to it, and a tombstone has neither."""
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
