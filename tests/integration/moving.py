"""A process that drains the due-time table until a look finds nothing, writes down what it sent, and is killed where told.

    python -m tests.integration.moving OUT [STEP]

`KILLED` has the steps: a call to DynamoDB, or `send`, and whether the process is killed before or after it.
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

#: Steps of a turn, with the number of the call that the process does not survive.
KILLED = {
    "lease": ("UpdateItem", 1, "after"),
    "look": ("Query", 2, "after"),
    "send": ("send", 3, "after"),
    "delete": ("BatchWriteItem", 3, "after"),
    "return": ("UpdateItem", 6, "before"),
}


class CountingDynamo(DynamoClient):
    """Counts its calls, and tells of each before and after."""

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
    """Signed calls to a service."""
    return SignedHttp(service=service, region="us-east-1", credentials=aws.objects._http._credentials)


def dynamo_of(aws: AwsClients) -> CountingDynamo:
    """A client that counts."""
    client = CountingDynamo(http=http(aws, "dynamodb"), endpoint=aws.dynamodb.meta.endpoint_url)
    client.calls = Counter()
    return client


def sender(aws: AwsClients) -> Send:
    """Sends to the queues by their names."""
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
    """Drain."""
    settings = load_settings().settings
    operation, fatal, when = KILLED.get(step, ("", 0, ""))

    def watch(at: str, number: int, side: str) -> None:
        if (at, side) == (operation, when) and number >= fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    aws = AwsClients(settings)
    dynamo = dynamo_of(aws)
    dynamo.watch = watch
    table = DelayedTable(dynamo=dynamo, table=settings.delayed_table)
    deliver = sender(aws)
    sends = iter(range(1, 10**9))
    with Path(out).open("a", buffering=1) as written:

        def send(batch: Sequence[DelayedMessage]) -> Sequence[DelayedMessage]:
            taken = deliver(batch)
            written.write("".join(f"{one.deduplication_id}\n" for one in taken))
            watch("send", next(sends), "after")
            return taken

        while table.move(send):
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
