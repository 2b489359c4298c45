"""A process that moves delayed messages until none is left to move, and writes the ids of those it sent to a file.

    python -m tests.integration.moving OUT [STEP]

STEP is a key of `KILL_POINTS`: the call to DynamoDB, or the `send`, before or after which the process kills itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdstore.aws.clients import AwsClients
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.http import SignedHttp
from mdstore.aws.sqs import Entry, Sqs
from mdstore.queue.delayed.table import DelayedMessage, DelayedTable, Send
from mdstore.settings import load_settings

#: For each step of a leased run: the call, the number of that call which the process does not survive, and the moment.
KILL_POINTS = {
    "lease": ("UpdateItem", 1, "after"),
    "query": ("Query", 2, "after"),
    "send": ("send", 3, "after"),
    "delete": ("BatchWriteItem", 3, "after"),
    "return": ("UpdateItem", 6, "before"),
}


class CountingDynamo(DynamoClient):
    """A DynamoDB client that counts its calls, and calls `watch` before and after each."""

    calls: Counter[str]
    lock = threading.Lock()
    watch: Callable[[str, int, str], None] = staticmethod(lambda *_: None)

    def call(self, operation: str, body: Mapping[str, Any] | bytes, *, deadline: float | None = None) -> Any:
        with self.lock:
            self.calls[operation] += 1
            number = self.calls[operation]
        self.watch(operation, number, "before")
        answer = super().call(operation, body, deadline=deadline)
        self.watch(operation, number, "after")
        return answer


def http(aws: AwsClients, service: str) -> SignedHttp:
    """Return a client for signed calls to `service`."""
    return SignedHttp(service=service, region="us-east-1", credentials=aws.objects._http._credentials)


def counting_dynamo(aws: AwsClients) -> CountingDynamo:
    """Return a DynamoDB client that counts its calls."""
    client = CountingDynamo(http=http(aws, "dynamodb"), endpoint=aws.dynamodb.meta.endpoint_url)
    client.calls = Counter()
    return client


def sender(aws: AwsClients) -> Send:
    """Return a function that sends a batch to its queue and returns the messages that SQS accepted."""
    sqs = Sqs(http=http(aws, "sqs"), endpoint=aws.sqs.meta.endpoint_url)
    urls: dict[str, str] = {}

    def send(batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
        queue = batch[0].queue
        if queue not in urls:
            urls[queue] = aws.sqs.get_queue_url(QueueName=queue)["QueueUrl"]
        entries = [
            Entry(message_body=one.body, delay_seconds=one.delay_seconds, message_group_id=one.group_id)
            for one in batch
        ]
        return [one for one, failed in zip(batch, sqs.send(urls[queue], entries), strict=True) if failed is None]

    return send


def main(out: str, step: str = "") -> None:
    """Move delayed messages until none is left to move."""
    settings = load_settings().settings
    operation, fatal, when = KILL_POINTS.get(step, ("", 0, ""))

    def watch(at: str, number: int, side: str) -> None:
        if (at, side) == (operation, when) and number >= fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    aws = AwsClients(settings)
    dynamo = counting_dynamo(aws)
    dynamo.watch = watch
    table = DelayedTable(dynamo=dynamo, table=settings.delayed_table)
    deliver = sender(aws)
    sends = iter(range(1, 10**9))
    with Path(out).open("a", buffering=1) as output:

        def send(batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
            accepted = deliver(batch)
            output.write("".join(f"{one.deduplication_id}\n" for one in accepted))
            watch("send", next(sends), "after")
            return accepted

        while table.move(send):
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
