"""The latency of requests of one operation, from submit to applied, compared with the sum of the AWS calls that they need.

boto3 makes these bare calls: S3 put, SQS send, receive (a poll that already waits for the message), S3 get, and a
transaction of one put.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import boto3
from botocore.config import Config

from benchmarks.pipeline import worker_process
from benchmarks.records import RECORD
from benchmarks.results import Result, Row, median, percentile
from benchmarks.services import embedded_aws, environ_of
from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import to_item
from mdstore.client import Client
from mdstore.settings import Settings

_REQUESTS = 200
_WARM_UP = 20
_CALLS = ("S3 put", "SQS send", "receive", "S3 get", "transaction")
_APPLIED, _KNOWN = "mdstore, submit to applied", "mdstore, submit to known by the submitter"
_QUEUE = "bench"


def run(*, runs: int, scale: float) -> Result:
    """Measure. Rows have p50 and p99 in milliseconds, as medians over the runs."""
    count = max(20, int(_REQUESTS * scale))
    found: dict[str, list[list[float]]] = defaultdict(list)
    for _ in range(runs):
        with embedded_aws("benchmarks.prompt_aws") as settings, mock.patch.dict(os.environ, environ_of(settings)):
            for name, values in measure(settings, count).items():
                found[name].append(values)
    return Result(name="latency", title=__doc__ or "", runs=runs, rows=rows_of(found))


def measure(settings: Settings, count: int) -> dict[str, list[float]]:
    """Return the seconds of each of the bare calls, and of requests until they are applied and until they are known."""
    found = {**_bare(settings, count), **_requests(settings, count)}
    return {name: values[_WARM_UP:] for name, values in found.items()}


def rows_of(found: Mapping[str, list[list[float]]]) -> list[Row]:
    """Return the rows of several runs, by name of what `measure` returns."""

    def row(name: str, sums: list[list[float]]) -> Row:
        p50 = median([percentile(values, 0.5) for values in sums])
        p99 = median([percentile(values, 0.99) for values in sums])
        return {"what": name, "p50_ms": round(p50 * 1e3, 2), "p99_ms": round(p99 * 1e3, 2)}

    rows = [row(name, found[name]) for name in _CALLS]
    bare = [
        [sum(calls) for calls in zip(*one, strict=True)] for one in zip(*(found[name] for name in _CALLS), strict=True)
    ]
    rows.append(row("sum of the bare calls", bare))
    for name in (_APPLIED, _KNOWN):
        rows.append(row(name, found[name]))
        rows[-1]["p50_of_the_bare_calls"] = round(rows[-1]["p50_ms"] / rows[len(_CALLS)]["p50_ms"], 2)
    return rows


def _bare(settings: Settings, count: int) -> dict[str, list[float]]:
    """Return the seconds of each call. Calls are made one after the other, while another thread polls for the messages."""
    s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    sqs, dynamodb = boto3.client("sqs"), boto3.client("dynamodb")
    url = sqs.create_queue(QueueName=_QUEUE)["QueueUrl"]
    received: queue.Queue[float] = queue.Queue()
    finished = threading.Event()

    def receive() -> None:
        client = boto3.client("sqs")
        while not finished.is_set():
            for message in client.receive_message(QueueUrl=url, WaitTimeSeconds=1).get("Messages", []):
                received.put(time.perf_counter())
                client.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])

    receiver = threading.Thread(target=receive)
    receiver.start()
    found: dict[str, list[float]] = defaultdict(list)
    body = exactjson.dumps({"op": "insert", "entity": "bench", "key": "k", "data": RECORD})

    def timed(name: str, call: Callable[[], Any]) -> None:
        began = time.perf_counter()
        call()
        found[name].append(time.perf_counter() - began)

    for _ in range(count + _WARM_UP):
        key = f"payloads/bare/{uuid.uuid4()}"
        item = to_item({"pk": key, "entity": "bench", "key": key, "version": 1, "data": RECORD, "updated_by": key})
        timed("S3 put", lambda key=key: s3.put_object(Bucket=settings.bucket, Key=key, Body=body))  # type: ignore[misc]
        timed("SQS send", lambda key=key: sqs.send_message(QueueUrl=url, MessageBody=key))  # type: ignore[misc]
        sent = time.perf_counter()
        found["receive"].append(max(0.0, received.get(timeout=30) - sent))
        timed("S3 get", lambda key=key: s3.get_object(Bucket=settings.bucket, Key=key)["Body"].read())  # type: ignore[misc]
        put = {
            "Put": {
                "TableName": settings.records_table,
                "Item": item,
                "ConditionExpression": "attribute_not_exists(pk)",
            }
        }
        timed("transaction", lambda put=put: dynamodb.transact_write_items(TransactItems=[put]))  # type: ignore[misc]
    finished.set()
    receiver.join()
    return found


def _requests(settings: Settings, count: int) -> dict[str, list[float]]:
    """Return the seconds from before `submit` until the worker had the transaction's answer, and until the submitter knew."""
    client = Client(settings)
    found: dict[str, list[float]] = defaultdict(list)
    with worker_process("mdstore"):
        for _ in range(count + _WARM_UP):
            operation = {"op": "insert", "entity": "bench", "key": str(uuid.uuid4()), "data": RECORD}
            began = time.time()
            submission = client.submit([operation]).wait(timeout=60)
            known = time.time()
            status = submission.status()
            assert status.finished_at is not None  # noqa: S101  a completed request has it
            found[_APPLIED].append(status.finished_at - began)
            found[_KNOWN].append(known - began)
    return found
