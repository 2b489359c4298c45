"""What requests cost: their calls to AWS, their write units and their price, as the stand-in for AWS counts them."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping

import boto3

from benchmarks.results import Row
from mdstore.settings import Settings

#: Dollars per million calls; reads and writes of DynamoDB are priced by unit (https://aws.amazon.com/pricing/, us-east-1).
_PRICES: Mapping[str, float] = {
    "PUT object": 5.0, "GET object": 0.4, "SQS": 0.4, "write units": 0.625, "read units": 0.125,
}  # fmt: skip
_SQS_CALLS = ("SendMessage", "SendMessageBatch", "ReceiveMessage", "DeleteMessage", "DeleteMessageBatch",
              "ChangeMessageVisibility", "ChangeMessageVisibilityBatch")  # fmt: skip
_READS = ("GetItem", "BatchGetItem", "Query")
_WRITES = ("PutItem", "UpdateItem", "DeleteItem", "TransactWriteItems")
_QUIET = 0.5  # seconds without another deletion of a message, after which all are deleted


def counts(settings: Settings) -> dict[str, int]:
    """Return how often each operation was called so far, and the write units."""
    with urllib.request.urlopen(f"{settings.endpoint_url}/_calls") as answer:  # noqa: S310  our own stand-in
        found: dict[str, int] = json.loads(answer.read())
    return found


def final_counts(settings: Settings) -> dict[str, int]:
    """Wait until the last messages are deleted, then return the counts."""
    before, quiet = 0, 0.0
    while quiet < _QUIET:
        time.sleep(0.1)
        found = counts(settings)
        deletions = found.get("DeleteMessage", 0) + found.get("DeleteMessageBatch", 0)
        quiet = quiet + 0.1 if deletions == before else 0.0
        before = deletions
    return found


def costs(before: Mapping[str, int], after: Mapping[str, int], requests: int) -> Row:
    """Return calls, write units, and dollars per million, of one of `requests` between both counts."""
    used = {call: (after[call] - before.get(call, 0)) / requests for call in after}
    sums = {
        "s3_calls": used.get("PUT object", 0) + used.get("GET object", 0),
        "sqs_calls": sum(used.get(call, 0) for call in _SQS_CALLS),
        "dynamodb_calls": sum(used.get(call, 0) for call in (*_READS, *_WRITES)),
        "write_units": used["write units"],
    }
    priced = {**used, "SQS": sums["sqs_calls"], "read units": sum(used.get(call, 0) for call in _READS)}
    return {**sums, "dollars_per_million": sum(price * priced.get(what, 0) for what, price in _PRICES.items())}


def wait_for(settings: Settings, count: int) -> int:
    """Wait until there are at least `count` records, and return how many. Raises `RuntimeError` after five minutes.

    The stand-in and the embedded AWS know a table's number of items at any time; AWS updates it every six hours.
    """
    client = boto3.client("dynamodb")
    deadline = time.monotonic() + 300
    while (found := client.describe_table(TableName=settings.records_table)["Table"]["ItemCount"]) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{found} of {count} requests were applied")
        time.sleep(0.02)
    return found
