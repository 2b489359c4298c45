"""Pages of outcomes, and what `verify` finds, over in-memory tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mdstore.aws.dynamodb.attributes import to_attribute
from mdstore.model import Counts, Operation, OpName, State
from mdstore.store.entities import Entities
from mdstore.store.ledger_items import LaneSummary, RequestStatus
from mdstore.store.outcomes import Outcomes
from mdstore.store.verify import Verification, Verifier
from tests.unit.bench import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()


def op(name: OpName, key: str = "k", sequence: int | None = None, **data: Any) -> Operation:
    return Operation(op=name, entity="e", key=key, data=None if name == "delete" else data, sequence=sequence)


def applied(bench: Bench, operations: Sequence[Operation], request_id: str = "r1") -> RequestStatus:
    """Apply all lanes of a request, and return its state as completed."""
    reference = bench.request(operations, request_id)
    counts = Counts()
    for lane in range(reference.lanes):
        counts += bench.writer().apply_lane(reference, lane).counts
    return RequestStatus(
        request_id=request_id, state=State.COMPLETED, source="shop", operations=len(operations), lanes=reference.lanes,
        reference=reference, early=Counts(), counts=counts, accepted_at=0,
    )  # fmt: skip


def verified(bench: Bench, request: RequestStatus) -> Verification:
    return Verifier(payloads=bench.payloads, ledger=bench.ledger, records=bench.records, entities=Entities()).verify(
        request
    )


def spoil(bench: Bench, **values: Any) -> None:
    """Change attributes of the record `k` without the store's knowledge."""
    bench.dynamo.items["records", "e#k", ""] |= {name: to_attribute(value) for name, value in values.items()}


HISTORIES: dict[str, tuple[list[Operation], Any]] = {
    "insert": ([op("insert", a=1)], {"a": 1}),
    "patches of an insert": ([op("insert", a=1), op("patch", b=2), op("patch", a=None)], {"b": 2}),
    "update": ([op("insert", a=1), op("update", b=2)], {"b": 2}),
    "again after a delete": ([op("insert", a=1), op("delete"), op("insert", c=3)], {"c": 3}),
}


@pytest.mark.parametrize(("operations", "data"), HISTORIES.values(), ids=HISTORIES)
def test_verify_compares_the_combined_effect_of_all_operations_on_a_key(
    bench: Bench, operations: list[Operation], data: Any
) -> None:
    """The unchanged record passes, and any additional, missing or changed field fails, whichever operation wrote it."""
    request = applied(bench, operations)
    assert bench.data("k") == data
    assert verified(bench, request).ok
    for wrong in ({**data, "x": 1}, {}, dict.fromkeys(data, 0)):
        spoil(bench, data=wrong)
        assert verified(bench, request).fault_count == 1


def test_verify_of_patches_checks_only_the_fields_they_name(bench: Bench) -> None:
    """The data before the patches is unknown, so only the fields that they set or removed can be wrong."""
    applied(bench, [op("insert", a=1, b={"c": 1})], "r0")
    request = applied(bench, [op("patch", b={"d": 2}), op("patch", b={"d": 3}, x=None)])
    assert verified(bench, request).ok
    spoil(bench, data={"a": 7, "b": {"c": 8, "d": 3}})
    assert verified(bench, request).ok
    for wrong in ({"b": {"c": 1, "d": 2}}, {"b": {"c": 1}}, {"b": {"d": 3}, "x": 0}):
        spoil(bench, data=wrong)
        assert verified(bench, request).fault_count == 1


@pytest.mark.parametrize(
    "operations",
    [
        [op("upsert", a=1), op("patch", b=2)],
        [op("patch", a=1), op("patch", b=2)],
        [op("insert", a=1), op("patch", b=2)],
    ],
    ids=["upsert", "patches", "insert"],
)
def test_verify_accepts_a_write_of_another_request_in_between(bench: Bench, operations: list[Operation]) -> None:
    """What the other request overwrote is not a fault; the last operation took effect on the data that it found."""
    if operations[0].op == "patch":
        applied(bench, [op("insert", z=0)], "r0")
    between = op("update", z=9)

    def interrupt(_: object) -> None:
        bench.dynamo.after = lambda _: None
        applied(bench, [between], "r2")

    bench.dynamo.after = interrupt
    request = applied(bench, operations)
    assert bench.data("k") == {"z": 9, "b": 2}
    assert verified(bench, request).ok


def test_verify_finds_vanished_records_and_writes_of_wrong_transactions(bench: Bench) -> None:
    """A missing record is a fault, and so is one that another transaction of the same request wrote."""
    request = applied(bench, [op("insert", a=1)])
    spoil(bench, updated_by="r1/0/7")
    found = verified(bench, request)
    assert (found.fault_count, found.superseded) == (1, 0)
    del bench.dynamo.items["records", "e#k", ""]
    assert verified(bench, request).faults == ["operation 0 (insert e/k): the record has vanished"]


def test_verify_counts_records_that_a_later_request_replaced(bench: Bench) -> None:
    """Such a record cannot be compared, so it is counted as superseded."""
    request = applied(bench, [op("insert", sequence=1, a=1)])
    applied(bench, [op("update", sequence=2, a=2)], "r2")
    found = verified(bench, request)
    assert (found.ok, found.superseded) == (True, 1)


def test_a_record_with_another_sequence_than_its_operation_is_a_fault(bench: Bench) -> None:
    """Equal data alone does not prove the operation's effect."""
    request = applied(bench, [op("insert", sequence=5, a=1)])
    spoil(bench, sequence=6)
    assert verified(bench, request).fault_count == 1


def test_a_page_reads_at_most_20_lanes(bench: Bench) -> None:
    """A page may be empty, but it ends; following the cursors finds the only refused operation."""
    bench.settings = bench.settings.model_copy(update={"lane_operations": 1})
    request = applied(bench, [op("insert", f"k{n}") for n in range(60)] + [op("update", "none")])
    outcomes = Outcomes(payloads=bench.payloads, ledger=bench.ledger)
    pages: list[list[str]] = []
    reads, cursor = [], None
    while cursor or not pages:
        bench.dynamo.calls.clear()
        page, cursor = outcomes.page(request, only="refused", cursor=cursor)
        pages.append([one.key for one in page])
        reads.append(len(bench.dynamo.calls))
    assert [key for page in pages for key in page] == ["none"]
    assert len(pages) == -(-(request.lanes + 1) // 20) > 1
    assert max(reads) <= 20  # each read gets the receipts of one lane
    whole, cursor = outcomes.page(request, limit=3)
    assert (len(whole), bool(cursor)) == (3, True)


def test_operations_that_a_failed_lane_did_not_apply_have_failed(bench: Bench) -> None:
    """Operations without a receipt in a failed lane have failed; those of the completed lane are not reported."""
    bench.settings = bench.settings.model_copy(update={"lane_operations": 1})
    operations = [op("insert", f"k{n}") for n in range(8)]
    reference = bench.request(operations)
    for lane, state in enumerate((State.FAILED, State.COMPLETED)):
        bench.ledger.close_lane("r1", LaneSummary(lane=lane, state=state, counts=Counts(), started_at=0, finished_at=0))
    request = RequestStatus(
        request_id="r1", state=State.FAILED, source="shop", operations=8, lanes=reference.lanes,
        reference=reference, early=Counts(), counts=Counts(), accepted_at=0,
    )  # fmt: skip
    found = Outcomes(payloads=bench.payloads, ledger=bench.ledger).page(request)[0]
    assert {one.key for one in found} == {one.key for one in bench.payloads.lane(reference, 0)}
    assert {one.outcome for one in found} == {"failed"}
