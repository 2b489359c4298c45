"""Encode a kombu message for SQS: its body, delay, group and deduplication id."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mdstore.aws.sqs import MAX_DELAY, Entry, is_fifo
from mdstore.errors import InvalidRequest
from mdstore.queue.broker.ascii_json import dumps
from mdstore.queue.broker.envelope import Malformed, check, in_one_line

#: Marks, as a property, a message that is not delivered before its `eta`, because SQS or the table delays it.
DELAYED = "delayed"
#: Matches what SQS accepts as a message group id or a deduplication id.
_ID = re.compile(r"[!-~]{1,128}")
_NOT_IN_ID = re.compile(r"[^!-~]")
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def entry_of(
    queue: str, message: dict[str, Any], *, store: Callable[[str], str] = str, now: float | None = None
) -> Entry:
    """Return the entry that is sent to SQS. `store` returns the body to send for a text, e.g. a pointer to it.

    `now` is in Unix seconds, by default this machine's time.

    Raises `InvalidRequest` for a task's message that no worker would accept.
    """
    properties, headers = message.get("properties", {}), message.get("headers") or {}
    group = _checked_id(properties, "MessageGroupId")
    attributes = _checked_attributes(properties.pop("message_attributes", None))
    if headers.get("eta"):
        properties[DELAYED] = True
    if isinstance(shadow := headers.get("shadow"), str):
        headers["shadow"] = in_one_line(shadow)
    text = dumps(message)
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
        message_group_id=group or group_id(str(headers.get("task", "default"))),
        message_deduplication_id=_checked_id(properties, "MessageDeduplicationId") or deduplication_id(message),
        message_attributes=attributes,
    )


def _check(text: str, task: object) -> None:
    try:
        check(text)
    except Malformed as error:
        raise InvalidRequest(field="message", value=task, expected=f"a task that a worker takes ({error})") from error


def group_id(name: str) -> str:
    """Return the message group of a task's name: the name if SQS accepts it, else most of it and a digest of all of it."""
    if _ID.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:32]
    return f"{_NOT_IN_ID.sub('-', name)[:95]}-{digest}"


def _checked_id(properties: dict[str, Any], field: str) -> str | None:
    """Return an id that the caller chose, or None. It is never changed, because others may use the same id."""
    value: str | None = properties.get(field)
    if value and not (isinstance(value, str) and _ID.fullmatch(value)):
        raise InvalidRequest(field=field, value=value, expected="1-128 ASCII letters, digits or punctuation")
    return value


def _checked_attributes(attributes: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the message attributes. Raises `InvalidRequest` for one that SQS would refuse with the whole batch."""
    for name, value in (attributes or {}).items():
        if any(isinstance(text, str) and _NOT_IN_XML.search(text) for text in (name, *value.values())):
            raise InvalidRequest(
                field=f"message_attributes[{name!r}]", value=value, expected="characters that SQS accepts (XML 1.0)"
            )
    return attributes


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
    """Return 64 characters that distinguish a task's message from those of its retries and its replacements."""
    headers = message.get("headers") or {}
    identity = [headers.get(name) for name in ("id", "retries", "replaced_task_nesting", "task")]
    text = dumps(identity if identity[0] else message["properties"]["delivery_tag"])
    return hashlib.sha256(text.encode()).hexdigest()
