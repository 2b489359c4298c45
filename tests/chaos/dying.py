"""A worker that kills itself at given steps: `celery -A tests.chaos.dying worker`, with the kills as JSON in `KILLS`.

This module wraps the named steps of the write path from outside. A kill happens once: just before it, its mark file is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

import msgspec
from celery import current_task

import mdstore.aws.dynamodb.client
import mdstore.store.writer
from mdstore.aws.blobs import Blobs
from mdstore.aws.http import Response
from mdstore.aws.json_protocol import JsonProtocol
from mdstore.queue.broker.channel import Channel, Transport
from mdstore.queue.results.backend import DynamoBackend
from mdstore.queue.results.chord_state import ChordStates
from mdstore.store.ledger import Ledger
from mdstore.store.payload import Payloads
from mdstore.store.writer import Writer
from mdstore.tasks import create_store_app
from tests.chaos.fault_schedule import FaultSchedule, Kill

_TRANSACT = "TransactWriteItems"
_schedule = FaultSchedule(msgspec.json.decode(os.environ["KILLS"], type=list[Kill]))


def _around(owner: Any, name: str, step: str, *, by_task: bool = False) -> None:
    """Wrap a function as a step, or with `by_task` as a step of each task that calls it, such as `finish:apply_lane`."""
    original: Callable[..., Any] = getattr(owner, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        named_step = f"{step}:{_short(current_task.name)}" if by_task else step
        _schedule.at(named_step, "before")
        result = original(*args, **kwargs)
        _schedule.at(named_step, "after")
        return result

    setattr(owner, name, wrapped)


def _around_task(owner: Any, name: str, step: str) -> None:
    """Wrap a generator as a step."""
    original: Callable[..., Generator[Any, Any, Any]] = getattr(owner, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        _schedule.at(step, "before")
        result = yield from original(*args, **kwargs)
        _schedule.at(step, "after")
        return result

    setattr(owner, name, wrapped)


def _around_calls() -> None:
    """Wrap the sending of a transaction and the reading of its answer, whether it applied or was refused."""
    begin, read = JsonProtocol.request, mdstore.aws.dynamodb.client._read

    def send_request(self: JsonProtocol, operation: str, body: bytes) -> Any:
        if operation == _TRANSACT:
            _schedule.at("send", "before")
        return begin(self, operation, body)

    def read_answer(operation: str, answer: Response) -> Any:
        if operation != _TRANSACT:
            return read(operation, answer)
        if answer.status != 200:
            _schedule.at("read:refused", "before")
            return read(operation, answer)
        _schedule.at("send", "after")  # the transaction took effect, and its answer is unread
        _schedule.at("read", "before")
        result = read(operation, answer)
        _schedule.at("read", "after")
        return result

    JsonProtocol.request = send_request  # type: ignore[method-assign]
    mdstore.aws.dynamodb.client._read = read_answer


def _after_refusals() -> None:
    original = Writer._read_reasons

    def wrapped(*args: Any) -> Any:
        found = original(*args)
        _schedule.at("read:refused", "after")
        return found

    Writer._read_reasons = wrapped  # type: ignore[method-assign,assignment]


_around(Payloads, "lane", "fetch")
_around(mdstore.store.writer, "pack", "pack")
_around_task(Blobs, "put_task", "upload")
_around_task(Writer, "_merge_patches", "prepare")
_around_calls()
_after_refusals()
_around_task(Writer, "_load_earlier_receipts", "read:receipts")
_around(mdstore.store.writer, "count", "count")
_around(Writer, "_find_first_wave", "find")
_around(Ledger, "record_turn", "turn")
_around(Ledger, "close_lane", "close")
_around(Ledger, "start", "start")
_around(Ledger, "complete", "complete")
_around(Ledger, "finish", "finish", by_task=True)
_around(DynamoBackend, "apply_chord", "chord")
_around(ChordStates, "record_part", "part")
_around(DynamoBackend, "_dispatch", "dispatch")
_around(DynamoBackend, "_store_result", "result")


class DyingChannel(Channel):
    """A channel that makes publishing and acknowledging steps of each task: `publish:apply_lane`, `ack:finish`."""

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        step = f"publish:{_short(message['headers']['task'])}"
        _schedule.at(step, "before")
        super()._put(queue, message, **kwargs)
        _schedule.at(step, "after")

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        step = f"ack:{_short(self.qos.get(delivery_tag).headers['task'])}"
        _schedule.at(step, "before")
        super().basic_ack(delivery_tag, multiple)
        _schedule.at(step, "after")


class DyingTransport(Transport):
    """The transport that uses `DyingChannel`."""

    Channel = DyingChannel


def _short(task: str) -> str:
    return task.removeprefix("mdstore.")


app = create_store_app(broker_transport="tests.chaos.dying:DyingTransport")
