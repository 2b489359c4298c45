"""Dead letters: messages that must not be executed, kept with the reason why."""

from __future__ import annotations

from typing import Any

from mdstore import exactjson
from mdstore.aws import translated
from mdstore.store import Store

_MAX_REASON = 1_000


def dead_letter(store: Store, *, task: str, message: Any, reason: str, receives: int) -> None:
    """Put a message into the dead-letter queue; its reason, task and attempts are message attributes."""
    sqs = store.aws.sqs
    with translated("SQS dead letter"):
        url = sqs.get_queue_url(QueueName=store.settings.dead_letter_queue)["QueueUrl"]
        sqs.send_message(
            QueueUrl=url,
            MessageBody=exactjson.dumps({"task": task, "message": message}).decode(),
            MessageAttributes={
                "reason": {"DataType": "String", "StringValue": _printable(reason)},
                "task": {"DataType": "String", "StringValue": task},
                "receives": {"DataType": "Number", "StringValue": str(receives)},
            },
        )


def _printable(reason: str) -> str:
    # SQS takes only the characters of XML 1.0.
    clean = "".join(character if character.isprintable() else "?" for character in reason[:_MAX_REASON])
    return clean or "unknown"
