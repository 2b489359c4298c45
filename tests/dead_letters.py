"""Receives dead letters."""

from __future__ import annotations

from typing import Any


def receive_dead_letters(sqs: Any, queue: str) -> list[dict[str, Any]]:
    """Receive up to ten messages of a dead-letter queue; returns body and attributes of each. They stay hidden for 10 min."""
    answer = sqs.receive_message(
        QueueUrl=sqs.get_queue_url(QueueName=queue)["QueueUrl"],
        MaxNumberOfMessages=10,
        WaitTimeSeconds=1,
        MessageAttributeNames=["All"],
        VisibilityTimeout=600,
    )
    return [
        {
            "body": message["Body"],
            **{name: value["StringValue"] for name, value in message.get("MessageAttributes", {}).items()},
        }
        for message in answer.get("Messages", [])
    ]
