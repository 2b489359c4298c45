"""The worker's consumer dead-letters messages that cannot become tasks, with the reason, and keeps running."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chord, signals, states
from celery.concurrency.asynpool import AsynPool
from celery.exceptions import InvalidTaskError, NotRegistered
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.message import Message

from mdstore.queue.worker.consumer import Consumer
from tests.unit.canvas import Canvas


@dataclass
class RecordingChannel:
    """Records which messages are dead-lettered, and why."""

    no_ack_consumers: frozenset[str] = frozenset()
    letters: list[tuple[str, str]] = field(default_factory=list)

    def dead_letter(self, delivery_tag: str, reason: str, *, report: Callable[[], Any] = lambda: None) -> None:
        self.letters.append((delivery_tag, reason))
        report()

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.letters]


@pytest.fixture
def app() -> Iterator[Celery]:
    found = Celery("mdstore", broker="memory://", backend="cache+memory://", set_as_current=False)
    found.admit = lambda *_: None
    yield found
    found.close()


@pytest.fixture
def consumer(app: Celery) -> Consumer:
    return Consumer(lambda _: None, app=app, controller=SimpleNamespace(use_eventloop=True))


@pytest.fixture
def channel() -> RecordingChannel:
    return RecordingChannel()


@pytest.fixture
def rejected() -> Iterator[list[Any]]:
    """Return the list of errors that listeners of the signal `task_rejected` receive."""
    heard: list[Any] = []

    def listen(exc: Any, **_: Any) -> None:
        heard.append(exc)

    signals.task_rejected.connect(listen)
    yield heard
    signals.task_rejected.disconnect(listen)


def message(channel: RecordingChannel, headers: Any = None, **changes: Any) -> Message:
    """Return a task's message; `changes` replace its fields."""
    made = {
        "body": "[[],{},{}]",
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "delivery_tag": "tag",
        "properties": {"correlation_id": "id-1", "reply_to": "caller"},
        "headers": {"task": "mdstore.ingest", "id": "id-1"} if headers is None else headers,
        "accept": {"application/json"},
    }
    return Message(channel=channel, **{**made, **changes})


def raising(error: Exception) -> Callable[..., None]:
    def strategy(*_: Any) -> None:
        raise error

    return strategy


def test_a_task_s_message_reaches_its_strategy(consumer: Consumer, channel: RecordingChannel) -> None:
    """A valid message is not dead-lettered."""
    seen: list[Message] = []
    consumer.strategies["mdstore.ingest"] = lambda message, *_: seen.append(message)
    one = message(channel)
    consumer.create_task_handler()(one)
    assert seen == [one]
    assert channel.letters == []


def test_an_unknown_task_is_dead_lettered_and_fails(app: Celery, consumer: Consumer, channel: RecordingChannel) -> None:
    """The message is dead-lettered unchanged, and a caller that waits for the result learns that no worker knows the task."""
    heard: list[tuple[str, str]] = []

    def listen(name: str, id: str, **_: Any) -> None:  # noqa: A002  the signal's name for it
        heard.append((name, id))

    signals.task_unknown.connect(listen)
    consumer.create_task_handler()(message(channel, {"task": "mdstore.evil", "id": "id-1", "root_id": "root"}))
    signals.task_unknown.disconnect(listen)
    assert channel.letters == [("tag", "unknown task 'mdstore.evil'")]
    result = app.AsyncResult("id-1")
    assert result.state == states.FAILURE
    assert isinstance(result.result, NotRegistered)
    assert heard == [("mdstore.evil", "id-1")]


def test_an_unknown_task_fails_its_chord(channel: RecordingChannel) -> None:
    """Like any part that fails for good, it calls the error callback and ends the wait for the chord."""
    canvas = Canvas()
    result = chord([canvas.s("part")], canvas.s("body"), app=canvas.app).apply_async()
    errback = canvas.s("errback")
    (part,) = canvas.take("part")
    consumer = Consumer(lambda _: None, app=canvas.app, controller=SimpleNamespace(use_eventloop=True))
    headers = {"task": "part", "id": part.task_id, "group": part.group_id, "group_index": 0, "root_id": part.task_id}
    body = json.dumps([[], {}, {"chord": part.chord, "errbacks": [errback]}])
    consumer.create_task_handler()(message(channel, headers, body=body))
    assert canvas.app.AsyncResult(part.task_id).state == states.FAILURE
    assert len(canvas.take("errback")) == 1
    assert result.state == states.FAILURE


class WrittenPool(AsynPool):  # type: ignore[misc]
    """A pool that has written one job to a process; the process acknowledges it after a while.

    `flushed` lists the jobs that are forgotten.
    """

    def __init__(self, *, is_alive: bool) -> None:
        self.asked = 0
        self.flushed: list[Any] = []
        process = SimpleNamespace(
            _is_alive=lambda: is_alive, outqR_fd=7, outq=SimpleNamespace(_reader=SimpleNamespace(poll=self._poll))
        )
        self.job = SimpleNamespace(_write_to=process, _accepted=False)
        self.unwritten = SimpleNamespace(_write_to=None, _accepted=False)
        self._cache = {1: self.job, 2: self.unwritten}
        self._active_writers: set[Any] = set()
        self._result_handler = SimpleNamespace(_flush_outqueue=self._read, fileno_to_outq={}, on_state_change=None)

    def _poll(self, _: float) -> bool:
        self.asked += 1
        return self.asked > 2

    def _read(self, fd: int, *_: Any) -> None:
        assert fd == 7
        self.job._accepted = True

    def flush(self) -> None:
        self.flushed += [job for job in self._cache.values() if not job._accepted]


@pytest.mark.parametrize("is_alive", [True, False])
def test_jobs_that_a_live_process_has_are_not_forgotten_when_the_worker_stops(
    consumer: Consumer, is_alive: bool
) -> None:
    """Celery forgets jobs that were not acknowledged. The worker first reads the acknowledgements of live processes."""
    pool = WrittenPool(is_alive=is_alive)
    consumer.controller.semaphore = None
    consumer.pool = SimpleNamespace(_pool=pool, flush=pool.flush)
    consumer.on_close()
    assert pool.flushed == ([pool.unwritten] if is_alive else [pool.job, pool.unwritten])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ValueError, "text"),
        (KeyError, "'text'"),
        (RecursionError, "text"),
        (InvalidTaskError, "text"),
        (ContentDisallowed, "text"),
        (DecodeError, "text"),
    ],
)
def test_an_error_in_the_handler_affects_only_its_message(
    consumer: Consumer, channel: RecordingChannel, rejected: list[Any], kind: type[Exception], text: str
) -> None:
    """The message is dead-lettered with the error as its reason, and the next message is handled as usual."""
    error = kind("text")
    consumer.strategies["mdstore.ingest"] = raising(error)
    handle = consumer.create_task_handler()
    handle(message(channel))
    assert channel.letters == [("tag", f"{kind.__name__}: {text}")]
    assert rejected == [error]

    seen: list[Message] = []
    consumer.strategies["mdstore.ingest"] = lambda message, *_: seen.append(message)
    handle(message(channel))
    assert len(seen) == 1


def test_a_broken_connection_does_not_dead_letter_the_message(consumer: Consumer, channel: RecordingChannel) -> None:
    """The worker must reconnect, and SQS redelivers the message."""
    consumer.connection_errors = (ConnectionResetError,)
    consumer.strategies["mdstore.ingest"] = raising(ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError):
        consumer.create_task_handler()(message(channel))
    assert channel.letters == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": "{"}, "DecodeError: "),
        ({"body": "x", "content_type": "application/x-yaml"}, "ContentDisallowed: "),
        ({"body": b"\x80\x04K\x07.", "content_type": "application/x-python-serialize"}, "ContentDisallowed: "),
        ({"body": b"\xff", "content_type": "application/json"}, "DecodeError: "),
    ],
    ids=["not JSON", "YAML", "pickle", "not UTF-8"],
)
def test_a_message_that_cannot_be_decoded_is_dead_lettered(
    consumer: Consumer, channel: RecordingChannel, changes: dict[str, Any], reason: str
) -> None:
    """Without a task's headers Celery reads the body, and never decodes a content type that is not allowed."""
    consumer.create_task_handler()(message(channel, {"other": 1}, **changes))
    (found,) = channel.reasons
    assert found.startswith(reason)


@pytest.mark.parametrize("body", ["[]", "7", "null", "{}", '"task"'])
def test_a_message_that_names_no_task_is_dead_lettered(
    consumer: Consumer, channel: RecordingChannel, body: str
) -> None:
    """Neither the headers nor the JSON body names a task."""
    consumer.create_task_handler()(message(channel, {"other": 1}, body=body))
    assert channel.reasons == ["not a task's message"]


def test_headers_that_are_not_an_object_are_dead_lettered(
    consumer: Consumer, channel: RecordingChannel, rejected: list[Any]
) -> None:
    """Such a message is not a task's message."""
    one = message(channel)
    one.headers = 7
    consumer.create_task_handler()(one)
    assert channel.reasons == ["not a task's message"]
    assert rejected == [None]
