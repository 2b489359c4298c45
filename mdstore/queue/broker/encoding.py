"""Encode a kombu message for SQS: its body, delay, group and deduplication id."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from mdstore.aws.sqs import MAX_DELAY, Entry, is_fifo
from mdstore.errors import InvalidRequest
from mdstore.queue.broker.envelope import Malformed, check

#: The property of a message that is not delivered before its `eta`, because SQS or the table delays it.
DELAYED = "delayed"

_encode = msgspec.json.Encoder().encode


def entry_of(
    queue: str, message: dict[str, Any], *, store: Callable[[str], str] = str, now: float | None = None
) -> Entry:
    """Return the entry that is sent to SQS. `store` returns the body to send for a text, e.g. a pointer to it.

    `now` is the time in Unix seconds, by default of this machine's clock.

    Raises `InvalidRequest` for a task's message that no worker would accept.
    """
    properties, headers = message.get("properties", {}), message.get("headers") or {}
    group = properties.get("MessageGroupId")
    attributes = properties.pop("message_attributes", None)
    if headers.get("eta"):
        properties[DELAYED] = True
    text = _encode(message).decode()
    if "task" in headers:
        _check(text, headers["task"])
    body = store(text)
    if not is_fifo(queue):
        return Entry(
            message_body=body,
            delay_seconds=min(MAX_DELAY, delay_of(message, now=now)) or None,
            message_group_id=group,
            message_attributes=attributes,
        )
    return Entry(
        message_body=body,
        message_group_id=group or str(headers.get("task", "default")),
        message_deduplication_id=properties.get("MessageDeduplicationId") or deduplication_id(message),
        message_attributes=attributes,
    )


def _check(text: str, task: object) -> None:
    try:
        check(text)
    except Malformed as error:
        raise InvalidRequest(field="message", value=task, expected=f"a task that a worker takes ({error})") from error


def due_beyond_sqs(queue: str, message: dict[str, Any], *, now: float | None = None) -> float | None:
    """Return when a message is due, in Unix seconds, if SQS cannot delay it for that long; else None.

    SQS delays a message for 15 minutes at most, and a single message of a FIFO queue not at all.
    """
    now = time.time() if now is None else now
    delay = delay_of(message, now=now)
    return now + delay if delay > (0 if is_fifo(queue) else MAX_DELAY) else None


def delay_of(message: dict[str, Any], *, now: float | None = None) -> int:
    """Return in how many whole seconds a message is due.

    That is the later of its task's `eta` (which a countdown sets too) and kombu's `delay_seconds`.
    """
    properties, due = message.get("properties", {}), eta_of(message)
    seconds = float(properties.get("delay_seconds") or properties.get("DelaySeconds") or 0)
    if due is not None:
        seconds = max(seconds, due - (time.time() if now is None else now))
    return max(0, math.ceil(seconds))


def eta_of(message: dict[str, Any]) -> float | None:
    """Return the `eta` of a message's task in Unix seconds, or None if it has none."""
    eta = (message.get("headers") or {}).get("eta")
    if not eta:
        return None
    due = datetime.fromisoformat(eta)
    return due.replace(tzinfo=due.tzinfo or UTC).timestamp()


def deduplication_id(message: dict[str, Any]) -> str:
    """Return 64 characters that tell a task's message from those of its retries and of the tasks that replace it."""
    headers = message.get("headers") or {}
    identity = [headers.get(name) for name in ("id", "retries", "replaced_task_nesting", "task")]
    return hashlib.sha256(_encode(identity if identity[0] else message["properties"]["delivery_tag"])).hexdigest()
