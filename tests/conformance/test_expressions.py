"""An inconsistent expression makes a Put, Update or ConditionCheck malformed, whether its condition would hold or not.

The project's actions declare every name and value that they use and use all that they declare, because DynamoDB demands both
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
    """Check that an action is malformed with `condition` before its own condition and `changes` added to its fields."""
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
    """The call is malformed if it declares a name that no expression uses."""
    refused(bench, op, ExpressionAttributeNames={"#unused": "unused"})


def test_a_value_that_is_not_used_is_refused(bench: Bench, op: OpName) -> None:
    """The call is malformed if it declares a value that no expression uses."""
    refused(bench, op, ExpressionAttributeValues={":unused": {"N": "1"}})


def test_a_name_that_is_not_declared_is_refused(bench: Bench, op: OpName) -> None:
    """The call is malformed if an expression uses a name that is not declared."""
    refused(bench, op, "attribute_not_exists(#undeclared) AND ")


def test_a_value_that_is_not_declared_is_refused(bench: Bench, op: OpName) -> None:
    """The call is malformed if an expression uses a value that is not declared."""
    refused(bench, op, "pk <> :undeclared AND ")


def test_a_reserved_word_needs_a_name(bench: Bench, op: OpName) -> None:
    """The words `state`, `data`, `key` and `ttl` are reserved, so expressions must use declared names such as `#state`."""
    refused(bench, op, "attribute_not_exists(state) AND ")


def test_a_malformed_expression_is_refused(bench: Bench, op: OpName) -> None:
    """A condition that cannot be parsed is refused, not treated as one that holds."""
    refused(bench, op, "AND ")
