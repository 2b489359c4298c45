"""With many workers at the same time, nothing is lost, doubled or half done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from random import Random
from typing import Any, TypeVar

import pytest

from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import to_item
from mdstore.aws.dynamodb.client import transact
from mdstore.errors import TransactionCancelled
from mdstore.model import Counts, State
from tests.conformance.bench import Action, Bench, encode

pytestmark = pytest.mark.concurrent
T = TypeVar("T")

WORKERS = 8
ACCOUNTS = 6
START = 20  # in each account


def together(workers: int, work: Callable[[int], T]) -> list[T]:
    """Run `work` in each worker at the same time; returns their results, or raises a worker's error."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(workers)))


def change(bench: Bench, key: str, by: int, who: str) -> Action:
    """Return an action that adds `by` to a number on the condition that the number does not become negative."""
    body = {
        "TableName": bench.table,
        "Key": bench.key(key),
        "UpdateExpression": "SET n = n + :by, who = :who",
        "ConditionExpression": "n >= :least",
        "ExpressionAttributeValues": to_item({":by": by, ":least": max(0, -by), ":who": who}),
    }
    return {"Update": body}


def transfer(bench: Bench, number: int, random: Random) -> tuple[Task[bool], dict[str, int]]:
    """Return a task that moves an amount between two accounts, and its changes. The task returns False if it was cancelled."""
    source, target = random.sample(range(ACCOUNTS), 2)
    amount = random.randint(1, 9)
    moves = {f"a{source}": -amount, f"a{target}": amount}

    def task() -> Task[bool]:
        actions = [change(bench, key, by, str(number)) for key, by in moves.items()]
        try:
            yield transact(encode([*actions, bench.receipt_put(number)]))
        except TransactionCancelled:
            return False
        return True

    return task(), moves


@pytest.mark.parametrize("in_flight", [1, 4])
def test_transactions_conserve_a_sum(bench: Bench, in_flight: int) -> None:
    """With 8 workers and up to 4 concurrent transfers each, every transfer applies whole or not at all, and has its receipt."""
    bench.send(*(bench.put(f"a{number}", n=START) for number in range(ACCOUNTS)))

    def work(worker: int) -> list[tuple[int, dict[str, int]]]:
        random = Random(worker)
        numbers = range(worker * 25, worker * 25 + 25)
        tasks, moves = zip(*(transfer(bench, number, random) for number in numbers), strict=True)
        with closing(bench.target.another()) as client:
            done = client.run(tasks, in_flight=in_flight)
        return [(number, move) for number, move, applied in zip(numbers, moves, done, strict=True) if applied]

    applied = [one for found in together(WORKERS, work) for one in found]
    expected = Counter({f"a{number}": START for number in range(ACCOUNTS)})
    for _, moves in applied:
        expected.update(moves)
    found = {f"a{number}": (bench.values(f"a{number}") or {})["n"] for number in range(ACCOUNTS)}
    assert found == dict(expected)
    assert sum(found.values()) == ACCOUNTS * START
    assert bench.receipt_numbers() == sorted(number for number, _ in applied)


def test_transactions_on_the_same_items_never_half_apply(bench: Bench) -> None:
    """Concurrent transactions each mark three items; after each round all three have the same transaction's mark."""
    for number in range(15):

        def work(worker: int, number: int = number) -> None:
            mark = f"{number}-{worker}"
            # Each worker has another order, so a store that locks item by item would mix the marks.
            keys = ["x", "y", "z"][worker % 3 :] + ["x", "y", "z"][: worker % 3]
            bench.send(*(bench.act("upsert", key, data={"S": mark}) for key in keys))

        together(WORKERS, work)
        marks = [bench.values(key) for key in "xyz"]
        assert len({str(found and found["data"]) for found in marks}) == 1
        assert {found and found["version"] for found in marks} == {(number + 1) * WORKERS}


def test_readers_see_an_item_as_one_transaction_left_it(bench: Bench) -> None:
    """A reader never sees some attributes of one write and some of another."""
    bench.store("k", first=0, second=0)

    def work(worker: int) -> None:
        for number in range(20):
            if worker % 2:
                found = bench.values("k")
                assert found is not None
                assert found["first"] == found["second"]
            else:
                value = to_item({":value": worker * 100 + number})
                body = {
                    "TableName": bench.table,
                    "Key": bench.key("k"),
                    "UpdateExpression": "SET #a = :value, #b = :value",
                }
                names = {"#a": "first", "#b": "second"}
                bench.send({"Update": {**body, "ExpressionAttributeNames": names, "ExpressionAttributeValues": value}})

    together(WORKERS, work)


def test_of_many_inserts_one_wins(bench: Bench) -> None:
    """Of 16 concurrent inserts of a key one applies, the others are refused, and the record has the winner's data."""

    def work(worker: int) -> Counts:
        operation = bench.op("insert", "k", data={"n": worker})
        with closing(bench.target.another()) as client:
            reference = bench.request([operation], f"{bench.request_id}-{worker}")
            return bench.writer(client).apply_lane(reference, 0).counts

    counts = together(WORKERS * 2, work)
    assert sorted(bool(one.applied) for one in counts) == [False] * (WORKERS * 2 - 1) + [True]
    record = bench.records.get(bench.entity, "k")
    winner = next(worker for worker, one in enumerate(counts) if one.applied)
    assert (record.version, record.data) == (1, {"n": winner})
    assert {one.refused.get("exists") for worker, one in enumerate(counts) if worker != winner} == {1}


def test_many_patches_of_one_record_all_count(bench: Bench) -> None:
    """Concurrent patches of one record all apply: each is merged again until it is based on the current version."""
    bench.apply([bench.op("insert", "k", data={})], f"{bench.request_id}-before")

    def work(worker: int) -> Counts:
        operation = bench.op("patch", "k", data={f"n{worker}": worker})
        with closing(bench.target.another()) as client:
            reference = bench.request([operation], f"{bench.request_id}-{worker}")
            return bench.writer(client).apply_lane(reference, 0).counts

    assert together(WORKERS, work) == [Counts(applied={"patch": 1})] * WORKERS
    record = bench.records.get(bench.entity, "k")
    assert (record.version, record.data) == (1 + WORKERS, {f"n{worker}": worker for worker in range(WORKERS)})


def test_a_lane_applied_by_many_workers_applies_once(bench: Bench) -> None:
    """If 8 workers apply the same lane at the same time, each operation takes effect once, and all count the same."""
    operations = [bench.op("upsert", f"k{number % 250}", data={"n": number}) for number in range(500)]
    operations += [bench.op("insert", f"k{number}", data={}) for number in range(0, 250, 10)]
    reference = bench.request(operations)

    def work(_: int) -> Counts:
        with closing(bench.target.another()) as client:
            return bench.writer(client).apply_lane(reference, 0).counts

    expected = Counts(applied={"upsert": 500}, refused={"exists": 25})
    assert together(WORKERS, work) == [expected] * WORKERS
    records = bench.records.look_up((bench.entity, f"k{number}") for number in range(250))
    assert {(key, record.version, (record.data or {})["n"]) for (_, key), record in records.items()} == {
        (f"k{number}", 2, 250 + number) for number in range(250)
    }


def test_a_request_applied_by_many_workers_is_completed_once(bench: Bench) -> None:
    """Whichever of 8 workers completes the request, all return the same state."""
    reference = bench.request([bench.op("insert", f"k{number}", data={}) for number in range(20)])

    def work(_: int) -> Any:
        with closing(bench.target.another()) as client:
            return bench.writer(client).apply_request(reference)

    found = together(WORKERS, work)
    assert {one.state for one in found} == {State.COMPLETED}
    assert found == [bench.ledger.get(bench.request_id)] * WORKERS


def test_parts_of_a_chord_are_counted_once_each(bench: Bench) -> None:
    """When 8 workers add each of 100 parts twice to one number set, each part is in it once, and no size is skipped."""

    def added(part: int) -> Iterator[int]:
        for _ in range(2):
            answer = bench.dynamo.call("UpdateItem", {
                "TableName": bench.table,
                "Key": bench.key("chord"),
                "UpdateExpression": "ADD parts :part",
                "ExpressionAttributeValues": {":part": {"NS": [str(part)]}},
                "ReturnValues": "ALL_NEW",
            })  # fmt: skip
            yield len(answer["Attributes"]["parts"]["NS"])

    def work(worker: int) -> list[int]:
        return [size for part in range(worker, 100, WORKERS) for size in added(part)]

    sizes = [size for found in together(WORKERS, work) for size in found]
    assert max(sizes) == 100
    assert set(range(1, 101)) <= set(sizes)
    found = bench.values("chord")
    assert found is not None
    assert found["parts"] == set(range(100))
