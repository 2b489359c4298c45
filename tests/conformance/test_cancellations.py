"""A transaction applies all of its actions or none, and a cancelled one gives a reason for each action."""

from __future__ import annotations

from typing import Any

import pytest

from mdstore.aws.dynamodb.attributes import to_item
from mdstore.model import OpName
from tests.conformance.bench import Action, Bench, codes

pytestmark = pytest.mark.double

FAILED = "ConditionalCheckFailed"


def without(action: Action, name: str) -> Action:
    """Return an action without one of its fields."""
    ((kind, body),) = action.items()
    return {kind: {field: value for field, value in body.items() if field != name}}


def test_reasons_are_in_the_order_of_the_actions(bench: Bench) -> None:
    """Each action has its own code, whatever its kind; the code of an action that could apply is `None`."""
    bench.send(bench.put("live", version=3, data={"n": 1}), bench.put("other", version=1, data={}))
    reasons = bench.cancelled(
        bench.act("upsert", "new-1"),
        bench.act("insert", "live"),
        bench.act("update", "gone-1"),
        bench.act("insert", "new-2"),
        bench.act("check", "other", expect_version=7),
        bench.act("check", "gone-2"),
        bench.act("delete", "gone-3"),
        bench.receipt_put(),
    )
    assert codes(reasons) == ["None", FAILED, FAILED, "None", FAILED, FAILED, FAILED, "None"]
    assert [number for number, reason in enumerate(reasons) if "Item" in reason] == [1, 4]
    assert reasons[1]["Item"] == bench.item("live")
    assert reasons[4]["Item"] == bench.item("other")


@pytest.mark.large
def test_the_order_holds_over_a_hundred_actions(bench: Bench) -> None:
    """A cancelled transaction of 99 operations and a receipt has 100 reasons, each at its own action's place."""
    existing = {3, 42, 97}
    bench.send(*(bench.put(f"k{number}", version=number) for number in existing))
    reasons = bench.cancelled(*(bench.act("insert", f"k{number}") for number in range(99)), bench.receipt_put())
    assert len(reasons) == 100
    assert {number for number, code in enumerate(codes(reasons)) if code == FAILED} == existing
    assert {reasons[number]["Item"]["version"]["N"] for number in existing} == {"3", "42", "97"}


@pytest.mark.parametrize("failing", range(6))
def test_one_refusal_cancels_all(bench: Bench, failing: int) -> None:
    """Wherever the refused action is in the transaction, nothing is written to either table."""
    bench.send(bench.put("live", version=3, data={"n": 1}), bench.put("doomed", version=1, data={}))
    actions = [
        bench.act("insert", "new"),
        bench.act("update", "live"),
        bench.act("delete", "doomed"),
        bench.act("upsert", "up"),
        bench.receipt_put(),
    ]
    before = {key: bench.item(key) for key in ("new", "live", "doomed", "up")}
    reasons = bench.cancelled(*actions[:failing], bench.act("check", "gone"), *actions[failing:])
    assert codes(reasons) == ["None"] * failing + [FAILED] + ["None"] * (5 - failing)
    assert {key: bench.item(key) for key in before} == before
    assert bench.receipt_numbers() == []

    bench.send(*actions)
    found = {key: bench.values(key) for key in before}
    assert {key: values and values["version"] for key, values in found.items()} == {
        "new": 1,
        "live": 4,
        "doomed": 2,
        "up": 1,
    }
    assert bench.receipt_numbers() == [0]


REFUSED: list[tuple[OpName, dict[str, Any]]] = [
    ("insert", {}),
    ("update", {"expect_version": 9}),
    ("upsert", {"sequence": 1}),
    ("delete", {"expect_version": 9}),
    ("check", {"expect_version": 9}),
]


@pytest.mark.parametrize(("op", "fields"), REFUSED)
def test_a_refusal_shows_the_item_that_it_met(bench: Bench, op: OpName, fields: dict[str, Any]) -> None:
    """With `ALL_OLD` a refused Put, Update or ConditionCheck returns the whole stored item, with every type of value."""
    data = {"text": "ü", "number": 1, "list": [1, "a", None, True, []], "map": {"a": {}}, "empty": ""}
    bench.store("k", version=3, sequence=5, data=data)
    (reason,) = bench.cancelled(bench.act(op, "k", **fields))
    assert reason["Code"] == FAILED
    assert reason["Item"] == bench.item("k")


@pytest.mark.parametrize(("op", "fields"), REFUSED)
def test_a_refusal_shows_no_item_unless_asked(bench: Bench, op: OpName, fields: dict[str, Any]) -> None:
    """Without `ReturnValuesOnConditionCheckFailure` a reason has a code but no item."""
    bench.store("k", version=3, sequence=5, data={})
    (reason,) = bench.cancelled(without(bench.act(op, "k", **fields), "ReturnValuesOnConditionCheckFailure"))
    assert reason["Code"] == FAILED
    assert "Item" not in reason


@pytest.mark.parametrize("op", ["update", "delete", "check"])
def test_a_refusal_without_a_stored_item_shows_none(bench: Bench, op: OpName) -> None:
    """If there is no record, the reason has no item at all, not an empty one: that is how the writer knows."""
    (reason,) = bench.cancelled(bench.act(op, "gone"))
    assert reason["Code"] == FAILED
    assert "Item" not in reason


def test_actions_of_one_transaction_do_not_see_each_other(bench: Bench) -> None:
    """Conditions see the items before the transaction: a check of a record that the same transaction inserts fails."""
    one: Any = bench.act("check", "a")
    one["ConditionCheck"]["Key"] = bench.key("b")
    reasons = bench.cancelled(bench.act("insert", "a"), one)
    assert codes(reasons) == ["None", FAILED]


def test_tables_of_one_transaction_are_separate(bench: Bench) -> None:
    """The same key in two tables means two items: one transaction writes both, each with its own condition."""
    same = {"pk": f"{bench.entity}#k", "sk": "tx#00000"}
    put = {"TableName": bench.ledger_table, "Item": to_item(same), "ConditionExpression": "attribute_not_exists(pk)"}
    bench.send(bench.act("insert", "k"), {"Put": put})
    reasons = bench.cancelled(bench.act("update", "k"), {"Put": put})
    assert codes(reasons) == ["None", FAILED]
    assert bench.values("k") == {**bench.values("k"), "version": 1}  # type: ignore[dict-item]
