"""Many at the same time: nothing is lost, nothing is doubled, nothing is half done."""

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
    """Each worker's result; an error of any is raised."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(workers)))


def change(bench: Bench, key: str, by: int, who: str) -> Action:
    """An addition that never makes the number negative."""
    body = {
        "TableName": bench.table,
        "Key": bench.key(key),
        "UpdateExpression": "SET n = n + :by, who = :who",
        "ConditionExpression": "n >= :least",
        "ExpressionAttributeValues": to_item({":by": by, ":least": max(0, -by), ":who": who}),
    }
    return {"Update": body}


def transfer(bench: Bench, number: int, random: Random) -> tuple[Task[bool], dict[str, int]]:
    """A task that moves some from one account to another, and what it does to each; False: not enough was there."""
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
    """8 workers, each with up to 4 transfers under way: every transfer counts wholly or not at all, and has its receipt."""
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
    """Each transaction marks three items; after each round all three have the mark of one and the same."""
    for turn in range(15):

        def work(worker: int, turn: int = turn) -> None:
            mark = f"{turn}-{worker}"
            # In different orders: that is where a store that locks item by item would mix them.
            keys = ["x", "y", "z"][worker % 3 :] + ["x", "y", "z"][: worker % 3]
            bench.send(*(bench.act("upsert", key, data={"S": mark}) for key in keys))

        together(WORKERS, work)
        marks = [bench.values(key) for key in "xyz"]
        assert len({str(found and found["data"]) for found in marks}) == 1
        assert {found and found["version"] for found in marks} == {(turn + 1) * WORKERS}


def test_readers_see_an_item_as_one_transaction_left_it(bench: Bench) -> None:
    """Never with some attributes of one write and some of another."""
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
    """The others are refused, and the record is the winner's."""

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
    """Each is merged into what the others left, however often it must be based anew."""
    bench.apply([bench.op("insert", "k", data={})], f"{bench.request_id}-before")

    def work(worker: int) -> Counts:
        operation = bench.op("patch", "k", data={f"n{worker}": worker})
        with closing(bench.target.another()) as client:
            reference = bench.request([operation], f"{bench.request_id}-{worker}")
            return bench.writer(client).apply_lane(reference, 0).counts

    assert together(WORKERS, work) == [Counts(applied={"patch": 1})] * WORKERS
    record = bench.records.get(bench.entity, "k")
    assert (record.version, record.data) == (1 + WORKERS, {f"n{worker}": worker for worker in range(WORKERS)})


def test_a_lane_in_many_hands_applies_once(bench: Bench) -> None:
    """8 workers have the same message at the same moment: each operation takes effect once, and all count the same."""
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


def test_a_request_in_many_hands_is_completed_once(bench: Bench) -> None:
    """Whoever completes it, all get the same answer."""
    reference = bench.request([bench.op("insert", f"k{number}", data={}) for number in range(20)])

    def work(_: int) -> Any:
        with closing(bench.target.another()) as client:
            return bench.writer(client).apply_request(reference)

    found = together(WORKERS, work)
    assert {one.state for one in found} == {State.COMPLETED}
    assert found == [bench.ledger.get(bench.request_id)] * WORKERS


def test_parts_of_a_chord_are_counted_once_each(bench: Bench) -> None:
    """200 additions to a number set at the same time, each part twice: the set has each once, and one update completed it."""

    def added(part: int) -> Iterator[int]:
        for _ in range(2):
            answer = bench.dynamo.call("UpdateItem", {
                "TableName": bench.table,
                "Key": bench.key("join"),
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
    found = bench.values("join")
    assert found is not None
    assert found["parts"] == set(range(100))
