"""Events over SNS, off the worker's main loop.

Celery publishes on the loop, some 100 times per 100 tasks, and waits for each; here events go into a buffer that a thread
publishes about once a second.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from celery.app.events import Events as CeleryEvents
from celery.events.dispatcher import EventDispatcher
from celery.events.event import Event as CeleryEvent
from celery.events.event import group_from
from celery.utils.log import get_logger
from celery.utils.time import utcoffset

from mdstore.errors import MdstoreError, Unavailable
from mdstore.queue.control.broadcasts import MAX_BYTES, wrap

logger = get_logger(__name__)

#: Seconds between heartbeats: Celery's 2 s would be a publish each.
HEARTBEAT = 20.0
#: Characters kept of a field. SNS refuses more than 256 KiB, and a traceback can be longer.
MAX_FIELD = 2_000
_INTERVAL = 1.0
_FULL = 300  # events that are published without waiting for the interval
_BUFFERED = 20_000  # events; more than that are dropped, the oldest first
_BATCH_BYTES = MAX_BYTES - 2_048  # the rest is the envelope's
_LONGEST_PAUSE = 60.0
_FLUSHED_WITHIN = 5.0


class EventPublisher:
    """Events on their way: a bounded buffer and the thread that empties it. Closing twice is safe."""

    def __init__(self, publish: Callable[[str], None], *, interval: float = _INTERVAL, size: int = _BUFFERED) -> None:
        """`publish` sends a JSON list of events and raises `MdstoreError` where that fails."""
        self._publish = publish
        self._interval = interval
        self._buffer: deque[tuple[str, int]] = deque(maxlen=size)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None  # of a close that is under way
        self.dropped = 0

    def put(self, event: dict[str, Any]) -> None:
        """Take an event; returns at once."""
        text = _encoded(event)
        # In the envelope a list of events is a string: its quotes and backslashes take two bytes.
        size = len(text.encode()) + text.count('"') + text.count("\\") + 1
        with self._changed:
            if size > _BATCH_BYTES:
                self.dropped += 1
                return
            self.dropped += len(self._buffer) == self._buffer.maxlen
            self._buffer.append((text, size))
            if len(self._buffer) in (1, _FULL):
                self._changed.notify()
            if self._thread is None:
                self._deadline = None
                self._thread = threading.Thread(target=self._run, name="events", daemon=True)
                self._thread.start()

    def extend(self, other: EventPublisher) -> None:
        """Take over what another one could not publish."""
        with other._changed:
            left = list(other._buffer)
            other._buffer.clear()
        with self._changed:
            self._put_back(left)

    def close(self, timeout: float = _FLUSHED_WITHIN) -> None:
        """Publish what is there, for `timeout` seconds at most, and until SNS says no."""
        with self._changed:
            thread, self._deadline = self._thread, time.monotonic() + timeout
            self._changed.notify()
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        pause = 0.0
        while self._wait(pause):
            batch = self._take()
            try:
                self._publish("[" + ",".join(text for text, _ in batch) + "]")
                pause = 0.0
            except MdstoreError as error:
                pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE)
                if isinstance(error, Unavailable):
                    with self._changed:
                        self._put_back(batch)
                else:
                    self.dropped += len(batch)
                logger.warning("events are not published (%d dropped so far): %s", self.dropped, error)

    def _wait(self, pause: float) -> bool:
        """Wait until something is to be published; False when all is done."""
        with self._changed:
            if pause:
                self._changed.wait_for(lambda: self._deadline is not None, pause)
            self._changed.wait_for(lambda: self._buffer or self._deadline is not None)
            self._changed.wait_for(
                lambda: len(self._buffer) >= _FULL or self._deadline is not None, timeout=self._interval
            )
            closing = self._deadline is not None
            if closing and (not self._buffer or pause or time.monotonic() > (self._deadline or 0)):
                self._thread = None
                return False
            return True

    def _take(self) -> list[tuple[str, int]]:
        """The events of one message."""
        batch: list[tuple[str, int]] = []
        size = 0
        with self._changed:
            while self._buffer and size + self._buffer[0][1] <= _BATCH_BYTES:
                batch.append(self._buffer.popleft())
                size += batch[-1][1]
        return batch

    def _put_back(self, batch: list[tuple[str, int]]) -> None:
        room = (self._buffer.maxlen or 0) - len(self._buffer)
        kept = batch[len(batch) - min(room, len(batch)) :]
        self.dropped += len(batch) - len(kept)
        self._buffer.extendleft(reversed(kept))
        self._changed.notify()


class Dispatcher(EventDispatcher):
    """Sends events from an outbox; where the caller wants to see a failure, at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.app.settings.events:
            self.enabled = False
        self._publisher = EventPublisher(self._publish_list)

    def send(
        self,
        type: str,  # noqa: A002  celery's name
        *,
        blind: bool = False,
        utcoffset: Any = utcoffset,
        retry: bool = False,  # noqa: ARG002
        retry_policy: Any = None,  # noqa: ARG002
        Event: Any = CeleryEvent,  # noqa: N803
        **fields: Any,
    ) -> None:
        """Send an event, its long fields clipped."""
        if not self.enabled or (self.groups and group_from(type) not in self.groups):
            return
        if type == "worker-heartbeat":  # one that was asked for says that the next comes in 5 s
            fields["freq"] = max(fields.get("freq", 0), HEARTBEAT)
        clock = None if blind else self.clock.forward()
        identity = {"hostname": self.hostname, "pid": self.pid, "utcoffset": utcoffset()}
        event = Event(type, **identity, clock=clock, **_clipped(fields))
        if self.buffer_while_offline:
            self._publisher.put(event)
        else:
            self._publish_list(f"[{_encoded(event)}]")

    def publish(self, type: str, fields: dict[str, Any], producer: Any, **kwargs: Any) -> Any:  # noqa: A002
        """Publish an event at once by way of `producer`, its long fields clipped."""
        try:
            return super().publish(type, _clipped(fields), producer, **kwargs)
        finally:
            self._outbound_buffer.clear()  # Celery keeps for ever what could not be sent

    def flush(self, errors: bool = True, groups: bool = True) -> None:
        """Do nothing: the outbox empties itself."""

    def extend_buffer(self, other: Dispatcher) -> None:
        """Take over what another dispatcher could not publish."""
        self._publisher.extend(other._publisher)

    def close(self) -> None:
        """Publish what is there, and stop."""
        super().close()
        self._publisher.close()

    def _publish_list(self, events: str) -> None:
        topics = self.app.topics
        topics.publish(topics.events, wrap(events))


class Events(CeleryEvents):
    """Celery's, with this dispatcher."""

    dispatcher_cls = Dispatcher


def _clipped(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:MAX_FIELD] if isinstance(value, str) else value for name, value in fields.items()}


def _encoded(event: dict[str, Any]) -> str:
    return msgspec.json.encode(event, enc_hook=lambda value: repr(value)[:MAX_FIELD]).decode()
