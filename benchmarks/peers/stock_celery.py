"""Stock Celery on SQS with its DynamoDB backend: a chord of boto3 tasks, one message per 100 operations.

Its queue is predefined. With `BENCH_WITHOUT_PAUSE` in the environment, it pauses for 20 ms between polls instead of a second.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import boto3
from celery import Celery, chord
from celery.signals import worker_process_init

from benchmarks.peers import writing

_ENDPOINT = urlsplit(os.environ["AWS_ENDPOINT_URL"])

app = Celery(
    "stock",
    broker=f"sqs://{_ENDPOINT.netloc}//",
    # With keys in this URL, the client would be created before the fork, and the processes would share its socket.
    backend=f"dynamodb://@localhost:{_ENDPOINT.port}/bench-results",
)
app.conf.update(
    broker_transport_options=writing.stock_options(
        os.environ["AWS_ENDPOINT_URL"], without_pause="BENCH_WITHOUT_PAUSE" in os.environ
    ),
    task_default_queue=writing.QUEUE,
    task_acks_late=True,
    worker_concurrency=writing.PROCESSES,
    worker_hijack_root_logger=False,
)
_client: Any = None


@worker_process_init.connect
def _connect(**_: Any) -> None:
    global _client  # noqa: PLW0603  a task module would usually keep its client like this
    _client = boto3.client("dynamodb")


@app.task
def apply(operations: list[dict[str, Any]]) -> int:
    """Apply the operations in one transaction."""
    _client.transact_write_items(TransactItems=writing.actions(operations))
    return len(operations)


@app.task
def finish(counts: list[int]) -> int:
    """Return the number of all applied operations."""
    return sum(counts)


def submit(operations: list[dict[str, Any]]) -> int:
    """Send all operations, wait, and return the number of applied operations."""
    header = [apply.s(operations[start : start + writing.CHUNK]) for start in range(0, len(operations), writing.CHUNK)]
    applied: int = chord(header)(finish.s()).get(timeout=600, interval=writing.INTERVAL)
    return applied
