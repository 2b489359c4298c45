"""The writer's steps over in-memory tables: refusals, receipts of earlier deliveries, lost responses and malformed calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.errors import RequestRejected, TransactionCancelled, Unavailable
from mdstore.model import Counts, Operation, OpName, Reason, Refusal, State
from mdstore.store.ledger_items import Receipt
from mdstore.store.operations import Indexed
from mdstore.store.packing import Transaction
from mdstore.store.writer import count, remove_refused
from tests.unit.bench import Bench
from tests.unit.fakes import Actions


def item(index: int, group: str | None = None, op: OpName = "upsert") -> Indexed:
    return Indexed(index=index, op=op, entity="e", key=f"k{index}", group=group)


def refusal(index: int, reason: Reason = Reason.MISSING) -> Refusal:
    return Refusal(index=index, reason=reason)


def test_without_refusals_nothing_is_removed() -> None:
    """All operations remain."""
    pending = [item(0), item(1, "g")]
    assert remove_refused(pending, []) == (pending, [])


def test_a_refusal_removes_only_its_own_operation() -> None:
    """An operation without a group is alone, even among others without a group."""
    pending = [item(0), item(1), item(2, "g")]
    assert remove_refused(pending, [refusal(1)]) == ([pending[0], pending[2]], [refusal(1)])


def test_a_refusal_removes_its_group() -> None:
    """The other operations of the group are refused too, each with a reason. A refusal that was found keeps its own reason."""
    pending = [item(0, "g"), item(1, "h"), item(2, "g"), item(3, "g"), item(4)]
    found = [refusal(2), refusal(3, Reason.EXISTS)]
    rest, out = remove_refused(pending, found)
    assert [one.index for one in rest] == [1, 4]
    assert {one.index: one.reason for one in out} == {
        0: Reason.GROUP_REFUSED,
        2: Reason.MISSING,
        3: Reason.EXISTS,
    }
    (other,) = [one for one in out if one.index == 0]
    assert (other.op, other.entity, other.key) == ("upsert", "e", "k0")
    assert other.detail == "another operation of the group was refused"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([None, "g", "h"]), max_size=12), st.sets(st.integers(0, 11)))
def test_remove_refused_splits_the_operations(groups: list[str | None], indexes: set[int]) -> None:
    """Each operation remains or is refused, once, and no group is split."""
    pending = [item(index, group) for index, group in enumerate(groups)]
    rest, out = remove_refused(pending, [refusal(index) for index in sorted(indexes) if index < len(pending)])
    assert sorted([one.index for one in rest] + [one.index for one in out]) == list(range(len(pending)))
    refused = {one.index for one in out}
    sides = {(one.group, one.index in refused) for one in pending if one.group}
    assert len({group for group, _ in sides}) == len(sides)


def test_counts_come_from_receipts() -> None:
    """An operation that its receipt does not refuse was applied. Refusals of the plan are counted too."""
    transactions = [
        Transaction(number=0, operations=(item(0), item(1, op="insert"), item(2))),
        Transaction(number=1, operations=(), refused=(refusal(3, Reason.INVALID),)),
    ]
    receipts = [Receipt(number=0, refused=(refusal(2),)), Receipt(number=1, refused=(refusal(3, Reason.INVALID),))]
    counts = count(transactions, receipts)
    assert counts == Counts(applied={"insert": 1, "upsert": 1}, refused={"invalid": 1, "missing": 1})
    assert counts.total == 4


def test_each_transaction_must_have_a_receipt() -> None:
    """A missing receipt is an error, and not a smaller count."""
    with pytest.raises(ValueError, match="shorter"):
        count([Transaction(number=0, operations=(item(0),))], [])


# -- the writer as a whole


@pytest.fixture
def bench() -> Bench:
    return Bench()


def op(
    name: OpName, key: str, *, n: int | None = None, group: str | None = None, version: int | None = None
) -> Operation:
    data = {"n": n} if n is not None else None
    return Operation(op=name, entity="e", key=key, data=data, group=group, expect_version=version)


def test_a_lane_applies_its_operations_in_order(bench: Bench) -> None:
    """Each operation has its effect or its reason, groups apply as one, and the summary counts them."""
    counts = bench.apply([
        op("insert", "a", n=1),
        op("insert", "a", n=2),
        op("patch", "a", n=3),
        op("update", "missing", n=1),
        op("insert", "b", n=1, group="g"),
        op("check", "c", group="g"),
        op("insert", "d", n=1),
        op("delete", "d"),
        op("insert", "d", n=2),
        op("update", "a", n=9, version=7),
    ])  # fmt: skip
    assert counts == Counts(
        applied={"delete": 1, "insert": 3, "patch": 1},
        refused={"exists": 1, "group_refused": 1, "missing": 2, "version_mismatch": 1},
    )
    assert bench.data("a") == {"n": 3}
    assert bench.data("d") == {"n": 2}
    assert bench.records.get("e", "d").version == 3
    assert ("e", "b") not in bench.records.look_up([("e", "b")])
    assert bench.refused() == {
        1: (Reason.EXISTS, "the record has version 1"),
        3: (Reason.MISSING, "there is no record"),
        4: (Reason.GROUP_REFUSED, "another operation of the group was refused"),
        5: (Reason.MISSING, "there is no record"),
        9: (Reason.VERSION_MISMATCH, "the record has version 2"),
    }


def test_a_second_delivery_changes_nothing_and_counts_the_same(bench: Bench) -> None:
    """Transactions with a receipt are not applied again: no record changes, and the first delivery's outcomes are counted."""
    operations = [op("insert", f"k{number}", n=number) for number in range(250)] + [op("insert", "k0", n=0)]
    first = bench.apply(operations)
    before, calls = bench.snapshot(), len(bench.dynamo.attempts)
    assert bench.apply(operations) == first
    assert bench.snapshot() == before
    assert len(bench.dynamo.attempts) == calls + 1  # the first cancelled transaction reveals the earlier delivery
    assert bench.dynamo.calls.count("Query") == 1


def test_the_refusals_of_an_earlier_delivery_are_kept(bench: Bench) -> None:
    """The receipt decides, even if the operation would succeed now."""
    operations = [op("update", "a", n=1)]
    assert bench.apply(operations).refused == {"missing": 1}
    bench.apply([op("insert", "a", n=5)], "r2")
    assert bench.apply(operations).refused == {"missing": 1}
    assert bench.data("a") == {"n": 5}


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_next_delivery_completes_the_lane_of_a_dead_worker(bench: Bench, moment: str, cut: int) -> None:
    """Each operation is applied once, whichever transaction the worker died at, before or after it took effect."""
    operations = [op("upsert" if number < 150 else "patch", f"k{number % 150}", n=number) for number in range(300)]
    seen = 0

    def die(_: Actions) -> None:
        nonlocal seen
        seen += 1
        if seen == cut:
            raise Unavailable("gone", code="x")

    setattr(bench.dynamo, moment, die)
    with pytest.raises(Unavailable):
        bench.apply(operations)
    assert bench.apply(operations) == Counts(applied={"patch": 150, "upsert": 150})
    records = bench.records.look_up(("e", f"k{number}") for number in range(150))
    assert {record.version for record in records.values()} == {2}
    assert [records["e", f"k{number}"].data for number in range(150)] == [{"n": 150 + number} for number in range(150)]


def test_contention_is_raised(bench: Bench) -> None:
    """An operation that DynamoDB could not apply now gets no outcome, no receipt and no summary."""

    def busy(_: Actions) -> None:
        raise Unavailable("busy", code="TransactionConflict")

    bench.dynamo.before = busy
    with pytest.raises(Unavailable) as caught:
        bench.apply([op("insert", "a", n=1)])
    assert caught.value.code == "TransactionConflict"
    assert bench.dynamo.items == {}


def test_contention_beside_a_refusal_is_not_refused(bench: Bench) -> None:
    """An operation that was only in conflict is sent again without the refused one."""
    sent = 0

    def conflict(actions: Actions) -> None:
        nonlocal sent
        sent += 1
        if sent == 1:
            codes = ["TransactionConflict", "ConditionalCheckFailed", "None"]
            assert len(actions) == len(codes)
            raise TransactionCancelled([{"Code": code} for code in codes])

    bench.dynamo.before = conflict
    counts = bench.apply([op("upsert", "a", n=1), op("update", "b", n=1)])
    assert counts == Counts(applied={"upsert": 1}, refused={"missing": 1})


def malformed(*keys: str) -> Callable[[Actions], None]:
    """Return a hook that rejects each transaction with one of `keys`, as DynamoDB rejects a malformed call."""

    def reject(actions: Actions) -> None:
        for action in actions:
            body = next(iter(action.values()))
            if (body.get("Key") or body["Item"])["pk"]["S"] in {f"e#{key}" for key in keys}:
                raise RequestRejected("one or more parameter values were invalid", code="ValidationException")

    return reject


@pytest.mark.parametrize(
    "bad", [["k0"], ["k6"], ["k3"], ["k2", "k5"], ["k0", "k1"], [f"k{number}" for number in range(7)]]
)
def test_a_malformed_operation_is_found_by_bisection(bench: Bench, bad: list[str]) -> None:
    """The operations that DynamoDB cannot accept are refused, the others apply, and the probes write nothing."""
    bench.dynamo.before = malformed(*bad)
    operations = [op("insert", f"k{number}", n=number) for number in range(7)]
    counts = bench.apply(operations)
    refused = {operations[index].key: found for index, found in bench.refused().items()}
    assert refused.keys() == set(bad)
    assert set(refused.values()) == {
        (Reason.INVALID, "DynamoDB: ValidationException: one or more parameter values were invalid")
    }
    applied = {"insert": 7 - len(bad)} if len(bad) < 7 else {}
    assert counts == Counts(applied=applied, refused={"invalid": len(bad)})
    assert len(bench.dynamo.written) == 1
    records = bench.records.look_up(("e", f"k{number}") for number in range(7))
    assert {key for _, key in records} == {f"k{number}" for number in range(7)} - set(bad)
    assert {record.version for record in records.values()} <= {1}


def test_a_malformed_operation_refuses_its_group(bench: Bench) -> None:
    """A group with a malformed operation does not apply at all."""
    bench.dynamo.before = malformed("b")
    counts = bench.apply([op("insert", "a", n=1, group="g"), op("insert", "b", n=1, group="g"), op("insert", "c", n=1)])
    assert counts == Counts(applied={"insert": 1}, refused={"group_refused": 1, "invalid": 1})
    assert {key for _, key in bench.records.look_up([("e", "a"), ("e", "b"), ("e", "c")])} == {"c"}


def test_a_rejection_that_no_operation_explains_fails_the_lane(bench: Bench) -> None:
    """If only the whole transaction is rejected, no operation is refused arbitrarily."""

    def too_many(actions: Actions) -> None:
        if len(actions) > 3:
            raise RequestRejected("too many", code="ValidationException")

    bench.dynamo.before = too_many
    with pytest.raises(RequestRejected):
        bench.apply([op("insert", f"k{number}", n=number) for number in range(3)])
    assert bench.dynamo.written == []


def test_a_patch_is_merged_again_if_its_record_has_changed(bench: Bench) -> None:
    """A write between reading and writing is not overwritten: the patch is merged into the new data."""
    bench.apply([op("insert", "a", n=1)])
    once = iter([True])

    def interfere(_: Actions) -> None:
        if next(once, False):
            bench.apply([op("update", "a", n=7)], "r3")

    bench.dynamo.before = interfere
    patch = Operation(op="patch", entity="e", key="a", data={"m": 2})
    assert bench.apply([patch], "r2") == Counts(applied={"patch": 1})
    assert bench.data("a") == {"n": 7, "m": 2}
    assert bench.records.get("e", "a").version == 3


def test_a_record_over_the_item_limit_is_stored_in_a_blob(bench: Bench) -> None:
    """Data of more than 400 KB is read back exactly, and the item holds only a pointer."""
    data = {"a": "ü" * 300_000}
    bench.apply([Operation(op="insert", entity="e", key="a", data=data)])
    assert bench.data("a") == data
    assert "data" not in bench.dynamo.items["records", "e#a", ""]


def test_a_lane_over_its_time_budget_is_interrupted(bench: Bench) -> None:
    """The time is checked between waves. Completed transactions keep their receipts, and the next delivery applies the rest."""

    def slow(_: Actions) -> None:
        bench.now += 31

    bench.dynamo.after = slow
    operations = [op("upsert", "a", n=1), op("patch", "a", n=2)]
    with pytest.raises(Unavailable) as caught:
        bench.apply(operations)
    assert caught.value.code == "LaneBudget"
    assert bench.data("a") == {"n": 1}
    bench.dynamo.after = lambda _: None
    assert bench.apply(operations) == Counts(applied={"patch": 1, "upsert": 1})
    assert bench.records.get("e", "a").version == 2


def test_a_lane_that_is_given_up_counts_its_receipts(bench: Bench) -> None:
    """Receipts decide what was applied and refused; the rest has failed, and so has the lane."""
    operations = [op("upsert", "a", n=1), op("patch", "a", n=2), op("patch", "a", n=3)]
    reference = bench.request(operations)
    done = iter([True])

    def die(_: Actions) -> None:
        if not next(done, False):
            raise Unavailable("gone", code="x")

    bench.dynamo.before = die
    with pytest.raises(Unavailable):
        bench.writer().apply_lane(reference, 0)
    summary = bench.writer().give_up(reference, 0, "table missing")
    assert summary.state is State.FAILED
    assert summary.counts == Counts(applied={"upsert": 1}, failed=2)
    assert summary.error == "table missing"


random_operations = st.lists(
    st.builds(
        op,
        st.sampled_from(["insert", "update", "patch", "upsert"]),
        st.sampled_from("abc"),
        n=st.integers(0, 9),
        group=st.sampled_from([None, None, "g", "h"]),
    )
    | st.builds(op, st.sampled_from(["delete", "check"]), st.sampled_from("abc")),
    max_size=12,
)


@settings(deadline=None, max_examples=80)
@given(random_operations, st.integers(1, 8), st.booleans())
def test_every_effect_happens_once_whenever_a_worker_dies(operations: list[Operation], cut: int, late: bool) -> None:
    """A lane that is interrupted at any call and delivered again leaves the same records and receipts as one that was not."""
    seen: set[tuple[str | None, str]] = set()
    lane = []
    for operation in operations:
        place = operation.group, operation.key
        if operation.group is None or place not in seen:
            lane.append(operation)
        seen.add(place)
    if not lane:
        return
    undisturbed, interrupted = Bench(), Bench()
    expected = undisturbed.apply(lane)
    calls = 0

    def die(_: Actions) -> None:
        nonlocal calls
        calls += 1
        if calls == cut:
            raise Unavailable("gone", code="x")

    setattr(interrupted.dynamo, "after" if late else "before", die)
    for _ in range(3):
        try:
            found = interrupted.apply(lane)
        except Unavailable:
            continue
    assert found == expected
    assert found.total == len(lane)
    assert interrupted.snapshot() == undisturbed.snapshot()
