"""Planning: pure functions from operations to lanes, waves and transactions. `test_folding.py` has what version 2 adds."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdstore.model import OpName, Reason
from mdstore.store import packing as packing_module
from mdstore.store.operations import Indexed
from mdstore.store.packing import MAX_ACTIONS, MAX_TRANSACTION_BYTES, Transaction
from mdstore.store.partitioning import Partition

#: Every test here holds for the payloads of version 1, of which each operation is an action of its own.
pack = partial(packing_module.pack, v=1)
#: The SHA-256 of the plans that schema version 1 yields.
GOLDEN = "175e90c4733d841e51f3af557edfbbaa00a34616444965d02ac1167caa7507c5"
OPS: tuple[OpName, ...] = ("insert", "update", "patch", "upsert", "delete", "check")
Place = tuple[str, str]


def item(index: int, key: str, group: str | None = None, *, op: OpName = "upsert", size: int = 100) -> Indexed:
    return Indexed(index=index, op=op, entity="e", key=key, group=group, **sized(op, size))


def sized(op: OpName, size: int) -> dict[str, Any]:
    """Return data of `size` bytes in the field that a worker reads for this operation."""
    return {"data" if op == "patch" else "attribute": msgspec.Raw(b"x" * size)}


def place(one: Indexed) -> Place:
    return one.entity, one.key


def lane_of(rows: Sequence[tuple[OpName, str, str | None, int, int]]) -> list[Indexed]:
    """Return a lane as a payload builder makes it: indexes ascend with gaps, and no group has a key twice."""
    found: list[Indexed] = []
    seen: set[tuple[str, str]] = set()
    index = 0
    for op, key, group, size, gap in rows:
        index += gap
        if group is not None and (group, key) in seen:
            continue
        seen.add((group or "", key))
        found.append(item(index, key, group, op=op, size=size))
    return found


narrow_lanes = st.lists(
    st.tuples(
        st.sampled_from(OPS),
        st.sampled_from("abcdef"),
        st.sampled_from([None, None, "g1", "g2", "g3", "g4"]),
        st.sampled_from([1, 300, MAX_TRANSACTION_BYTES // 3, MAX_TRANSACTION_BYTES + 1]),
        st.integers(1, 3),
    ),
    max_size=30,
).map(lane_of)


@st.composite
def wide_lanes(draw: st.DrawFn) -> list[Indexed]:
    """Draw a lane of hundreds of operations, with groups of up to 99, some of whose members are far apart."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    keys = draw(st.integers(1, 500))
    groups = draw(st.integers(1, 12))
    rows: list[tuple[OpName, str, str | None, int, int]] = []
    members: Counter[str] = Counter()
    for _ in range(draw(st.integers(0, 500))):
        group = f"g{chance.randrange(groups)}" if chance.random() < 0.4 else None
        if group is not None:
            members[group] += 1
            if members[group] > MAX_ACTIONS:
                continue
        rows.append((chance.choice(OPS), f"k{chance.randrange(keys)}", group, chance.choice([1, 5_000, 90_000]), 1))
    return lane_of(rows)


lanes = st.one_of(narrow_lanes, wide_lanes())


def flat(waves: Sequence[Sequence[Transaction]]) -> list[Transaction]:
    return [transaction for wave in waves for transaction in wave]


def refused_indexes(waves: Sequence[Sequence[Transaction]]) -> set[int]:
    return {refusal.index for transaction in flat(waves) for refusal in transaction.refused}


def in_cycles(operations: Sequence[Indexed]) -> set[int]:
    """Return the indexes of operations whose group, or the operation itself, must come both before and after another one."""
    unit = {one.index: one.group or f"#{one.index}" for one in operations}
    after: dict[str, set[str]] = defaultdict(set)
    for key in {place(one) for one in operations}:
        for earlier, later in pairwise([one for one in operations if place(one) == key]):
            after[unit[earlier.index]].add(unit[later.index])

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(after[start] - {start})
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += after[name]
        return seen

    circular = {name for name in set(unit.values()) if name in reached(name)}
    return {index for index, name in unit.items() if name in circular}


@settings(deadline=None, max_examples=100)
@given(lanes)
def test_every_operation_is_planned_exactly_once(operations: list[Indexed]) -> None:
    """Each operation is in one transaction, as an operation or as a refusal."""
    waves = pack(operations)
    planned = [one.index for transaction in flat(waves) for one in transaction.operations]
    refused = [refusal.index for transaction in flat(waves) for refusal in transaction.refused]
    assert sorted(planned + refused) == [one.index for one in operations]


@settings(deadline=None, max_examples=100)
@given(lanes)
def test_groups_are_never_split(operations: list[Indexed]) -> None:
    """The operations of a group are in one transaction, or all of them are refused."""
    homes: dict[str, set[int]] = defaultdict(set)
    waves = pack(operations)
    refused = refused_indexes(waves)
    number_of = {one.index: transaction.number for transaction in flat(waves) for one in transaction.operations}
    for one in operations:
        if one.group is not None:
            homes[one.group].add(-1 if one.index in refused else number_of[one.index])
    assert all(len(found) == 1 for found in homes.values())


@settings(deadline=None, max_examples=100)
@given(lanes)
def test_waves_keep_the_order_of_operations_on_a_key(operations: list[Indexed]) -> None:
    """Of two operations on one key, the first one is in an earlier wave, so no wave has a key twice."""
    waves = pack(operations)
    wave_of = {
        one.index: number for number, wave in enumerate(waves) for transaction in wave for one in transaction.operations
    }
    per_key: dict[Place, list[int]] = defaultdict(list)
    for one in operations:
        if one.index in wave_of:
            per_key[place(one)].append(wave_of[one.index])
    assert all(earlier < later for found in per_key.values() for earlier, later in pairwise(found))


@settings(deadline=None, max_examples=100)
@given(lanes)
def test_transactions_keep_the_limits_of_dynamodb(operations: list[Indexed]) -> None:
    """A transaction has at most 99 actions, all on distinct keys. Only a single group or operation may exceed the bytes."""
    for transaction in flat(pack(operations)):
        assert len(transaction.operations) <= MAX_ACTIONS
        assert len({place(one) for one in transaction.operations}) == len(transaction.operations)
        assert len(transaction.refused) <= MAX_ACTIONS
        units = {one.group or one.index for one in transaction.operations}
        assert len(units) <= 1 or sum(one.size for one in transaction.operations) <= MAX_TRANSACTION_BYTES


@settings(deadline=None, max_examples=100)
@given(lanes)
def test_transactions_are_numbered_and_the_plan_is_deterministic(operations: list[Indexed]) -> None:
    """Numbers count from 0 in the order of the waves, and equal operations yield equal plans."""
    waves = pack(operations)
    assert [transaction.number for transaction in flat(waves)] == list(range(len(flat(waves))))
    assert all(waves)
    assert pack(list(operations)) == waves


def test_the_plan_is_the_same_in_every_process_and_release() -> None:
    """Plan and lanes depend on neither hash randomisation nor the release, so each worker understands the receipts of others.

    If the plan has to change, payloads need another schema version, and workers have to plan old payloads as before.
    """
    script = """
from msgspec import Raw
from mdstore.store.operations import Indexed
from mdstore.store.packing import pack
from mdstore.store.partitioning import Partition
def group(n): return f"g{n % 40}" if n % 3 == 0 and n < 400 else None
def data(n): return {"data" if n % 5 == 0 else "attribute": Raw(b"x" * (50 if n % 7 else 100_000))}
lane = [Indexed(index=n, op="patch" if n % 5 == 0 else "upsert", entity="e", key=f"k{n % 331}", group=group(n), **data(n))
        for n in range(900)]
partition = Partition()
for one in lane: partition.add(one, one.size)
print([[[one.index for one in t.operations] for t in w] for w in pack(lane, 1)])
print([[(t.number, [one.index for one in t.refused]) for t in w if t.refused] for w in pack(lane, 1)])
print(partition.lanes(operations=100, size=10**9))
"""
    plans = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert {hashlib.sha256(plan).hexdigest() for plan in plans} == {GOLDEN}


def test_transactions_are_filled() -> None:
    """A thousand operations on distinct keys become one wave of eleven transactions, all full except the last."""
    (wave,) = pack([item(index, f"k{index}") for index in range(1_000)])
    assert [len(transaction.operations) for transaction in wave] == [99] * 10 + [10]


@pytest.mark.parametrize(("size", "expected"), [(MAX_TRANSACTION_BYTES // 2, [2, 2]), (MAX_TRANSACTION_BYTES, [1] * 4)])
def test_transactions_are_split_by_bytes(size: int, expected: list[int]) -> None:
    """A transaction of exactly the limit is allowed."""
    (wave,) = pack([item(index, f"k{index}", size=size) for index in range(4)])
    assert [len(transaction.operations) for transaction in wave] == expected


def test_an_empty_lane_has_no_transactions() -> None:
    """A lane without operations needs no receipt."""
    assert pack([]) == []


def test_the_later_of_two_interleaved_groups_is_refused_as_invalid() -> None:
    """If each of two groups comes before the other on one key, each operation of the later group is refused."""
    operations = [item(0, "a", "g1"), item(1, "b", "g2"), item(2, "a", "g2"), item(3, "b", "g1"), item(4, "c")]
    waves = pack(operations)
    refusals = [refusal for transaction in flat(waves) for refusal in transaction.refused]
    assert [(refusal.index, refusal.op, refusal.entity, refusal.key) for refusal in refusals] == [
        (1, "upsert", "e", "b"),
        (2, "upsert", "e", "a"),
    ]
    assert {refusal.reason for refusal in refusals} == {Reason.INVALID}
    assert {refusal.detail for refusal in refusals} == {
        "group: groups interleave on their keys, so they cannot be both atomic and in order"
    }


def test_groups_in_one_order_on_shared_keys_are_not_refused() -> None:
    """Groups that share keys and have the same order on each of them run one after the other, in one wave each."""
    operations = [item(0, "a", "g1"), item(1, "b", "g1"), item(2, "a", "g2"), item(3, "b", "g2")]
    assert [[one.index for one in wave[0].operations] for wave in pack(operations)] == [[0, 1], [2, 3]]


@settings(deadline=None, max_examples=200)
@given(narrow_lanes)
def test_only_interleaved_groups_are_refused(operations: list[Indexed]) -> None:
    """Every refused operation belongs to a group that must come both before and after something else."""
    refused = refused_indexes(pack(operations))
    grouped = {one.index for one in operations if one.group is not None}
    assert refused <= in_cycles(operations) & grouped
    assert bool(refused) == bool(in_cycles(operations))


@pytest.mark.parametrize("group", [None, "g3"])
def test_operations_after_interleaved_groups_still_apply(group: str | None) -> None:
    """One bad record never blocks others: a later operation on a key of a refused group is planned."""
    stuck = [item(0, "a", "g1"), item(1, "b", "g2"), item(2, "a", "g2"), item(3, "b", "g1")]
    waves = pack([*stuck, item(4, "a", group), item(5, "z", group)])
    assert refused_indexes(waves) == {1, 2}


def test_a_single_operation_between_interleaved_groups_still_applies() -> None:
    """A group is refused, never the operation without a group."""
    waves = pack([item(0, "b", "g2"), item(1, "a", "g1"), item(2, "a"), item(3, "a", "g2"), item(4, "b", "g1")])
    assert refused_indexes(waves) == {1, 4}


def partitioned(operations: Sequence[Indexed], *, count: int, size: int = 10**12) -> list[list[int]]:
    partition = Partition()
    for one in operations:
        partition.add(one, one.size)
    assert len(partition) == len(operations)
    return [list(lane) for lane in partition.lanes(operations=count, size=size)]


@settings(deadline=None, max_examples=100)
@given(lanes, st.integers(1, 50))
def test_a_partition_assigns_each_operation_once_in_order(operations: list[Indexed], count: int) -> None:
    """Each position is in one lane, no lane is empty, and each lane keeps the order of the request."""
    found = partitioned(operations, count=count)
    assert sorted(position for lane in found for position in lane) == list(range(len(operations)))
    assert all(lane == sorted(lane) for lane in found)
    assert all(found)


@settings(deadline=None, max_examples=100)
@given(lanes, st.integers(1, 20))
def test_a_key_and_a_group_live_in_one_lane(operations: list[Indexed], count: int) -> None:
    """Operations that share a key or a group, directly or through other operations, are in one lane."""
    homes: dict[object, set[int]] = defaultdict(set)
    for number, lane in enumerate(partitioned(operations, count=count)):
        for position in lane:
            one = operations[position]
            homes[place(one)].add(number)
            if one.group is not None:
                homes[one.group].add(number)
    assert all(len(found) == 1 for found in homes.values())


@settings(deadline=None, max_examples=50)
@given(narrow_lanes, st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_order_of_operations_does_not_change_which_keys_share_a_lane(
    operations: list[Indexed], count: int, chance: random.Random
) -> None:
    """Which keys share a lane depends on the operations, not on the order in which they are given."""

    def key_sets(some: Sequence[Indexed]) -> set[frozenset[Place]]:
        return {frozenset(place(some[position]) for position in lane) for lane in partitioned(some, count=count)}

    shuffled = list(operations)
    chance.shuffle(shuffled)
    assert key_sets(shuffled) == key_sets(operations)


def test_the_same_key_of_different_entities_may_be_in_different_lanes() -> None:
    """A key belongs to its entity: one key of 100 entities is spread over ten lanes."""
    partition = Partition()
    for number in range(100):
        partition.add(Indexed(index=number, op="upsert", entity=f"e{number}", key="k"), 10)
    assert len(partition.lanes(operations=10, size=10**9)) == 10


@pytest.mark.parametrize(("count", "size"), [(1_000, 10**12), (10**9, 100_000)])
def test_lanes_are_near_their_target(count: int, size: int) -> None:
    """20,000 operations of 100 bytes become 20 lanes of about 1,000 operations, or of about 100,000 bytes."""
    found = partitioned([item(index, f"k{index}") for index in range(20_000)], count=count, size=size)
    assert len(found) == 20
    assert all(800 < len(lane) < 1_200 for lane in found)


def test_a_large_component_has_a_lane_of_its_own_and_does_not_split_others() -> None:
    """A key that has nearly all that a lane may hold, or more, does not split the others into ever smaller lanes."""
    for large in (5_800, 7_000):
        partition = Partition()
        for number in range(20_000):
            partition.add(item(number, f"k{number}"), 1)
        for number in range(20_000, 20_008):
            partition.add(item(number, "large"), large // 8)
        lanes = partition.lanes(operations=2_000, size=10**9, limit=6_000)
        assert len(lanes) == 11 + 1
        assert list(lanes[-1]) == list(range(20_000, 20_008))


def test_a_shared_lane_never_exceeds_the_limit_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys share a lane only if their operations together are within the limit of a lane."""
    monkeypatch.setattr("mdstore.store.partitioning.MAX_LANE_OPERATIONS", 1_000)
    for keys in (["a", "b", "c", "d"], [f"k{number}" for number in range(40)]):
        operations = [item(number, keys[number % len(keys)]) for number in range(600 * 4)]
        partition = Partition()
        for one in operations:
            partition.add(one, 10)
        lanes = partition.lanes(operations=10**6, size=10**9, limit=10**6)
        assert sum(map(len, lanes)) == len(operations)
        assert max(map(len, lanes)) <= 1_000


def test_an_empty_request_has_no_lanes() -> None:
    """A partition without operations yields no lane."""
    assert partitioned([], count=10) == []


def test_interleaved_groups_are_resolved_in_linear_time() -> None:
    """Thousands of groups in one component take one pass, which reads each unit's neighbours a bounded number of times."""
    half = 5_000
    keys = [("a", n) for n in range(half)] + [("b", half - 1 - n) for n in range(half)]
    lane = [item(i, str(key), f"g{n}", size=10) for i, (key, n) in enumerate(keys)]
    reads = 0

    class Counted(set[int]):
        def __and__(self, other: Any) -> Any:
            nonlocal reads
            reads += 1
            return set.__and__(self, other)

    predecessors, successors = packing_module._dependencies(packing_module._units(lane, fold=True))
    components = packing_module._strongly_connected_components(
        [Counted(one) for one in predecessors], [Counted(one) for one in successors]
    )

    assert [len(component) for component in components] == [half]
    assert reads <= 10 * half


def test_the_plan_of_a_lane_never_changes() -> None:
    """Receipts name transactions by number, so the packing is part of the stored format, and this digest must not change."""
    operations = [
        item(i, f"k{i * 7919 % 613}", f"g{i % 40}" if i % 11 == 0 else None, size=20 + i * 37 % 900)
        for i in range(1_500)
    ]
    shape = [
        [(t.number, [item.index for item in t.operations], [one.index for one in t.refused]) for t in wave]
        for wave in pack(operations)
    ]
    assert hashlib.sha256(repr(shape).encode()).hexdigest() == (
        "9d85eecc02745295f3ee39894226c967b47c691387635bd4c990e78856117601"
    )
