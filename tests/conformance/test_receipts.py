"""An effect happens once because of the receipt's condition and, within ten minutes, the token."""

from __future__ import annotations

import pytest

from mdstore.aws.dynamodb.attributes import from_item
from mdstore.aws.dynamodb.client import transact
from mdstore.errors import RequestRejected
from mdstore.model import Reason, Refusal
from mdstore.store.ledger_items import Receipt, receipt_of
from tests.conformance.bench import Bench, codes, encode

FAILED = "ConditionalCheckFailed"
RECEIPT = Receipt(
    number=7, refused=(Refusal(index=4, reason=Reason.EXISTS, detail="ü", op="insert", entity="e", key="k"),)
)


@pytest.mark.double
def test_a_replay_is_cancelled_by_its_receipt(bench: Bench) -> None:
    """A replay with other bytes, as after the token has expired, is cancelled; its last reason shows the first receipt."""
    bench.send(bench.act("upsert", "k"), bench.receipt_put(receipt=RECEIPT))
    again = Receipt(number=7)
    for _ in range(3):
        reasons = bench.cancelled(
            bench.act("upsert", "k"), bench.act("insert", "new"), bench.receipt_put(receipt=again)
        )
        assert codes(reasons) == ["None", "None", FAILED]
        assert receipt_of(from_item(reasons[-1]["Item"])) == RECEIPT
    found = bench.values("k")
    assert found is not None
    assert found["version"] == 1
    assert bench.item("new") is None
    assert bench.ledger.receipts(bench.request_id, 0) == {7: RECEIPT}


@pytest.mark.double
def test_a_replay_that_would_be_refused_shows_its_receipt_too(bench: Bench) -> None:
    """A replayed insert meets its own record, so both conditions fail, and the receipt says that it was applied."""
    bench.send(bench.act("insert", "k"), bench.receipt_put(7))
    reasons = bench.cancelled(bench.act("insert", "k"), bench.receipt_put(receipt=RECEIPT))
    assert codes(reasons) == [FAILED, FAILED]
    assert reasons[0]["Item"] == bench.item("k")
    assert receipt_of(from_item(reasons[1]["Item"])) == Receipt(number=7)


@pytest.mark.double
def test_receipts_are_separate(bench: Bench) -> None:
    """The receipt of another transaction, lane or request cancels nothing."""
    bench.send(bench.receipt_put(0))
    bench.send(bench.receipt_put(1))
    bench.send(bench.ledger.receipt_put(bench.request_id, 1, Receipt(number=0)))
    bench.send(bench.ledger.receipt_put(f"{bench.request_id}-2", 0, Receipt(number=0)))
    assert bench.receipt_numbers() == [0, 1]
    assert sorted(bench.ledger.receipts(bench.request_id, 1)) == [0]


@pytest.mark.double
def test_a_receipt_can_stand_alone(bench: Bench) -> None:
    """If all operations are refused, a transaction writes the receipt alone, and it cancels a replay."""
    bench.send(bench.receipt_put(receipt=RECEIPT))
    (reason,) = bench.cancelled(bench.receipt_put(7))
    assert receipt_of(from_item(reason["Item"])) == RECEIPT


@pytest.mark.double
@pytest.mark.parametrize("exists", [False, True])
def test_an_impossible_action_never_passes(bench: Bench, exists: bool) -> None:
    """With `failing_check` DynamoDB evaluates a transaction without writing it, whether the receipt exists or not."""
    if exists:
        bench.send(bench.receipt_put(0))
    reasons = bench.cancelled(bench.act("insert", "k"), bench.ledger.failing_check(bench.request_id, 0, 0))
    assert codes(reasons) == ["None", FAILED]
    assert bench.item("k") is None


def test_the_same_bytes_apply_once(bench: Bench) -> None:
    """Sending the same actions again, as after a lost answer, succeeds and changes nothing."""
    for _ in range(3):
        bench.send(bench.act("upsert", "k"))
    found = bench.values("k")
    assert found is not None
    assert found["version"] == 1


def test_the_same_bytes_with_a_receipt_succeed_again(bench: Bench) -> None:
    """While the token lives, a repeat succeeds instead of being cancelled by the transaction's own receipt."""
    put = bench.receipt_put(0)
    for _ in range(3):
        bench.send(bench.act("insert", "k"), put)
    assert bench.receipt_numbers() == [0]


def test_a_token_answers_for_its_own_write_only(bench: Bench) -> None:
    """A repeat does not overwrite a write that came between: the token answers without writing."""
    bench.send(bench.act("upsert", "k"))
    bench.send(bench.act("delete", "k"))
    bench.send(bench.act("upsert", "k"))
    found = bench.values("k")
    assert found is not None
    assert (found["version"], found.get("deleted")) == (2, True)


def test_a_token_is_bound_to_its_body(bench: Bench) -> None:
    """The same token with another body is an error, and the other body is not applied."""
    operation, body = transact(encode([bench.act("upsert", "k")]))
    _, other = transact(encode([bench.act("upsert", "other")]))
    token = body[body.index(b"ClientRequestToken") :]
    bench.make((operation, body))
    with pytest.raises(RequestRejected) as caught:
        bench.make((operation, other[: other.index(b"ClientRequestToken")] + token))
    assert caught.value.code == "IdempotentParameterMismatchException"
    assert bench.item("other") is None


def test_a_cancelled_transaction_does_not_use_up_its_token(bench: Bench) -> None:
    """After a cancellation the same bytes are evaluated again; the writer relies on it when it repeats after a conflict."""
    actions = [bench.act("update", "k"), bench.receipt_put(0)]
    assert codes(bench.cancelled(*actions)) == [FAILED, "None"]
    assert codes(bench.cancelled(*actions)) == [FAILED, "None"]
    bench.store("k", version=3)
    bench.send(*actions)
    found = bench.values("k")
    assert found is not None
    assert found["version"] == 4


def test_a_token_of_36_characters_is_accepted(bench: Bench) -> None:
    """The client's tokens have 36 characters, the most that DynamoDB accepts; one of 37 is refused."""
    operation, body = transact(encode([bench.act("upsert", "k")]))
    bench.make((operation, body))
    with pytest.raises(RequestRejected, match="ValidationException"):
        bench.make((operation, body[:-2] + b'x"}'))
