"""DynamoDB's limits: it accepts requests at the limit, and refuses those over it in a known form.

Sources: https://docs.aws.amazon.com/amazondynamodb/latest/APIReference/API_TransactWriteItems.html and
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html
"""

from __future__ import annotations

from typing import Any

import pytest

from mdstore.aws.dynamodb.attributes import MAX_NESTING, to_attribute, to_item
from mdstore.errors import RequestRejected
from mdstore.model import OpName, Reason, Refusal
from mdstore.store.ledger_items import Receipt
from mdstore.store.records import primary_key
from mdstore.store.validation import MAX_KEY_BYTES
from tests.conformance.bench import Action, Bench, codes

MAX_ITEM = 400 * 2**10  # bytes of names and values


def rejected(bench: Bench, *actions: Action) -> str:
    """Send a transaction that DynamoDB must refuse as malformed, without naming an action; returns its message."""
    with pytest.raises(RequestRejected) as caught:
        bench.send(*actions)
    assert caught.value.code == "ValidationException"
    return str(caught.value)


@pytest.mark.large
def test_a_hundred_actions_are_accepted(bench: Bench) -> None:
    """One transaction holds 99 operations and their receipt."""
    bench.send(*(bench.act("insert", f"k{number}") for number in range(99)), bench.receipt_put())
    assert all(bench.item(f"k{number}") for number in (0, 50, 98))
    assert bench.receipt_numbers() == [0]


@pytest.mark.large
def test_a_hundred_and_one_actions_are_refused(bench: Bench) -> None:
    """A transaction of 101 actions is malformed, and nothing is written."""
    rejected(bench, *(bench.act("insert", f"k{number}") for number in range(100)), bench.receipt_put())
    assert bench.item("k0") is None
    assert bench.receipt_numbers() == []


@pytest.mark.parametrize("pair", [("upsert", "upsert"), ("check", "update"), ("insert", "delete")], ids="-".join)
def test_two_actions_on_one_item_are_refused(bench: Bench, pair: tuple[OpName, OpName]) -> None:
    """A transaction with two actions on one item is malformed, whatever the actions are."""
    bench.store("k", version=3, data={})
    before = bench.item("k")
    assert "one item" in rejected(bench, bench.act("upsert", "a"), *(bench.act(op, "k") for op in pair))
    assert (bench.item("k"), bench.item("a")) == (before, None)


# -- sizes


def padded(bench: Bench, key: str, size: int) -> str:
    """Return the text `p` that makes an item of `pk`, `entity`, `key` and `p` have `size` bytes."""
    strings = {"pk": primary_key(bench.entity, key), "entity": bench.entity, "key": key, "p": ""}
    return "x" * (size - sum(len(name) + len(value) for name, value in strings.items()))


def set_padding(bench: Bench, key: str, text: str) -> Action:
    """Return an update that makes the item that `bench.put` makes."""
    body = {
        "TableName": bench.table,
        "Key": bench.key(key),
        "UpdateExpression": "SET p = :p, #entity = :entity, #key = :key",
        "ExpressionAttributeNames": {"#entity": "entity", "#key": "key"},
        "ExpressionAttributeValues": to_item({":p": text, ":entity": bench.entity, ":key": key}),
    }
    return {"Update": body}


def test_an_item_of_400_kb_is_accepted(bench: Bench) -> None:
    """Put and Update accept an item of 400 KB, counted as its names and values in UTF-8."""
    bench.store("a", p=padded(bench, "a", MAX_ITEM))
    bench.send(set_padding(bench, "b", padded(bench, "b", MAX_ITEM)))
    assert bench.item("a") is not None
    assert bench.item("b") is not None


def test_a_larger_put_is_malformed(bench: Bench) -> None:
    """A Put's size is known before the transaction begins, so the whole call is refused with a message about the size."""
    too_large = bench.put("k", p=padded(bench, "k", MAX_ITEM + 1))
    assert "size" in rejected(bench, bench.act("insert", "a"), too_large, bench.receipt_put()).lower()
    assert (bench.item("a"), bench.item("k")) == (None, None)


def test_an_update_that_makes_an_item_too_large_is_cancelled(bench: Bench) -> None:
    """An Update's size depends on the old item, so its own reason is `ValidationError`, with a message about the size."""
    too_large = set_padding(bench, "k", padded(bench, "k", MAX_ITEM + 1))
    reasons = bench.cancelled(bench.act("insert", "a"), too_large, bench.receipt_put())
    assert codes(reasons) == ["None", "ValidationError", "None"]
    assert "size" in reasons[1]["Message"].lower()
    assert (bench.item("a"), bench.item("k")) == (None, None)


def test_attributes_that_an_update_leaves_unchanged_count_too(bench: Bench) -> None:
    """An item at the limit refuses any update that adds to it, however small."""
    bench.store("k", p=padded(bench, "k", MAX_ITEM))
    (reason,) = bench.cancelled(bench.act("upsert", "k"))
    assert reason["Code"] == "ValidationError"
    assert "size" in reason["Message"].lower()


@pytest.mark.parametrize("letter", ["x", "é"], ids=["ascii", "two-bytes"])
def test_a_transaction_of_3_5_mb_is_accepted(bench: Bench, letter: str) -> None:
    """The limit counts bytes of UTF-8, not bytes of the JSON that carries them."""
    text = letter * (350_000 // len(letter.encode()))
    bench.send(*(bench.put(f"k{number}", p=text) for number in range(10)))
    assert all(bench.item(f"k{number}") for number in range(10))


@pytest.mark.large
def test_a_transaction_over_4_mb_is_refused(bench: Bench) -> None:
    """A transaction over 4 MB is malformed although each of its items is small enough."""
    rejected(bench, *(bench.put(f"k{number}", p="x" * 380_000) for number in range(12)))
    assert bench.item("k0") is None


def test_the_longest_keys_are_accepted(bench: Bench) -> None:
    """DynamoDB accepts an entity of 64 characters, a key of 1,024 bytes, and a request id of 200 characters."""
    key = "é" * (MAX_KEY_BYTES // 2)
    bench.send(
        {"Put": {"TableName": bench.table, "Item": to_item({"pk": primary_key("e" * 64, f"{bench.entity}{key}")})}}
    )
    bench.send(bench.ledger.receipt_put(bench.entity.ljust(200, "x"), 99_999, Receipt(number=99_999)))


@pytest.mark.large
def test_the_largest_receipt_is_accepted(bench: Bench) -> None:
    """A receipt of 99 refusals, each with the longest possible entity, key and detail, fits in one item."""
    detail, key = "🛫" * 500, "é" * (MAX_KEY_BYTES // 2)
    refused = tuple(
        Refusal(
            index=10**7 + index, reason=Reason.VERSION_MISMATCH, detail=detail, op="upsert", entity="e" * 64, key=key
        )
        for index in range(99)
    )
    bench.send(bench.receipt_put(receipt=Receipt(number=1, refused=refused)))
    assert bench.ledger.receipts(bench.request_id, 0) == {1: Receipt(number=1, refused=refused)}


# -- nesting


def nested(levels: int) -> Any:
    """Return maps and lists nested in turn, with a number in the innermost."""
    value: Any = 1
    for level in range(levels, 0, -1):
        value = {"a": value} if level % 2 else [value]
    return value


@pytest.mark.parametrize("op", ["insert", "upsert"])
def test_32_levels_are_accepted(bench: Bench, op: OpName) -> None:
    """The item is the first of 32 levels, so data may have 31; data that the validator accepts comes back unchanged."""
    bench.send(bench.act(op, "k", data=to_attribute(nested(MAX_NESTING))))
    found = bench.values("k")
    assert found is not None
    assert found["data"] == nested(MAX_NESTING)


def nested_attribute(levels: int) -> Any:
    """Return the same nesting in DynamoDB JSON, without `to_attribute`, which would refuse it."""
    value: Any = {"N": "1"}
    for level in range(levels, 0, -1):
        value = {"M": {"a": value}} if level % 2 else {"L": [value]}
    return value


def test_a_put_of_33_levels_is_malformed(bench: Bench) -> None:
    """A Put with 33 levels makes the whole call malformed."""
    assert "nest" in rejected(bench, bench.act("insert", "k", data=nested_attribute(MAX_NESTING + 1))).lower()
    assert bench.item("k") is None


def test_an_update_to_33_levels_is_cancelled(bench: Bench) -> None:
    """An Update to 33 levels is cancelled with `ValidationError` as its own reason."""
    reasons = bench.cancelled(
        bench.act("insert", "a"), bench.act("upsert", "k", data=nested_attribute(MAX_NESTING + 1))
    )
    assert codes(reasons) == ["None", "ValidationError"]
    assert "nest" in reasons[1]["Message"].lower()
    assert (bench.item("a"), bench.item("k")) == (None, None)
