"""What a message must look like before a worker's main process touches it: an envelope of kombu's around a task of Celery's.

Whoever may send to the queue may send anything. What follows the envelope in Celery believes it: a time limit that is text ends
the worker, a compressed body is inflated without bound, arguments that are no list are dropped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec

from mdstore.model import MAX_AGE

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
#: A process that is killed while it still reads its message can take the whole pool with it.
Limit = Annotated[float, msgspec.Meta(ge=1)]
#: A join has a shard for each 200.
Index = Annotated[int, msgspec.Meta(ge=0, lt=1_000_000)]


class Malformed(ValueError):
    """Why a message is not one that a worker may execute."""


class Headers(msgspec.Struct):
    """Those of Celery's headers that something depends on; others are as they are.

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
    """How the body is written."""

    body_encoding: Literal["base64", "utf-8"] | None = None


class Envelope(msgspec.Struct, rename={"content_type": "content-type", "content_encoding": "content-encoding"}):
    """The message itself."""

    body: str
    headers: Headers
    properties: Properties
    content_type: Literal["application/json"]
    content_encoding: Literal["utf-8"]


_envelope = msgspec.json.Decoder(Envelope)
_body = msgspec.json.Decoder(tuple[list[Any], dict[str, Any], dict[str, Any] | None])


def check(text: str, *, received: bool = False) -> None:
    """Raise `Malformed`, naming what is wrong, unless `text` is a task's message in JSON, all through.

    One that was `received` may not be due later than SQS can have kept it.
    """
    with _judging("envelope"):
        envelope = _envelope.decode(text)
    with _judging("body"):
        is_base64 = envelope.properties.body_encoding == "base64"
        _body.decode(base64.b64decode(envelope.body, validate=True) if is_base64 else envelope.body)
    with _judging("eta"):
        moment = _moment(envelope.headers.eta)
        if received and moment and moment > datetime.now(UTC) + timedelta(seconds=MAX_AGE):
            raise ValueError(f"{moment}: SQS keeps no message for that long")
    with _judging("expires"):
        _moment(envelope.headers.expires)


@contextmanager
def _judging(part: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not a task's message: {part}: {error}") from error


def _moment(value: str | float | None) -> datetime | None:
    """The moment that text says."""
    if not isinstance(value, str):
        return None
    moment = datetime.fromisoformat(value)
    return moment.replace(tzinfo=moment.tzinfo or UTC)


class _Task(msgspec.Struct):
    task: str = ""


class _Named(msgspec.Struct):
    headers: _Task = msgspec.field(default_factory=_Task)


_named = msgspec.json.Decoder(_Named)


def task_of(text: str) -> str:
    """The task that a message names, empty where that cannot be read."""
    try:
        return _named.decode(text).headers.task
    except (ValueError, RecursionError):
        return ""
