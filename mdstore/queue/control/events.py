"""Events over SNS, published by a thread of their own.

Celery publishes events on the worker's main loop, some 100 times per 100 tasks, and waits for each call. Here events go into a
buffer, and a thread publishes the buffer about once a second.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from celery.app.events import Events as CeleryEvents
from celery.events.dispatcher import EventDispatcher
from celery.events.event import Event as CeleryEvent
from celery.events.event import group_from
from celery.utils.log import get_logger
from celery.utils.time import utcoffset

from mdstore.errors import Unavailable
from mdstore.queue.broker.ascii_json import dumps
from mdstore.queue.control.broadcasts import MAX_BYTES, wrap

logger = get_logger(__name__)

#: Seconds between heartbeats. Celery's interval of 2 s would cost a publish for each heartbeat.
HEARTBEAT = 20.0
#: Characters that are kept of a field. SNS refuses messages over 256 KiB, and a traceback can be longer.
MAX_FIELD = 2_000
_INTERVAL = 1.0  # seconds between publishes
_FULL = 300  # events; a buffer of this size is published without waiting for the interval
_MAX_BUFFERED = 20_000  # events; beyond that the oldest are dropped
_BATCH_BYTES = MAX_BYTES - 2_048  # leaves room for the envelope
_MAX_PAUSE = 60.0  # seconds until the next try after failed publishes
_CLOSE_TIMEOUT = 5.0  # seconds for which `close` tries to publish what is buffered


class EventPublisher:
    """Buffers events, up to a limit, and publishes them in a thread. Closing twice is safe."""

    def __init__(
        self, publish: Callable[[str], None], *, interval: float = _INTERVAL, size: int = _MAX_BUFFERED
    ) -> None:
        """`publish` sends a JSON list of events, and raises `Unavailable` if a retry may work. `size` limits the buffer."""
        self._publish = publish
        self._interval = interval
        self._buffer: deque[tuple[str, int]] = deque(maxlen=size)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None  # set while `close` is under way
        self.dropped = 0

    def put(self, event: dict[str, Any]) -> None:
        """Buffer an event, and return at once."""
        text = _encoded(event)
        # The envelope holds the list of events as a string, in which each quote and backslash takes two bytes.
        size = len(text) + text.count('"') + text.count("\\") + 1
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

    def take_over(self, other: EventPublisher) -> None:
        """Take the events that another publisher could not publish."""
        with other._changed:
            left = list(other._buffer)
            other._buffer.clear()
        with self._changed:
            self._put_back(left)

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Publish what is buffered. Give up after `timeout` seconds, or when a publish fails."""
        with self._changed:
            thread, self._deadline = self._thread, time.monotonic() + timeout
            self._changed.notify()
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        pause = 0.0
        while self._wait(pause):
            batch = self._next_batch()
            try:
                self._publish("[" + ",".join(text for text, _ in batch) + "]")
                pause = 0.0
            except Exception as error:  # whatever the error is, later events must be published
                pause = min(max(1.0, 2 * pause), _MAX_PAUSE)
                if isinstance(error, Unavailable):
                    with self._changed:
                        self._put_back(batch)
                else:
                    self.dropped += len(batch)
                logger.warning("events could not be published (%d dropped so far): %s", self.dropped, error)

    def _wait(self, pause: float) -> bool:
        """Wait until events should be published. Return False if the thread should end."""
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

    def _next_batch(self) -> list[tuple[str, int]]:
        """Remove from the buffer the events that fit into one message, and return them."""
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
    """Sends events through a buffer. With `buffer_while_offline` false it publishes each at once, and raises if that fails."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.app.settings.events:
            self.enabled = False
        self._publisher = EventPublisher(self._publish_list)

    def send(
        self,
        type: str,  # noqa: A002  Celery's name
        *,
        blind: bool = False,
        utcoffset: Any = utcoffset,
        retry: bool = False,  # noqa: ARG002
        retry_policy: Any = None,  # noqa: ARG002
        Event: Any = CeleryEvent,  # noqa: N803
        **fields: Any,
    ) -> None:
        """Send an event. Long fields are clipped."""
        if not self.enabled or (self.groups and group_from(type) not in self.groups):
            return
        if type == "worker-heartbeat":  # Celery announces the next one in 5 s if a client asked for this one
            fields["freq"] = max(fields.get("freq", 0), HEARTBEAT)
        clock = None if blind else self.clock.forward()
        identity = {"hostname": self.hostname, "pid": self.pid, "utcoffset": utcoffset()}
        event = Event(type, **identity, clock=clock, **_clipped(fields))
        if self.buffer_while_offline:
            self._publisher.put(event)
        else:
            self._publish_list(f"[{_encoded(event)}]")

    def publish(self, type: str, fields: dict[str, Any], producer: Any, **kwargs: Any) -> Any:  # noqa: A002
        """Publish an event at once through `producer`. Long fields are clipped."""
        try:
            return super().publish(type, _clipped(fields), producer, **kwargs)
        finally:
            self._outbound_buffer.clear()  # Celery would keep unsent events forever

    def flush(self, errors: bool = True, groups: bool = True) -> None:
        """Do nothing, because a thread publishes the buffer."""

    def extend_buffer(self, other: Dispatcher) -> None:
        """Take the events that another dispatcher could not publish."""
        self._publisher.take_over(other._publisher)

    def close(self) -> None:
        """Publish what is buffered, and stop."""
        super().close()
        self._publisher.close()

    def _publish_list(self, events: str) -> None:
        topics = self.app.topics
        topics.publish(topics.events, wrap(events))


class Events(CeleryEvents):
    """Makes Celery use this dispatcher."""

    dispatcher_cls = Dispatcher


def _clipped(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:MAX_FIELD] if isinstance(value, str) else value for name, value in fields.items()}


def _encoded(event: dict[str, Any]) -> str:
    return dumps(event, enc_hook=lambda value: repr(value)[:MAX_FIELD])
