"""Errors of the deployment are distinguished from errors of an operation and from "not now"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.credentials import Credentials

from mdstore.aws.dynamodb.attributes import to_item
from mdstore.aws.dynamodb.client import DynamoClient, transact
from mdstore.errors import DeploymentBroken, RequestRejected
from tests.conformance.bench import Bench, encode

KEY = to_item({"pk": "k"})
CALLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "GetItem": lambda table: {"TableName": table, "Key": KEY},
    "PutItem": lambda table: {"TableName": table, "Item": KEY},
    "UpdateItem": lambda table: {"TableName": table, "Key": KEY, "UpdateExpression": "REMOVE a"},
    "DeleteItem": lambda table: {"TableName": table, "Key": KEY},
    "BatchGetItem": lambda table: {"RequestItems": {table: {"Keys": [KEY]}}},
    "Scan": lambda table: {"TableName": table},
    "Query": lambda table: {
        "TableName": table,
        "KeyConditionExpression": "pk = :pk",
        "ExpressionAttributeValues": to_item({":pk": "k"}),
    },
    "TransactWriteItems": lambda table: {"TransactItems": [{"Put": {"TableName": table, "Item": KEY}}]},
}


@pytest.mark.parametrize("operation", CALLS)
def test_a_table_that_is_missing_is_a_broken_deployment(bench: Bench, operation: str) -> None:
    """Every operation of the client raises DeploymentBroken if the table does not exist."""
    with pytest.raises(DeploymentBroken) as caught:
        bench.dynamo.call(operation, CALLS[operation](f"{bench.table}-missing"))
    assert caught.value.code == "ResourceNotFoundException"


def test_a_table_that_is_missing_breaks_the_whole_transaction(bench: Bench) -> None:
    """The whole call fails, without a reason per action, and nothing is written to the existing table."""
    with pytest.raises(DeploymentBroken) as caught:
        bench.send(bench.act("insert", "k"), {"Put": {"TableName": f"{bench.table}-missing", "Item": KEY}})
    assert caught.value.code == "ResourceNotFoundException"
    assert bench.item("k") is None


def check_broken(client: DynamoClient, bench: Bench, *codes: str) -> None:
    """Check that a read and a write raise DeploymentBroken with one of `codes`, and that nothing is written."""
    with pytest.raises(DeploymentBroken) as caught:
        client.call("GetItem", {"TableName": bench.table, "Key": bench.key("k")})
    assert caught.value.code in codes
    with pytest.raises(DeploymentBroken) as caught:
        client.call(*transact(encode([bench.act("insert", "k")])))
    assert caught.value.code in codes
    assert bench.item("k") is None


def test_an_unknown_key_is_a_broken_deployment(bench: Bench) -> None:
    """Calls with credentials that AWS does not know raise DeploymentBroken."""
    client = bench.target.another(Credentials("AKIAIOSFODNN7EXAMPLE", "wrong"))
    check_broken(client, bench, "UnrecognizedClientException", "InvalidSignatureException")


def test_a_key_of_another_shape_is_malformed(bench: Bench) -> None:
    """A read with another key attribute than the table's raises RequestRejected."""
    with pytest.raises(RequestRejected) as caught:
        bench.dynamo.call("GetItem", {"TableName": bench.table, "Key": to_item({"id": "k"})})
    assert caught.value.code == "ValidationException"
