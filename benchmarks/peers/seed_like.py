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
_CONFIG = Config(max_pool_connections=32, s3={"addressing_style": "path"})


def run() -> None:
    """Work until killed."""
    s3, dynamodb = boto3.client("s3", config=_CONFIG), boto3.client("dynamodb", config=_CONFIG)
    sqs: Any = boto3.client("sqs", config=_CONFIG)
    url = sqs.get_queue_url(QueueName=writing.QUEUE)["QueueUrl"]

    def apply(message: dict[str, Any]) -> None:
        body: Any = s3.get_object(Bucket=_BUCKET, Key=message["Body"])["Body"].read()
        dynamodb.transact_write_items(TransactItems=writing.actions(json.loads(body)))  # type: ignore[arg-type]

    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            found = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1).get("Messages", [])
            if found:
                list(pool.map(apply, found))
                entries = [{"Id": str(at), "ReceiptHandle": one["ReceiptHandle"]} for at, one in enumerate(found)]
                sqs.delete_message_batch(QueueUrl=url, Entries=entries)


class Producer:
    """Accepts requests: it stores each in S3, and sends a message that names it. Threads may share it."""

    def __init__(self) -> None:
        self._s3, self._sqs = boto3.client("s3", config=_CONFIG), boto3.client("sqs", config=_CONFIG)
        self._url = self._sqs.get_queue_url(QueueName=writing.QUEUE)["QueueUrl"]

    def submit(self, operations: list[dict[str, Any]]) -> None:
        """Accept one request."""
        key = f"payloads/{uuid.uuid4()}"
        self._s3.put_object(Bucket=_BUCKET, Key=key, Body=json.dumps(operations).encode())
        self._sqs.send_message(QueueUrl=self._url, MessageBody=key)


if __name__ == "__main__":
    run()
