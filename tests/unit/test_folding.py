"""Folding: one write for operations on one key leaves what one write for each of them would have left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.errors import LaneUnfinished, RequestRejected
from mdstore.model import Counts, Operation, OpName, Reason, Reference
from mdstore.store import folding, packing
from mdstore.store.operations import Indexed
from mdstore.store.packing import MAX_ACTIONS, MAX_TRANSACTION_BYTES, pack
from tests.model.network import Tables
from tests.unit.bench import Bench
from tests.unit.fakes import Actions
from tests.unit.test_packing import Place, flat, lanes, place, refused_indexes

KEYS = "abc"
NO_DATA = ("delete", "check")
#: What a key may be before the lane: by name, the operations that make it so.
STARTS: dict[str, list[tuple[OpName, int | None]]] = {
    "absent": [],
    "live": [("insert", None)],
    "sequenced": [("insert", 4)],
    "tombstone": [("insert", None), ("delete", None)],
    "sequenced tombstone": [("insert", 3), ("delete", 4)],
}


def op(name: OpName, key: str, sequence: int | None = None, **fields: Any) -> Operation:
    given_data = fields.pop("data", {})
    data = None if name in NO_DATA else given_data
    return Operation(op=name, entity="e", key=key, data=data, sequence=sequence, **fields)


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Draw operations of which many fold: long stretches on few keys, mostly with ascending sequences or with none."""
    sequence = 0
    found: list[Operation] = []
    for index in range(draw(st.integers(1, 40))):
        name: OpName = draw(
            st.sampled_from(["upsert", "upsert", "update", "delete", "insert", "upsert", "patch", "check"])
        )
        sequence += draw(st.sampled_from([1, 1, 1, 0, -2]))
        key = draw(st.sampled_from(KEYS))
        version = draw(st.sampled_from([None] * 12 + [1, 2, 5])) if name != "insert" else None
        has_sequence = name != "check" and draw(
            st.sampled_from([False, True]) if index % 7 == 0 else st.just(key == "b")
        )
        grouped = draw(st.sampled_from([None] * 15 + ["g", "h"]))
        if any(one.group == grouped and one.key == key for one in found):
            grouped = None
        found.append(
            op(
                name,
                key,
                sequence if has_sequence else None,
                data={"n": index, f"m{index % 3}": index},
                expect_version=version,
                group=grouped,
            )
        )
    return found


starts = st.tuples(*[st.sampled_from(sorted(STARTS))] * len(KEYS))


class Death(Exception):
    """A worker dies."""


def applied(
    bench: Bench, reference: Reference, *, cuts: Sequence[int] = (), late: bool = False, turn_waves: int = 1_000
) -> Counts:
    """Apply a lane with a delivery for each cut, at whose transaction the worker dies, and then until the lane is done.

    A worker dies before its transaction takes effect, or with `late` after it. A message that is sent again for the other
    waves may come after a death, and is delivered twice.
    """
    bench.turn_waves = turn_waves
    had_turns = False
    for number in range(1_000):
        left = cuts[number] if number < len(cuts) else 10**9

        def die(_: Actions) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Death

        setattr(bench.dynamo, "after" if late else "before", die)
        try:
            return bench.writer().apply_lane(reference, 0, had_turns=had_turns).counts
        except Death:
            continue  # the same message again
        except LaneUnfinished:
            had_turns = True
    raise AssertionError("the lane does not end")


def left_by(
    operations: Sequence[Operation], start: Sequence[str], *, folds: bool, **how: Any
) -> tuple[Counts, dict[int, tuple[Reason, str]], dict[Place, Any]]:
    """Apply operations; returns their counts, their refusals and the records, tombstones included."""
    bench = Bench(Tables("odd"))
    for key, name in zip(KEYS, start, strict=True):
        for number, (made, sequence) in enumerate(STARTS[name]):
            bench.apply([op(made, key, sequence, data={"first": number})], f"{key}{number}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "MAX_REFUSAL_BYTES", 8 * 255)
        if not folds:
            patch.setattr(packing, "FIRST_FOLDED", 99)
        counts = applied(bench, bench.request(operations, "r"), **how)
    records = bench.records.look_up(("e", key) for key in KEYS)
    known = {key: (one.data, one.version, one.sequence, one.deleted) for key, one in records.items()}
    assert counts.total == len(operations)
    return counts, bench.refused("r"), known


@settings(deadline=None, max_examples=150)
@given(histories(), starts, st.lists(st.integers(0, 8), max_size=4), st.booleans(), st.sampled_from([1, 2, 1_000]))
def test_folded_operations_leave_what_single_ones_do(
    operations: list[Operation], start: tuple[str, ...], cuts: list[int], late: bool, turn_waves: int
) -> None:
    """Outcomes with their details, data, versions, sequences and tombstones are equal, whenever workers die in between."""
    expected = left_by(operations, start, folds=False)
    assert left_by(operations, start, folds=True) == expected
    assert left_by(operations, start, folds=True, cuts=cuts, late=late, turn_waves=turn_waves) == expected


@settings(deadline=None, max_examples=60)
@given(histories(), starts, st.lists(st.integers(0, 3), max_size=3), st.booleans(), st.integers(1, 2))
def test_turns_change_nothing(
    operations: list[Operation], start: tuple[str, ...], cuts: list[int], late: bool, turn_waves: int
) -> None:
    """A lane that goes back to the queue after each turn ends like one that is applied at once."""
    expected = left_by(operations, start, folds=False)
    assert left_by(operations, start, folds=False, cuts=cuts, late=late, turn_waves=turn_waves) == expected


# -- what is folded


@settings(deadline=None, max_examples=80)
@given(lanes)
def test_a_plan_with_folds_keeps_the_rules_of_a_plan(operations: list[Indexed]) -> None:
    """Each operation is planned once; those on a key are in order, and in one transaction only if they are one fold."""
    waves = pack(operations, 2)
    planned = [one.index for transaction in flat(waves) for one in transaction.operations]
    assert sorted([*planned, *refused_indexes(waves)]) == [one.index for one in operations]
    assert refused_indexes(waves) == refused_indexes(pack(operations, 1))
    on_key: dict[Place, list[int]] = {}
    for wave in waves:
        for transaction in wave:
            folds = folding.folds_of(transaction.operations)
            assert len(folds) <= MAX_ACTIONS
            assert len({place(fold[0]) for fold in folds}) == len(folds)
            assert transaction.is_folded == any(len(fold) > 1 for fold in folds)
            units = {one.group or place(one) for one in transaction.operations}
            assert len(units) == 1 or sum(fold[-1].size for fold in folds) <= MAX_TRANSACTION_BYTES
            for fold in folds:
                on_key.setdefault(place(fold[0]), []).extend(one.index for one in fold)
    assert all(indexes == sorted(indexes) for indexes in on_key.values())
    assert pack(list(operations), 2) == waves


def lane_of(operations: Sequence[Operation]) -> list[Indexed]:
    """Return a lane as a payload builder makes it, of operations whose data fits an item."""
    return [
        Indexed(
            index=index,
            op=one.op,
            entity=one.entity,
            key=one.key,
            sequence=one.sequence,
            expect_version=one.expect_version,
            group=one.group,
            **({} if one.data is None else {"data" if one.op == "patch" else "attribute": msgspec.Raw(b"{}")}),
        )
        for index, one in enumerate(operations)
    ]


def folded(*operations: Operation) -> list[list[int]]:
    """Return the indexes of each transaction's operations."""
    return [[one.index for one in transaction.operations] for transaction in flat(pack(lane_of(operations), 2))]


FOLDS: list[list[Operation]] = [
    [op("upsert", "a"), op("upsert", "a"), op("update", "a"), op("delete", "a"), op("insert", "a"), op("delete", "a")],
    [op("update", "a"), op("update", "a"), op("upsert", "a")],
    [op("delete", "a"), op("upsert", "a")],
    [op("upsert", "a", 1), op("update", "a", 2), op("delete", "a", 3), op("delete", "a", 9), op("upsert", "a", 10)],
    [op("upsert", "a", expect_version=4), op("upsert", "a")],
]
APART: list[list[Operation]] = [
    [op("upsert", "a"), op("insert", "a")],  # the insert is refused
    [op("delete", "a"), op("update", "a")],
    [op("delete", "a"), op("delete", "a")],
    [op("upsert", "a"), op("upsert", "a", expect_version=1)],
    [op("upsert", "a", 2), op("upsert", "a", 2)],  # the second is stale
    [op("upsert", "a", 2), op("upsert", "a")],
    [op("upsert", "a"), op("upsert", "a", 2)],
    [op("upsert", "a"), op("patch", "a")],
    [op("patch", "a"), op("upsert", "a")],
    [op("upsert", "a"), op("check", "a")],
    [op("upsert", "a", group="g"), op("upsert", "a")],
    [op("upsert", "a"), op("upsert", "a", group="g"), op("upsert", "a")],
]


@pytest.mark.parametrize("operations", FOLDS, ids=str)
def test_what_is_folded(operations: list[Operation]) -> None:
    """Each operation is certain to apply once the one before it has."""
    assert folded(*operations) == [list(range(len(operations)))]


@pytest.mark.parametrize("operations", APART, ids=str)
def test_what_is_not_folded(operations: list[Operation]) -> None:
    """Whether the second operation applies depends on more than the first, or it must not be written with it."""
    assert folded(*operations) == [[index] for index in range(len(operations))]


def test_payloads_of_version_1_are_not_folded() -> None:
    """Receipts that an earlier release wrote name transactions of one operation per key."""
    lane = lane_of([op("upsert", "a"), op("upsert", "a")])
    assert [len(wave) for wave in pack(lane, 1)] == [1, 1]
    assert [len(wave) for wave in pack(lane, 2)] == [1]


@pytest.fixture
def bench() -> Bench:
    return Bench(Tables("odd"))


def test_a_history_of_one_key_takes_few_writes(bench: Bench) -> None:
    """20,000 upserts of one key take under a hundred transactions, and leave the version that each of them adds to."""
    counts = bench.apply([op("upsert", "a", data={"n": number}) for number in range(20_000)])
    assert counts == Counts(applied={"upsert": 20_000})
    assert len(bench.dynamo.written) < 100
    record = bench.records.get("e", "a")
    assert (record.version, record.data) == (20_000, {"n": 19_999})


@pytest.mark.parametrize("key", ["a", "\U0001f600" * 256], ids=["short key", "long key"])
def test_a_receipt_holds_the_refusals_of_whole_folds(bench: Bench, key: str) -> None:
    """2,000 updates of a record that does not exist are refused; no receipt comes near the 400 KB of an item."""
    operations = [op("update", key, data={"n": number}) for number in range(2_000)]
    assert bench.apply(operations) == Counts(refused={"missing": 2_000})
    assert bench.refused() == dict.fromkeys(range(2_000), (Reason.MISSING, "there is no record"))
    sizes = [len(msgspec.json.encode(item)) for place, item in bench.dynamo.items.items() if place[2].startswith("tx#")]
    assert max(sizes) < 100_000


def test_the_refusals_of_a_fold_are_read_from_one_answer(bench: Bench) -> None:
    """A thousand stale operations do not cost an attempt each."""
    bench.apply([op("upsert", "a", 5_000)], "first")
    bench.dynamo.attempts.clear()
    assert bench.apply([op("upsert", "a", number) for number in range(1, 201)]) == Counts(refused={"stale": 200})
    assert len(bench.dynamo.attempts) == 2  # one is refused, one writes the receipt


def test_a_malformed_operation_is_refused_alone(bench: Bench) -> None:
    """If DynamoDB rejects what a fold writes, that is the fault of its last operation; the others are still applied."""

    def reject(actions: Actions) -> None:
        if "too much" in str(actions):
            raise RequestRejected("one or more parameter values were invalid", code="ValidationException")

    bench.dynamo.before = reject
    operations = [op("upsert", "a", data={"n": n}) for n in (1, 2, "too much")]
    assert bench.apply(operations) == Counts(applied={"upsert": 2}, refused={"invalid": 1})
    record = bench.records.get("e", "a")
    assert (record.version, record.data) == (2, {"n": 2})


# -- turns


def patches(count: int) -> list[Operation]:
    """Return operations of which each is a wave."""
    return [op("upsert", "a", data={"n": 0}), *(op("patch", "a", data={"n": number}) for number in range(1, count))]


def test_a_lane_gives_way_after_its_waves(bench: Bench) -> None:
    """A turn applies so many waves; the next goes on behind them without reading all receipts."""
    bench.turn_waves = 10
    reference = bench.request(patches(35))
    for turn in range(3):
        with pytest.raises(LaneUnfinished):
            bench.writer().apply_lane(reference, 0, had_turns=turn > 0)
        assert bench.data("a") == {"n": 10 * turn + 9}
        assert "Query" not in bench.dynamo.calls
    assert bench.ledger.lane("r1", 0) is None
    assert bench.writer().apply_lane(reference, 0, had_turns=True).counts == Counts(applied={"patch": 34, "upsert": 1})
    assert len(bench.dynamo.written) == len(bench.dynamo.attempts) == 35


def test_a_lane_gives_way_after_its_seconds(bench: Bench) -> None:
    """The time of a turn begins with its first wave, and ends between two waves."""

    def slow(_: Actions) -> None:
        bench.now += 4

    bench.dynamo.after = slow
    bench.turn = 7
    reference = bench.request(patches(6))
    with pytest.raises(LaneUnfinished):
        bench.writer().apply_lane(reference, 0)
    assert len(bench.dynamo.written) == 2


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("cut", range(4))
def test_a_turn_completes_a_wave_that_an_earlier_one_left_in_part(bench: Bench, cut: int, late: bool) -> None:
    """Of a wave of four transactions, a worker that died has applied some: the next turn applies the others."""
    operations = [op("upsert" if n < 300 else "patch", f"k{n % 300}", data={f"n{n // 300}": n}) for n in range(900)]
    counts = applied(bench, bench.request(operations), cuts=[100, cut], late=late, turn_waves=1)
    assert counts == Counts(applied={"patch": 600, "upsert": 300})
    records = bench.records.look_up(("e", f"k{n}") for n in range(300))
    assert {record.version for record in records.values()} == {3}
    assert records["e", "k299"].data == {"n0": 299, "n1": 599, "n2": 899}
    assert len(bench.dynamo.written) == 12


def test_a_lane_of_one_wave_reads_nothing_more(bench: Bench) -> None:
    """Usual lanes have one wave, and cost what they cost before."""
    bench.turn_waves = 1
    operations = [op("upsert", f"k{number}") for number in range(300)]
    assert bench.apply(operations) == Counts(applied={"upsert": 300})
    assert bench.dynamo.calls == ["TransactWriteItems"] * 4 + ["PutItem"]
