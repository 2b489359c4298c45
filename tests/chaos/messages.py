"""The messages of a queue, seen from outside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mdstore.settings import Settings
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mypy_boto3_sqs import SQSClient
    from mypy_boto3_sqs.literals import QueueAttributeFilterType, QueueAttributeNameType

_COUNTS: Sequence[QueueAttributeFilterType] = [
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
]


class Messages:
    """A new queue and its new dead-letter queue."""

    def __init__(self, sqs: SQSClient, settings: Settings) -> None:
        self._sqs = sqs
        self._dead = sqs.create_queue(QueueName=settings.dead_letter_queue)["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=self._dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": str(settings.max_receives)})
        attributes: Mapping[QueueAttributeNameType, str] = {"RedrivePolicy": redrive}
        self._queue = sqs.create_queue(QueueName=settings.queue, Attributes=attributes)["QueueUrl"]

    def wait_until_acknowledged(self) -> None:
        """Wait until the queue has no visible or hidden message, and assert that none was dead-lettered."""
        until(lambda: not self._count(self._queue), within=60, what="every message is acknowledged")
        assert self._count(self._dead) == 0

    def _count(self, url: str) -> int:
        found = self._sqs.get_queue_attributes(QueueUrl=url, AttributeNames=_COUNTS)["Attributes"]
        return sum(map(int, found.values()))
