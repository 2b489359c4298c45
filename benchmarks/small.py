"""Requests of one operation each, with 10 ms per call to AWS: this project, and twenty lines of boto3 (`seed-like`).

The producers' 32 threads submit all requests before two worker processes start. `accepted_per_s` is the rate of the producer,
`applied_per_s` that of the workers, without their start. Calls and write units are per request, from submission to deletion;
`dollars_per_million` is their price in us-east-1 (S3 Standard, SQS standard queue, DynamoDB on demand), as listed in this
module. AWS is a stand-in in memory (`benchmarks.memory_aws`), because an emulator would be slower than the contenders.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest import mock

import boto3

from benchmarks.alone import alone
from benchmarks.peers.seed_like import Producer
from benchmarks.peers.writing import PROCESSES, QUEUE
from benchmarks.pipeline import listed, worker_process
from benchmarks.results import Result, Row, median
from benchmarks.services import environ_of, memory_aws
from mdstore.client import Client
from mdstore.settings import Settings

Submit = Callable[[list[dict[str, Any]]], object]
_REQUESTS = 1_000
_CLIENTS = 32
_LATENCY_MS = 10.0
_WARM_UP = 0.1  # the part of all requests that is applied before the measurement begins
#: Dollars per million calls; reads and writes of DynamoDB are priced by unit (https://aws.amazon.com/pricing/, us-east-1).
_PRICES: Mapping[str, float] = {
    "PUT object": 5.0, "GET object": 0.4, "SQS": 0.4, "write units": 0.625, "read units": 0.125,
}  # fmt: skip
_SQS_CALLS = ("SendMessage", "SendMessageBatch", "ReceiveMessage", "DeleteMessage", "DeleteMessageBatch",
              "ChangeMessageVisibility", "ChangeMessageVisibilityBatch")  # fmt: skip
_READS = ("GetItem", "BatchGetItem", "Query")
_WRITES = ("PutItem", "UpdateItem", "DeleteItem", "TransactWriteItems")


def run(*, runs: int, scale: float) -> Result:
    """Measure. Each row has the rates, and the calls, write units and dollars."""
    count = max(60, int(_REQUESTS * scale))
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(runs):
        for name in CONTENDERS:
            found[name].append(alone(_measure, name, count))
    rows: list[Row] = []
    for name, measured in found.items():
        row: Row = {"contender": name}
        for column in measured[0]:
            row[column] = round(median([one[column] for one in measured]), 2)
        rows.append(row)
    return Result(name="small", title=__doc__ or "", runs=runs, rows=rows)


def _measure(name: str, count: int) -> dict[str, float]:
    with memory_aws(_LATENCY_MS) as settings, mock.patch.dict(os.environ, environ_of(settings)):
        boto3.client("sqs").create_queue(QueueName=QUEUE, Attributes={"VisibilityTimeout": "300"})
        make_submit, worker, processes = CONTENDERS[name]
        submit, before = make_submit(settings), _counts(settings, "_calls")
        requests = [[operation] for operation in listed(count)]
        began = time.perf_counter()
        with ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(submit, requests))
        accepted = count / (time.perf_counter() - began)
        with ExitStack() as stack:
            for _ in range(processes):
                stack.enter_context(worker_process(worker))
            first = round(count * _WARM_UP)
            _wait_for(settings, first)
            began = time.perf_counter()
            _wait_for(settings, count)
            applied = (count - first) / (time.perf_counter() - began)
            time.sleep(1.5)  # until the last messages are deleted
        calls = _counts(settings, "_calls")
    used = {call: (calls[call] - before.get(call, 0)) / count for call in calls}
    sums = {
        "s3_calls": used.get("PUT object", 0) + used.get("GET object", 0),
        "sqs_calls": sum(used.get(call, 0) for call in _SQS_CALLS),
        "dynamodb_calls": sum(used.get(call, 0) for call in (*_READS, *_WRITES)),
        "write_units": used["write units"],
    }
    priced = {**used, "SQS": sums["sqs_calls"], "read units": sum(used.get(call, 0) for call in _READS)}
    dollars = sum(price * priced.get(what, 0) for what, price in _PRICES.items())
    return {"accepted_per_s": accepted, "applied_per_s": applied, **sums, "dollars_per_million": dollars}


def _counts(settings: Settings, what: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{settings.endpoint_url}/{what}") as answer:  # noqa: S310  our own stand-in
        found: dict[str, int] = json.loads(answer.read())
    return found


def _wait_for(settings: Settings, records: int) -> None:
    deadline = time.monotonic() + 300
    while (found := _counts(settings, "_items")[settings.records_table]) < records:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{found} of {records} requests were applied")
        time.sleep(0.02)


def _mdstore(settings: Settings) -> Submit:
    client = Client(settings)
    return client.submit


def _seed_like(_: Settings) -> Submit:
    return Producer().submit


#: How requests are submitted, and the processes that work: a name of `worker_process`, and how many of these.
CONTENDERS = {"seed-like": (_seed_like, "seed_like", PROCESSES), "mdstore": (_mdstore, "mdstore", 1)}
