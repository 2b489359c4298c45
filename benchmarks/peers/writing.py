"""How the peers write: 100 operations, one boto3 transaction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from boto3.dynamodb.types import TypeSerializer

INTERVAL = 0.2  # seconds between two looks of a submitter that waits, of every contender
CHUNK = 100  # operations of one message and one transaction
PROCESSES = 2  # that work, of every contender
TABLE = os.environ.get("BENCH_TABLE", "mdstore-records")
QUEUE = "bench"
_serializer = TypeSerializer()


def stock_options(endpoint: str, *, without_pause: bool) -> dict[str, Any]:
    """Transport options of kombu's own: a predefined queue, polled at kombu's pace, or without pause, which is 20 ms."""
    return {
        "region": os.environ["AWS_REGION"],
        "is_secure": False,
        "visibility_timeout": 300,
        "predefined_queues": {QUEUE: {"url": f"{endpoint}/000000000000/{QUEUE}"}},
        # Seconds; kombu's own are 1 and 10. No pause at all would have the main process spin while its prefetch is full.
        **({"polling_interval": 0.02, "wait_time_seconds": 1} if without_pause else {}),
    }


def actions(operations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`TransactItems` for operations as JSON gives them, floats included."""
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
