"""Twenty lines of boto3: SQS receive -> in ten threads, S3 get and a transaction -> batched delete. It has no receipts.

`python -m benchmarks.peers.seed_like` runs one worker.
"""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config

from benchmarks.peers import writing

THREADS = 10
_BUCKET = "mdstore-payloads"
_CONFIG = Config(max_pool_connections=64, s3={"addressing_style": "path"})


class Applier:
    """Applies requests. Threads may share it."""

    def __init__(self) -> None:
        self._s3, self._dynamodb = boto3.client("s3", config=_CONFIG), boto3.client("dynamodb", config=_CONFIG)

    def apply(self, key: str) -> None:
        """Read a request from S3, and apply it in one transaction."""
        body: Any = self._s3.get_object(Bucket=_BUCKET, Key=key)["Body"].read()
        self._dynamodb.transact_write_items(TransactItems=writing.actions(json.loads(body)))  # type: ignore[arg-type]


class Producer:
    """Accepts requests: it stores each in S3, and sends a message that names it. Threads may share it."""

    def __init__(self) -> None:
        self._s3, self._sqs = boto3.client("s3", config=_CONFIG), boto3.client("sqs", config=_CONFIG)
        self._url = self._sqs.get_queue_url(QueueName=writing.QUEUE)["QueueUrl"]

    def submit(self, operations: list[dict[str, Any]]) -> None:
        """Accept one request."""
        self._sqs.send_message(QueueUrl=self._url, MessageBody=self.store(operations))

    def store(self, operations: list[dict[str, Any]]) -> str:
        """Store a request in S3, and return its key."""
        key = f"payloads/{uuid.uuid4()}"
        self._s3.put_object(Bucket=_BUCKET, Key=key, Body=json.dumps(operations).encode())
        return key


def run() -> None:
    """Work until killed."""
    applier = Applier()
    sqs: Any = boto3.client("sqs", config=_CONFIG)
    url = sqs.get_queue_url(QueueName=writing.QUEUE)["QueueUrl"]
    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            found = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1).get("Messages", [])
            if found:
                list(pool.map(applier.apply, [one["Body"] for one in found]))
                entries = [{"Id": str(at), "ReceiptHandle": one["ReceiptHandle"]} for at, one in enumerate(found)]
                sqs.delete_message_batch(QueueUrl=url, Entries=entries)


if __name__ == "__main__":
    run()
