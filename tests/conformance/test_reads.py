"""Reads are strongly consistent, complete over all their pages, and say which keys they left out."""

from __future__ import annotations

from typing import Any

import pytest

from mdstore.aws.dynamodb.attributes import Item, to_item
from mdstore.errors import RequestRejected
from mdstore.model import Reason, Refusal
from mdstore.store.ledger_items import Receipt
from tests.conformance.bench import Bench

ITEM = 390 * 2**10  # bytes; 43 such items exceed the 16 MB of one BatchGetItem


def pages(bench: Bench, operation: str, body: dict[str, Any]) -> list[list[Item]]:
    """Return the items of each page."""
    found: list[list[Item]] = []
    start: dict[str, Any] = {}
    while True:
        answer = bench.dynamo.call(operation, {**body, **start})
        found.append(answer["Items"])
        assert len(found) < 1_000
        if "LastEvaluatedKey" not in answer:
            return found
        start = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}


@pytest.mark.double
def test_a_read_sees_the_write_before_it(bench: Bench) -> None:
    """Consistent reads with GetItem, BatchGetItem and Query show each write as soon as it is acknowledged."""
    for number in range(1, 21):
        bench.send(bench.act("upsert", "k"), bench.receipt_put(number))
        found = bench.values("k")
        assert found is not None
        assert found["version"] == number
        assert bench.records.get(bench.entity, "k").version == number
        assert bench.receipt_numbers() == list(range(1, number + 1))


@pytest.mark.double
def test_a_missing_item_is_not_returned(bench: Bench) -> None:
    """For a missing item, the answers of GetItem, BatchGetItem and Query contain no item."""
    assert bench.item("gone") is None
    assert bench.records.look_up([(bench.entity, "gone")]) == {}
    assert bench.receipt_numbers() == []


# -- BatchGetItem


def stored(bench: Bench, count: int) -> list[Item]:
    """Store records; returns their primary keys."""
    keys = [f"k{number}" for number in range(count)]
    for key in keys:
        bench.store(key, version=1)
    return [bench.key(key) for key in keys]


def batch(bench: Bench, keys: list[Item]) -> Any:
    """Return the answer of one BatchGetItem call."""
    return bench.dynamo.call("BatchGetItem", {"RequestItems": {bench.table: {"Keys": keys, "ConsistentRead": True}}})


def test_a_batch_of_100_keys_is_read(bench: Bench) -> None:
    """The items that exist are returned, in any order, and an empty map says that all keys were processed."""
    keys = stored(bench, 60)
    answer = batch(bench, [*keys, *(bench.key(f"gone{number}") for number in range(40))])
    assert sorted(item["pk"]["S"] for item in answer["Responses"][bench.table]) == sorted(
        key["pk"]["S"] for key in keys
    )
    assert answer["UnprocessedKeys"] == {}


def test_a_batch_of_101_keys_is_refused(bench: Bench) -> None:
    """A batch of 101 keys is malformed."""
    with pytest.raises(RequestRejected, match="ValidationException"):
        batch(bench, [bench.key(f"k{number}") for number in range(101)])


def test_a_batch_with_a_repeated_key_is_refused(bench: Bench) -> None:
    """A batch that names a key twice is malformed."""
    with pytest.raises(RequestRejected, match="ValidationException"):
        batch(bench, [bench.key("a"), bench.key("b"), bench.key("a")])


@pytest.mark.large
@pytest.mark.double
def test_more_keys_than_a_batch_are_read_in_batches(bench: Bench) -> None:
    """The client's `batch_get` accepts any number of keys."""
    keys = stored(bench, 130)
    (found,) = bench.dynamo.run([bench.dynamo.batch_get(bench.table, [*keys, bench.key("gone")])])
    assert sorted(item["pk"]["S"] for item in found) == sorted(key["pk"]["S"] for key in keys)


@pytest.fixture
def large(bench: Bench) -> list[Item]:
    """Store items of 17 MB in all; returns their keys."""
    for number in range(45):
        bench.store(f"k{number}", p="x" * ITEM)
    return [bench.key(f"k{number}") for number in range(45)]


def test_a_batch_over_16_mb_says_what_it_left_out(bench: Bench, large: list[Item]) -> None:
    """The keys that were not read are returned in the form of the request, and a second call reads the rest."""
    answer = batch(bench, large)
    left = answer["UnprocessedKeys"].get(bench.table, {}).get("Keys", [])
    assert 0 < len(left) < len(large)
    found = [*answer["Responses"][bench.table], *batch(bench, left)["Responses"][bench.table]]
    assert sorted(item["pk"]["S"] for item in found) == sorted(key["pk"]["S"] for key in large)


def test_keys_that_were_left_out_are_read_again(bench: Bench, large: list[Item]) -> None:
    """The client's `batch_get` reads 17 MB of items completely."""
    (found,) = bench.dynamo.run([bench.dynamo.batch_get(bench.table, large)])
    assert sorted(item["pk"]["S"] for item in found) == sorted(key["pk"]["S"] for key in large)


# -- Query


def test_a_query_returns_items_in_the_order_of_their_sort_keys(bench: Bench) -> None:
    """A query returns the items of its partition only, ordered by the bytes of their sort keys over all pages."""
    numbers = [99_999, 3, 0, 10, 200, 7]
    bench.send(*(bench.receipt_put(number) for number in numbers))
    bench.send(bench.ledger.receipt_put(bench.request_id, 1, Receipt(number=5)))
    body = {
        "TableName": bench.ledger_table,
        "KeyConditionExpression": "pk = :pk",
        "ExpressionAttributeValues": to_item({":pk": f"{bench.request_id}#00000"}),
        "ConsistentRead": True,
    }
    ordered = [f"tx#{number:05d}" for number in sorted(numbers)]
    for limit in ({}, {"Limit": 1}, {"Limit": 4}):
        found = pages(bench, "Query", body | limit)
        assert [item["sk"]["S"] for page in found for item in page] == ordered
        assert max(map(len, found)) <= limit.get("Limit", 6)


@pytest.mark.large
def test_a_query_over_1_mb_has_pages(bench: Bench) -> None:
    """Receipts full of refusals are returned in several pages, and the ledger reads all of them."""
    refused = tuple(Refusal(index=index, reason=Reason.INVALID, detail="x" * 10_000) for index in range(6))
    for number in range(24):
        bench.send(bench.receipt_put(receipt=Receipt(number=number, refused=refused)))
    body = {
        "TableName": bench.ledger_table,
        "KeyConditionExpression": "pk = :pk",
        "ExpressionAttributeValues": to_item({":pk": f"{bench.request_id}#00000"}),
        "ConsistentRead": True,
    }
    answer = bench.dynamo.call("Query", body)
    assert 10 < len(answer["Items"]) < 24
    last = answer["Items"][-1]
    assert answer["LastEvaluatedKey"] == {"pk": last["pk"], "sk": last["sk"]}
    assert sorted(bench.ledger.receipts(bench.request_id, 0)) == list(range(24))


# -- Scan


def test_segments_of_a_scan_are_complete(bench: Bench) -> None:
    """Every item is in exactly one segment, whatever the page size."""
    keys = {key["pk"]["S"] for key in stored(bench, 40)}
    for segments, limit in ((1, 1_000), (4, 1_000), (3, 7)):
        body = {"TableName": bench.table, "TotalSegments": segments, "Limit": limit, "ConsistentRead": True}
        found = [
            item["pk"]["S"]
            for segment in range(segments)
            for page in pages(bench, "Scan", body | {"Segment": segment})
            for item in page
        ]
        assert len(found) == len(set(found))
        assert keys <= set(found)


@pytest.mark.large
def test_records_of_an_entity_are_listed(bench: Bench) -> None:
    """The project's export and pages list the records of an entity, without tombstones, over scans of more than 1 MB."""
    for number in range(25):
        bench.send(bench.act("insert", f"k{number}"))
    for number in range(0, 25, 5):
        bench.send(bench.act("delete", f"k{number}"))
    for number in range(4):
        bench.store(f"large{number}", version=1, updated_at=0, updated_by="", data={"t": "x" * ITEM})
    wanted = sorted([f"k{number}" for number in range(25) if number % 5] + [f"large{number}" for number in range(4)])
    for segments in (1, 3):
        assert sorted(record.key for record in bench.records.export(bench.entity, segments=segments)) == wanted

    found: list[str] = []
    cursor: Any = None
    while True:
        records, cursor = bench.records.page(bench.entity, limit=6, cursor=cursor)
        assert len(records) <= 6
        found += [record.key for record in records]
        if cursor is None:
            break
    assert sorted(found) == wanted
