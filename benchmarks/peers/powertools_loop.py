"""A loop around Powertools' batch processor: SQS receive -> S3 get -> boto3 transaction -> batched delete.

`python -m benchmarks.peers.powertools_loop` runs one worker. For each message done, it prints the number of operations.
"""

from __future__ import annotations

import json
import os
from typing import Any

import boto3
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from botocore.config import Config

from benchmarks.peers import writing

_BUCKET = "mdstore-payloads"


class Loop:
    """A worker that receives, applies and deletes messages in a loop."""

    def __init__(self) -> None:
        self._s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
        self._sqs = boto3.client("sqs")
        self._dynamodb: Any = boto3.client("dynamodb")
        self._url = self._sqs.get_queue_url(QueueName=writing.QUEUE)["QueueUrl"]

    def run(self) -> None:
        """Work until killed."""
        processor = BatchProcessor(event_type=EventType.SQS)
        while True:
            messages = self._sqs.receive_message(QueueUrl=self._url, MaxNumberOfMessages=10, WaitTimeSeconds=1)
            found = messages.get("Messages", [])
            if not found:
                continue
            records = [
                {"messageId": one["MessageId"], "receiptHandle": one["ReceiptHandle"], "body": one["Body"]}
                for one in found
            ]
            with processor(records=records, handler=self._handle):
                processor.process()
            failed = {one["itemIdentifier"] for one in processor.response()["batchItemFailures"]}
            self._sqs.delete_message_batch(
                QueueUrl=self._url,
                Entries=[
                    {"Id": str(at), "ReceiptHandle": one["ReceiptHandle"]}
                    for at, one in enumerate(found)
                    if one["MessageId"] not in failed
                ],
            )

    def _handle(self, record: SQSRecord) -> None:
        body: Any = self._s3.get_object(Bucket=_BUCKET, Key=record.body)["Body"].read()
        operations = json.loads(body)
        self._dynamodb.transact_write_items(TransactItems=writing.actions(operations))
        print(len(operations), flush=True)


def send(operations: list[dict[str, Any]]) -> None:
    """Store the payloads in S3, and send their messages to SQS in batches of ten."""
    s3 = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], config=Config(s3={"addressing_style": "path"}))
    sqs = boto3.client("sqs")
    url = sqs.get_queue_url(QueueName=writing.QUEUE)["QueueUrl"]
    keys = []
    for start in range(0, len(operations), writing.CHUNK):
        keys.append(f"payloads/bench/{start}")
        s3.put_object(Bucket=_BUCKET, Key=keys[-1], Body=json.dumps(operations[start : start + writing.CHUNK]).encode())
        if len(keys) == 10 or start + writing.CHUNK >= len(operations):
            sqs.send_message_batch(
                QueueUrl=url, Entries=[{"Id": str(at), "MessageBody": key} for at, key in enumerate(keys)]
            )
            keys = []


if __name__ == "__main__":
    Loop().run()
