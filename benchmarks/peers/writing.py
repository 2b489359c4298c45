"""How the peers write: each boto3 transaction applies 100 operations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from boto3.dynamodb.types import TypeSerializer

INTERVAL = 0.2  # seconds between two polls of a waiting submitter, for every contender
CHUNK = 100  # operations per message and transaction
PROCESSES = 2  # worker processes of every contender
TABLE = os.environ.get("BENCH_TABLE", "mdstore-records")
QUEUE = "bench"
_serializer = TypeSerializer()


def stock_options(endpoint: str, *, without_pause: bool) -> dict[str, Any]:
    """Return options for kombu's SQS transport: a predefined queue, and either kombu's own polling or pauses of only 20 ms."""
    return {
        "region": os.environ["AWS_REGION"],
        "is_secure": False,
        "visibility_timeout": 300,
        "predefined_queues": {QUEUE: {"url": f"{endpoint}/000000000000/{QUEUE}"}},
        # Seconds; kombu's defaults are 1 and 10. With no pause at all, the main process would spin while its prefetch is full.
        **({"polling_interval": 0.02, "wait_time_seconds": 1} if without_pause else {}),
    }


def actions(operations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `TransactItems` for operations that were decoded from JSON, including floats."""
    return [
        {
            "Put": {
                "TableName": TABLE,
                "Item": {name: _serializer.serialize(value) for name, value in _item(operation).items()},
                "ConditionExpression": "attribute_not_exists(pk)",
            }
        }
        for operation in operations
    ]


def _item(operation: dict[str, Any]) -> dict[str, Any]:
    data = operation["data"]
    exact = {name: Decimal(repr(value)) if isinstance(value, float) else value for name, value in data.items()}
    return {
        "pk": f"{operation['entity']}#{operation['key']}",
        "entity": operation["entity"],
        "key": operation["key"],
        "version": 1,
        "data": exact,
        "updated_at": 1_764_000_000_000,
        "updated_by": "bench",
    }
