"""Store messages that must not be executed in the dead-letter queue, each with its reason."""

from __future__ import annotations

from mdstore.aws.sqs import Entry, Sqs
from mdstore.errors import DeploymentBroken, Unavailable

_MAX_REASON = 10_000  # characters, the traceback included


def dead_letter(sqs: Sqs, queue: str, *, body: str, reason: str, task: str, receives: int) -> None:
    """Send a message to the dead-letter queue, with its reason, task and number of receives as message attributes.

    Raises `Unavailable` or `DeploymentBroken`.
    """
    attributes = {
        "reason": {"DataType": "String", "StringValue": _printable(reason, _MAX_REASON)},
        "task": {"DataType": "String", "StringValue": _printable(task, 1_000)},
        "receives": {"DataType": "Number", "StringValue": str(receives)},
    }
    (failed,) = sqs.send(sqs.url(queue), [Entry(message_body=body, message_attributes=attributes)])
    if failed is not None:
        kind = DeploymentBroken if failed.sender_fault else Unavailable
        raise kind(f"SQS dead letter: {failed.message}", code=failed.code)


def _printable(text: str, most: int) -> str:
    # SQS accepts only the characters of XML 1.0.
    clean = "".join(character if character.isprintable() or character == "\n" else "?" for character in text[:most])
    return clean or "unknown"
