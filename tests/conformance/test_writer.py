"""The whole writer: lanes of every kind of operation, groups, redelivery, and operations that DynamoDB calls malformed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mdstore.model import Counts, Operation, OpName, Reason
from mdstore.store.entities import Entities
from mdstore.store.validation import MAX_INLINE, MAX_KEY_BYTES, Validator
from tests.conformance.bench import Bench
from tests.conformance.test_operations import STATES, cases, put_into_state

pytestmark = pytest.mark.large


@pytest.mark.double
def test_a_lane_of_every_case(bench: Bench) -> None:
    """Each operation gets its own outcome, whatever other operations its transaction has."""
    # One case per op, state and refusal suffices here; test_operations.py proves each condition one by one.
    table = list({(case[0], case[1], case[4]): case for case in cases()}.values())
    operations: list[Operation] = []
    for number, (op, state, expected, sequence, _) in enumerate(table):
        put_into_state(bench, state, f"k{number}")
        data = {"n": 2} if op in ("insert", "update", "patch", "upsert") else None
        operations.append(bench.op(op, f"k{number}", data=data, expect_version=expected, sequence=sequence))
    before = [bench.values(f"k{number}") for number in range(len(table))]

    counts = bench.apply(operations)
    wanted = {number: rejection for number, (*_, rejection) in enumerate(table) if rejection is not None}
    assert bench.refused() == wanted
    applied = Counter(str(op) for op, *_, rejection in table if rejection is None)
    assert counts == Counts(applied=dict(applied), refused=dict(Counter(map(str, wanted.values()))))
    for number, (op, state, *_, rejection) in enumerate(table):
        found = bench.values(f"k{number}")
        if rejection is not None or op == "check":
            assert found == before[number]
        else:
            assert found is not None
            assert found["version"] == (1 if STATES[state] is None else 4)
            assert found.get("data") == (None if op == "delete" else {"n": 2})


@pytest.mark.double
def test_the_operations_of_a_key_apply_in_their_order(bench: Bench) -> None:
    """In a lane, each operation on a key sees the record that the operation before it left."""
    counts = bench.apply(
        [
            bench.op("insert", "k", data={"n": 1, "gone": 1}),
            bench.op("patch", "k", data={"gone": None, "m": {"a": 1}}),
            bench.op("patch", "k", data={"m": {"b": 2}}, expect_version=2),
            bench.op("insert", "k", data={}),
            bench.op("delete", "k", expect_version=3),
            bench.op("patch", "k", data={}),
            bench.op("insert", "k", data={"again": True}),
            bench.op("check", "k", expect_version=5),
        ]
    )
    assert counts == Counts(
        applied={"check": 1, "delete": 1, "insert": 2, "patch": 2}, refused={"exists": 1, "missing": 1}
    )
    record = bench.records.get(bench.entity, "k")
    assert (record.version, record.data) == (5, {"again": True})


@pytest.mark.double
@pytest.mark.parametrize("bad", [0, 49, 98])
def test_a_group_applies_whole_or_not_at_all(bench: Bench, bad: int) -> None:
    """If one of a group's 99 operations is refused, none of the group applies, and operations outside of it do."""
    bench.apply([bench.op("insert", "existing", data={})], f"{bench.request_id}-before")
    group = [bench.op("insert", f"g{number}", data={"n": number}, group="g") for number in range(99)]
    group[bad] = bench.op("insert", "existing", data={}, group="g")
    counts = bench.apply([*group, bench.op("insert", "alone", data={})])
    assert counts == Counts(applied={"insert": 1}, refused={"exists": 1, "group_refused": 98})
    assert bench.refused()[bad] is Reason.EXISTS
    assert bench.records.look_up((bench.entity, f"g{number}") for number in range(99)) == {}
    assert bench.data("alone") == {}


@pytest.mark.double
def test_a_group_of_99_applies_in_one_transaction(bench: Bench) -> None:
    """A group of 99 operations applies in one transaction with one receipt."""
    group = [bench.op("upsert", f"g{number}", data={"n": number}, group="g") for number in range(99)]
    assert bench.apply(group) == Counts(applied={"upsert": 99})
    assert bench.receipt_numbers() == [0]
    assert len(bench.records.look_up((bench.entity, f"g{number}") for number in range(99))) == 99


MIXED = ("insert", "update", "patch", "upsert", "delete", "check", "insert", "upsert")


def mixed(bench: Bench) -> list[Operation]:
    """Return operations on 15 keys, several on each, of which some are refused."""
    operations = []
    for number in range(60):
        op: Any = MIXED[number * 7 % 8]
        data = {"n": number} if op in ("insert", "update", "patch", "upsert") else None
        operations.append(bench.op(op, f"k{number % 15}", data=data))
    return operations


def snapshot(bench: Bench) -> Mapping[Any, Any]:
    """Return the current records."""
    return bench.records.look_up((bench.entity, f"k{number}") for number in range(15))


@pytest.mark.double
def test_a_lane_that_is_delivered_again_changes_nothing(bench: Bench) -> None:
    """When a second and a third worker apply the lane again, counts, refusals and records stay the same."""
    reference = bench.request(mixed(bench))
    counts = bench.writer().apply_lane(reference, 0).counts
    assert counts.total == 60
    assert counts.refused
    before, refused = snapshot(bench), bench.refused()
    for _ in range(2):
        assert bench.writer().apply_lane(reference, 0).counts == counts
    assert (snapshot(bench), bench.refused()) == (before, refused)


def test_a_request_of_one_lane_is_completed_in_the_ledger(bench: Bench) -> None:
    """A request of one lane is applied and completed, and applying it again returns the same state."""
    reference = bench.request(mixed(bench))
    completed = bench.writer().apply_request(reference)
    assert completed.counts.total == 60
    assert bench.writer().apply_request(reference) == completed == bench.ledger.get(bench.request_id)


# -- operations that the validator would refuse


class LaxValidator(Validator):
    """A validator that checks no data, and gives the forged data in DynamoDB JSON of some keys."""

    def __init__(self, forged: Mapping[str, bytes]) -> None:
        super().__init__(entities=Entities(), max_record_bytes=2**20)
        self._forged = forged

    def check(self, operation: Operation, size: int) -> tuple[Operation, bytes]:  # noqa: ARG002
        return operation, self._forged.get(operation.key, b'{"M":{}}')


NOT_A_NUMBER = b'{"M":{"n":{"N":"1 2"}}}'
FORGED: list[tuple[OpName, str, bytes, Reason]] = [
    ("insert", "no-number", NOT_A_NUMBER, Reason.INVALID),
    ("upsert", "no-number", NOT_A_NUMBER, Reason.INVALID),
    ("insert", "39-digits", b'{"M":{"n":{"N":"%b"}}}' % (b"1" * 39), Reason.INVALID),
    ("upsert", "39-digits", b'{"M":{"n":{"N":"%b"}}}' % (b"1" * 39), Reason.INVALID),
    ("insert", "400-kb", b'{"M":{"n":{"S":"%b"}}}' % (b"x" * 400 * 2**10), Reason.TOO_LARGE),
    ("upsert", "400-kb", b'{"M":{"n":{"S":"%b"}}}' % (b"x" * 400 * 2**10), Reason.TOO_LARGE),
]


@pytest.mark.parametrize(
    ("op", "data", "reason"),
    [pytest.param(op, data, reason, id=f"{op}-{name}") for op, name, data, reason in FORGED],
)
def test_one_bad_record_never_blocks_the_others(bench: Bench, op: OpName, data: bytes, reason: Reason) -> None:
    """Operations that DynamoDB calls malformed are found and refused, whatever its answer's form; the others apply once."""
    operations = [bench.op(op, f"k{number}", data={}) for number in range(7)]
    reference = bench.request(operations, validator=LaxValidator({"k2": data, "k5": data}))
    counts = bench.writer().apply_lane(reference, 0).counts
    assert counts == Counts(applied={op: 5}, refused={str(reason): 2})
    assert bench.refused() == {2: reason, 5: reason}
    found = bench.records.look_up((bench.entity, f"k{number}") for number in range(7))
    assert sorted(key for _, key in found) == ["k0", "k1", "k3", "k4", "k6"]
    assert {record.version for record in found.values()} == {1}


def test_the_largest_data_of_an_item_is_kept_inline(bench: Bench) -> None:
    """Data at the validator's limit, with the longest key and all attributes, still fits in an item."""
    key = "k" * MAX_KEY_BYTES
    text = "x" * (MAX_INLINE - len("text") - 4)
    operations = [
        bench.op("insert", key, data={"text": text}, sequence=10**37),
        bench.op("upsert", key, data={"text": text}, sequence=10**37 + 1),
    ]
    assert bench.apply(operations[:1]) == Counts(applied={"insert": 1})
    item = bench.item(key)
    assert item is not None
    assert "data" in item
    assert bench.data(key) == {"text": text}


def large(bench: Bench, letter: str, size: int, count: int) -> Sequence[Operation]:
    """Return a group of records of `size` bytes each."""
    text = letter * (size // len(letter.encode()))
    return [bench.op("upsert", f"k{number}", data={"t": text}, group="g") for number in range(count)]


@pytest.mark.parametrize("letter", ["x", "é"], ids=["ascii", "two-bytes"])
def test_a_group_of_3_mb_is_one_transaction(bench: Bench, letter: str) -> None:
    """A group of 3 MB is one transaction that stores its data in items, whatever its text."""
    group = large(bench, letter, 30_000, 99)
    assert bench.apply(group) == Counts(applied={"upsert": 99})
    assert all(bench.item(f"k{number}") for number in (0, 98))


def test_a_group_over_4_mb_goes_to_s3(bench: Bench) -> None:
    """Of a group of 99 records of 100 KB, the largest are stored in S3, so the group is still one transaction."""
    group = large(bench, "x", 100_000, 99)
    assert bench.apply(group) == Counts(applied={"upsert": 99})
    records = bench.records.look_up((bench.entity, f"k{number}") for number in range(99))
    assert {len((record.data or {})["t"]) for record in records.values()} == {100_000}
