"""Check each message before a worker's main process uses it: it must be a kombu envelope with a Celery task inside.

Anyone who may send to the queue may send anything, and Celery trusts what the envelope says: a time limit that is text crashes
the worker, a compressed body is decompressed without bound, and arguments that are not a list are dropped.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec

from mdstore.model import MAX_AGE
from mdstore.queue.broker.ascii_json import Decoder, check_objects
from mdstore.queue.broker.canvas import PARTS

#: Control characters. A line break in a name would forge a line in the worker's log.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_MAX_NAME = 500
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_NAME, pattern=rf"\A[^{_CONTROL}]*\Z")]
#: A time limit in seconds, at least 1: killing a process that is still reading its message can take down the whole pool.
Limit = Annotated[float, msgspec.Meta(ge=1)]
#: A group index. It is bounded, because the state of a chord has a shard for each 200 indexes.
Index = Annotated[int, msgspec.Meta(ge=0, lt=1_000_000)]


class Malformed(ValueError):
    """A worker must not execute the message. The text says why."""


class Headers(msgspec.Struct):
    """Checks the Celery headers that other code depends on. All other headers pass unchecked.

    Source: https://docs.celeryq.dev/en/stable/internals/protocol.html
    """

    task: Name
    id: Name
    root_id: Name | None = None
    parent_id: Name | None = None
    group: Name | None = None
    group_index: Index | None = None
    retries: int | None = None
    eta: str | None = None
    expires: str | float | None = None
    timelimit: tuple[Limit | None, Limit | None] | None = None
    shadow: Name | None = None
    ignore_result: bool | None = None
    replaced_task_nesting: int | None = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, Any] | None = None
    compression: None = None


class Properties(msgspec.Struct):
    """Checks how the body is encoded, which is the only property that matters."""

    body_encoding: Literal["base64", "utf-8"] | None = None


class Envelope(msgspec.Struct, rename={"content_type": "content-type", "content_encoding": "content-encoding"}):
    """Checks the outermost layer of a message."""

    body: str
    headers: Headers
    properties: Properties
    content_type: Literal["application/json"]
    content_encoding: Literal["utf-8"]


def in_one_line(text: str) -> str:
    """Return a text as a name in one line: with control characters escaped, and not longer than names may be."""
    return re.sub(f"[{_CONTROL}]", lambda found: ascii(found[0])[1:-1], text)[:_MAX_NAME]


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode, i.e. contains no lone surrogate."""
    return _HALF_PAIR.search(text) is None


class _StrictHeaders(Headers):
    """Checks that the names are valid Unicode, because results and chords are stored under them."""

    def __post_init__(self) -> None:
        for name in ("task", "id", "root_id", "parent_id", "group"):
            value = getattr(self, name) or ""
            if not is_unicode(value):
                raise ValueError(f"{name}={value!r}: expected valid Unicode")


class _StrictEnvelope(Envelope):
    headers: _StrictHeaders


_HALF_PAIR = re.compile("[\ud800-\udfff]")
_envelope = Decoder[Envelope](Envelope, strict=_StrictEnvelope)
_body = Decoder[Any](tuple[list[Any], dict[str, Any], dict[str, Any] | None])


def check(text: str, *, received: bool = False) -> dict[str, Any]:
    """Return the canvas of a task's message. Raise `Malformed`, naming what is wrong, if it is none or not all of it is JSON.

    A message that was `received` must not be due further ahead than SQS keeps messages, which is `MAX_AGE`.
    """
    with _checking("envelope"):
        envelope = _envelope.decode(text)
    with _checking("body"):
        is_base64 = envelope.properties.body_encoding == "base64"
        body = base64.b64decode(envelope.body, validate=True).decode() if is_base64 else envelope.body
        *_, canvas = _body.decode(body)
        check_objects(body)
    with _checking("eta"):
        moment = _moment(envelope.headers.eta)
        if received and moment and moment > datetime.now(UTC) + timedelta(seconds=MAX_AGE):
            raise ValueError(f"{moment}: SQS does not keep a message for that long")
    with _checking("expires"):
        _moment(envelope.headers.expires)
    return {part: canvas[part] for part in PARTS if canvas.get(part)} if canvas else {}


@contextmanager
def _checking(part: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not a task's message: {part}: {error}") from error


def _moment(value: str | float | None) -> datetime | None:
    """Parse an ISO 8601 text, in UTC unless it names a time zone. Return None for anything but text."""
    if not isinstance(value, str):
        return None
    moment = datetime.fromisoformat(value)
    return moment.replace(tzinfo=moment.tzinfo or UTC)


class _TaskHeader(msgspec.Struct):
    task: str = ""


class _TaskMessage(msgspec.Struct):
    headers: _TaskHeader = msgspec.field(default_factory=_TaskHeader)


_task_message = Decoder[_TaskMessage](_TaskMessage)


def task_of(text: str) -> str:
    """Return the task that a message names, or an empty string if it cannot be read."""
    try:
        return _task_message.decode(text).headers.task
    except (ValueError, RecursionError):
        return ""
