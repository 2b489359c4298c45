"""An expression that does not hold together is malformed, in Put, Update and ConditionCheck, whether it would pass or not.

The actions declare what they use and use what they declare, since DynamoDB demands both
(https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Expressions.html).
"""

from __future__ import annotations

from typing import Any

import pytest

from mdstore.errors import RequestRejected
from mdstore.model import OpName
from tests.conformance.bench import Bench

pytestmark = pytest.mark.parametrize("op", ["insert", "update", "check"])


def refused(bench: Bench, op: OpName, condition: str = "", **changes: dict[str, Any]) -> None:
    """An action with more to its expression: `condition` is put before its own, `changes` are added to its fields."""
    if op != "insert":
        bench.store("k", version=3, data={})
    before = bench.item("k")
    ((kind, body),) = bench.act(op, "k", sequence=None if op == "check" else 7).items()
    body["ConditionExpression"] = condition + body["ConditionExpression"]
    for field, more in changes.items():
        body[field] = {**body.get(field, {}), **more}
    with pytest.raises(RequestRejected) as caught:
        bench.send(bench.act("insert", "a"), {kind: body})
    assert caught.value.code == "ValidationException"
    assert (bench.item("k"), bench.item("a")) == (before, None)


def test_a_name_that_is_not_used_is_refused(bench: Bench, op: OpName) -> None:
    """A declaration too many."""
    refused(bench, op, ExpressionAttributeNames={"#unused": "unused"})


def test_a_value_that_is_not_used_is_refused(bench: Bench, op: OpName) -> None:
    """A declaration too many."""
    refused(bench, op, ExpressionAttributeValues={":unused": {"N": "1"}})


def test_a_name_that_is_not_declared_is_refused(bench: Bench, op: OpName) -> None:
    """A declaration too few."""
    refused(bench, op, "attribute_not_exists(#undeclared) AND ")


def test_a_value_that_is_not_declared_is_refused(bench: Bench, op: OpName) -> None:
    """A declaration too few."""
    refused(bench, op, "pk <> :undeclared AND ")


def test_a_reserved_word_needs_a_name(bench: Bench, op: OpName) -> None:
    """`state`, `data`, `key` and `ttl` are reserved, so expressions call them `#state` and so on."""
    refused(bench, op, "attribute_not_exists(state) AND ")


def test_what_is_no_expression_is_refused(bench: Bench, op: OpName) -> None:
    """A condition that cannot be read is not taken for one that is met."""
    refused(bench, op, "AND ")
