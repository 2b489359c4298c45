"""Validation of messages from control, reply and event queues. No other code reads a message that has not passed it.

The envelope is kombu's. Here a new one is built from the fields that were checked, and all other fields are dropped.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from mdstore.queue.broker.ascii_json import Decoder, dumps
from mdstore.queue.broker.envelope import Malformed, Name, Properties
from mdstore.queue.control.topics import REPLY_ID, Kind

MAX_BYTES = 256 * 1024  # of an SNS message
#: Seconds for which a command is still obeyed after it has expired, to allow for the time in SNS and for clocks that differ.
EXPIRY_TOLERANCE = 30.0

Clock = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Headers(msgspec.Struct):
    """Holds the headers of kombu that are used. Only commands have `expires`, and only answers have `ticket`."""

    clock: Clock | None = None
    expires: float | None = None
    ticket: Name | None = None


class Envelope(msgspec.Struct, rename={"content_type": "content-type", "content_encoding": "content-encoding"}):
    """Holds a message: an encoded body, and what is needed to decode and route it."""

    body: str
    properties: Properties
    content_type: Literal["application/json"]
    content_encoding: Literal["utf-8"]
    headers: Headers = msgspec.field(default_factory=Headers)


class ReplyTo(msgspec.Struct):
    """Names the exchange and routing key of an answer. Only reply queues of the namespace are allowed."""

    exchange: Name
    routing_key: Annotated[str, msgspec.Meta(pattern=REPLY_ID)]


class Command(msgspec.Struct, forbid_unknown_fields=True):
    """Holds a command to workers.

    Source: https://docs.celeryq.dev/en/stable/userguide/workers.html#remote-control, kombu.pidbox.Mailbox._publish
    """

    method: Name
    arguments: dict[str, Any] | None = None
    destination: list[Name] | None = None
    pattern: Name | None = None
    matcher: Name | None = None
    ticket: Name | None = None
    reply_to: ReplyTo | None = None


class Event(msgspec.Struct):
    """Holds the fields that every event has. The other fields depend on the event's type, and are not checked."""

    type: Name
    hostname: Name
    timestamp: float
    clock: Clock | None = None
    utcoffset: float = 0
    uuid: Name | None = None


_envelope = Decoder[Envelope](Envelope)
_bodies: Mapping[Kind, Decoder[Any]] = {
    Kind.CONTROL: Decoder(Command),
    Kind.REPLY: Decoder(dict[Name, Any]),
    Kind.EVENTS: Decoder(list[Event] | Event),
}


def unwrap(kind: Kind, text: str, *, tag: str, reply_exchange: str) -> dict[str, Any]:
    """Return a message in kombu's form, with `tag` as its delivery tag. Raises `Malformed`, also for a stale command."""
    try:
        envelope = _envelope.decode(text)
        body = envelope.body
        if envelope.properties.body_encoding == "base64":
            body = base64.b64decode(body, validate=True).decode()
        content = _bodies[kind].decode(body)
        if kind is Kind.CONTROL:
            _check_command(content, envelope.headers, reply_exchange)
        elif kind is Kind.EVENTS:
            _check_events(content if isinstance(content, list) else [content])
    except (ValueError, RecursionError, binascii.Error) as error:
        raise Malformed(f"not a message of a {kind} queue: {error}") from error
    headers = {name: value for name, value in msgspec.to_builtins(envelope.headers).items() if value is not None}
    return {
        "body": body,
        "content-type": envelope.content_type,
        "content-encoding": envelope.content_encoding,
        "headers": headers,
        "properties": {"delivery_tag": tag, "delivery_info": {}, "body_encoding": None},
    }


def wrap(body: str) -> str:
    """Return an envelope around a JSON text."""
    return dumps({
        "body": body, "content-type": "application/json", "content-encoding": "utf-8", "headers": {}, "properties": {},
    })  # fmt: skip


def _check_command(command: Command, headers: Headers, reply_exchange: str) -> None:
    # For example, a shutdown that waited for an absent worker must not stop the worker when it is back.
    if not headers.expires or time.time() > headers.expires + EXPIRY_TOLERANCE:
        raise ValueError(f"the command {command.method!r} is stale")
    if command.reply_to is not None and command.reply_to.exchange != reply_exchange:
        raise ValueError("its answer would go to another exchange")


def _check_events(events: list[Event]) -> None:
    for event in events:
        if event.type.startswith("task-") and event.uuid is None:
            raise ValueError(f"the event {event.type!r} names no task")
        if event.clock is None and event.type != "task-sent":
            raise ValueError(f"the event {event.type!r} has no clock")
