"""What goes on between a worker and SQS, on threads of its own, so that the worker's loop never waits for a call.

    receivers   one a queue, a second while there is a backlog: long polls, for as many messages as there is room for
    keeper      one: deletes what is done and extends what is held, ten messages a call

A message is *held* from its receive until it is deleted, released or lost: `waiting` until the worker takes it, and then at
work. While it is held its visibility is extended, so a task may run longer than the visibility timeout, and a worker that
dies gives its messages back after at most that. Extending stops when the work is lost or the worker's loop hangs.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kombu.log import get_logger

from mdstore.aws.sqs import MAX_ENTRIES, Message, Sqs
from mdstore.errors import MdstoreError, Unavailable
from mdstore.queue.broker.leases import LeaseExtender

logger = get_logger(__name__)

_LINGER = 0.02  # seconds that a receive waits until there is room for ten
_RECEIVE_AGAIN = 2.0  # seconds until a receive that failed is tried again
_RECEIVERS = 2  # of one queue
_READ_AGAIN = 300  # seconds until a message comes again that could not be read, after tries of 20 s or so
_URGENT = 1_000  # messages, of 256 KB at most, that wait to be handed out
_REMEMBERED = 10_000  # messages that were deleted: SQS may deliver one again all the same


@dataclass(slots=True, eq=False)
class Held:
    """A message in this worker's hands. `payload` is what the opened message says; `is_lost` says that no one works on it."""

    queue: str
    url: str
    message: Message
    payload: Any
    extend_at: float
    is_lost: Callable[[], bool] = field(default=lambda: False)

    @property
    def id(self) -> str:
        """SQS's id of the message, the same in each delivery."""
        return self.message.message_id


@dataclass(slots=True, eq=False)
class _Queue:
    """A queue that is consumed. Without `needs_room` its messages are deleted when they arrive, and handed out first."""

    name: str
    url: str
    needs_room: bool
    cancelled: bool = False
    backlog: bool = False
    is_failing: bool = False
    reserved: int = 0
    opening: int = 0
    answered_at: float = 0.0
    returned_at: float = 0.0
    receivers: int = 0


def backoff(receives: int) -> int:
    """Seconds until a message that was received `receives` times is visible again: 5, 10, 20 ... 300."""
    return min(300, 5 << min(receives - 1, 10))


class Poller:
    """One a consuming channel. All methods may be called from any thread.

    `room` says how many messages the worker works on at the same time (0: any number); `ahead` times as many are held.
    `open_message` reads a message, or returns None where it was no good and is dealt with. `wake` is called when there is
    something to take. `is_alive` says whether the worker's loop goes round.
    """

    def __init__(
        self,
        *,
        sqs: Sqs,
        wait_time: int,
        visibility: int,
        ahead: int,
        room: Callable[[], int],
        open_message: Callable[[str, Message], Any],
        wake: Callable[[], None],
        is_alive: Callable[[], bool] = lambda: True,
        lost: Callable[[Held], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sqs = sqs
        self._wait_time = wait_time
        self._visibility = visibility
        self._ahead = ahead
        self._room = room
        self._open = open_message
        self._wake = wake
        self._is_alive = is_alive
        self._lost = lost
        self._clock = clock
        self._changed = threading.Condition()
        self._queues: dict[str, _Queue] = {}
        self._waiting: deque[Held] = deque()
        self._urgent: deque[Held] = deque()
        self._held: dict[str, Held] = {}
        self._done: OrderedDict[str, None] = OrderedDict()
        self._receivers: list[threading.Thread] = []
        self._pace = Pace(clock)
        self._lease_extender = LeaseExtender(
            sqs=sqs, visibility=visibility, expiring=self._expiring_leases, abandon=self._abandon
        )

    # -- for the channel

    def consume(self, queue: str, url: str, *, needs_room: bool) -> None:
        """Begin to receive."""
        found = _Queue(queue, url, needs_room)
        with self._changed:
            self._queues[queue] = found
        self._lease_extender.start()
        self._start_receiver(found)

    def cancel(self, queue: str) -> None:
        """Receive no more, and give back what waits. A poll under way ends by itself; what it brings is given back too."""
        with self._changed:
            found = self._queues.pop(queue, None)
            if found is None:
                return
            found.cancelled = True
            back = [held for held in self._waiting if held.queue == queue]
            self._waiting = deque(held for held in self._waiting if held.queue != queue)
            self._changed.notify_all()
        for held in back:
            self.release(held)

    def take(self, *, timeout: float = 0.0, only_urgent: bool = False) -> Held | None:
        """The next message, waiting up to `timeout` seconds for one."""
        with self._changed:
            if not self._urgent and (only_urgent or not self._waiting):
                self._changed.wait_for(lambda: self._urgent or (self._waiting and not only_urgent), timeout)
            if self._urgent:
                return self._urgent.popleft()
            return self._waiting.popleft() if self._waiting and not only_urgent else None

    def delete(self, held: Held) -> None:
        """The message is done."""
        with self._changed:
            self._pace.count()
            self._forget(held, done=True)
        self._lease_extender.delete(held)

    def release(self, held: Held, *, seconds: int = 0) -> None:
        """Give the message back; it is visible again after `seconds`."""
        with self._changed:
            self._forget(held)
        self._lease_extender.show(held, seconds)

    def close(self, timeout: float, *, wait: bool = True) -> None:
        """Give back what is held, wait for polls under way, and flush; whatever takes longer than `timeout` seconds is left.

        What is left is visible again after its visibility timeout. Without `wait` polls under way are left at once.
        """
        deadline = self._clock() + timeout
        queues = list(self._queues.values())
        for queue in queues:
            self.cancel(queue.name)
        with self._changed:
            back = list(self._held.values())
        for held in back:
            self.release(held)
        for thread in self._receivers if wait else ():
            thread.join(max(0.0, deadline - self._clock()))
        self._lease_extender.close(max(0.1, deadline - self._clock()))

    def pulse(self) -> dict[str, float]:
        """Seconds since a queue that is asked has `answer`ed, and since its `receive` has returned; the longest of all."""
        now = self._clock()
        with self._changed:
            queues = list(self._queues.values())
        return {
            "answer": max((now - queue.answered_at for queue in queues if queue.reserved), default=0.0),
            "receive": max(
                (now - queue.returned_at for queue in queues if queue.reserved or queue.opening), default=0.0
            ),
        }

    def count(self) -> int:
        """How many messages are held."""
        return len(self._held)

    # -- receiving

    def fetch(self, queue: str, url: str) -> Held | None:
        """One message of a queue that is not consumed, if it has any. Raises `Unavailable` or `DeploymentBroken`."""
        self._lease_extender.start()
        found = self._sqs.receive(url, 1, wait=self._wait_time, visibility=self._visibility)
        asked = _Queue(queue, url, needs_room=True)
        return next(filter(None, (self._read(asked, held) for held in self._hold(asked, found))), None)

    def _start_receiver(self, queue: _Queue, *, is_spare: bool = False) -> None:
        thread = threading.Thread(
            target=self._receive, args=(queue, is_spare), name=f"receive {queue.name}", daemon=True
        )
        queue.receivers += 1
        thread.start()
        if queue.needs_room:
            self._receivers = [one for one in self._receivers if one.is_alive()] + [thread]

    def _receive(self, queue: _Queue, is_spare: bool) -> None:
        while count := self._reserve(queue, is_spare):
            try:
                messages = self._sqs.receive(queue.url, count, wait=self._wait_time, visibility=self._visibility)
            except Exception as error:  # whatever it is, the queue must be asked again
                queue.is_failing = True
                self._settle(queue, count, [])
                if not queue.cancelled:
                    self._receive_failed(queue, error)
                continue
            queue.is_failing = False
            queue.answered_at = queue.returned_at = self._clock()
            self._settle(queue, count, messages)

    def _receive_failed(self, queue: _Queue, error: Exception) -> None:
        trace = None if isinstance(error, MdstoreError) else error
        logger.error("receive from %s failed, again in %d s: %s", queue.name, _RECEIVE_AGAIN, error, exc_info=trace)
        with self._changed:
            self._changed.wait_for(lambda: queue.cancelled, _RECEIVE_AGAIN)

    def _reserve(self, queue: _Queue, is_spare: bool) -> int:
        """Wait for room; returns for how many messages, 0 when the queue is consumed no more."""
        with self._changed:
            while True:
                while not queue.cancelled and not self._has_room(queue, is_spare):
                    self._changed.wait(1.0)
                if 0 < self._free(queue) < MAX_ENTRIES and self._held and self._target() > MAX_ENTRIES:
                    self._changed.wait_for(lambda: queue.cancelled or self._free(queue) >= MAX_ENTRIES, _LINGER)
                if queue.cancelled:
                    return 0
                count = min(self._free(queue), MAX_ENTRIES)
                if count > 0:  # while this one lingered, another receiver may have taken the room
                    break
            if not queue.reserved:
                queue.returned_at = self._clock()
                queue.answered_at = queue.answered_at if queue.is_failing else queue.returned_at
            queue.reserved += count
            return count

    def _has_room(self, queue: _Queue, is_spare: bool) -> bool:
        return self._free(queue) > 0 and (queue.backlog or not is_spare)

    def _free(self, queue: _Queue) -> int:
        if not queue.needs_room:  # who listens more slowly than others talk leaves the rest to SQS
            return MAX_ENTRIES if len(self._urgent) < _URGENT else 0
        if not self._room():
            return MAX_ENTRIES
        reserved = sum(one.reserved for one in self._queues.values() if one.needs_room)
        return self._target() - len(self._held) - reserved

    def _target(self) -> int:
        """How many messages to hold: what was done in the last second, between one and `ahead` for each at work."""
        room = self._room()
        return min(room * self._ahead, max(room, math.ceil(self._pace.rate())))

    def _settle(self, queue: _Queue, count: int, messages: Sequence[Message]) -> None:
        """Take in what a receive has brought: hold all of it, and read one message after the other."""
        with self._changed:
            held = self._hold(queue, messages)
            queue.reserved -= count
            queue.opening += len(held)
            queue.backlog = len(messages) == count
            self._changed.notify_all()
        for one in held:
            read = self._read(queue, one)
            with self._changed:
                queue.opening -= 1
                queue.returned_at = self._clock()
                cancelled = queue.cancelled
                if read is not None and not cancelled:
                    (self._waiting if queue.needs_room else self._urgent).append(read)
                self._changed.notify_all()
            if read is not None and cancelled:
                self.release(read)
            elif read is not None:
                self._wake()
        if queue.backlog and queue.needs_room and queue.receivers < _RECEIVERS and not queue.cancelled:
            self._start_receiver(queue, is_spare=True)

    def _hold(self, queue: _Queue, messages: Sequence[Message]) -> list[Held]:
        """Hold what was received, but for what is done or held already."""
        extend_at = self._clock() + self._visibility / 3
        found = []
        with self._changed:
            for message in messages:
                held = Held(queue.name, queue.url, message, None, extend_at)
                if message.message_id in self._done:
                    self._lease_extender.delete(held)
                elif (known := self._held.get(message.message_id)) is not None:
                    logger.warning("message %s was delivered again while it is held", message.message_id)
                    known.message = message  # its newest handle is the one that counts
                    known.extend_at = extend_at
                else:
                    self._held[message.message_id] = held
                    found.append(held)
        return found

    def _read(self, queue: _Queue, held: Held) -> Held | None:
        """Open a message; None where there is nothing to hand out."""
        if queue.cancelled:  # while those before it were read
            self.release(held)
            return None
        try:
            held.payload = self._open(queue.name, held.message)
        except Unavailable as error:
            logger.warning("message %s cannot be read now: %s", held.id, error)
            self.release(held, seconds=_READ_AGAIN)
            return None
        except Exception:
            logger.exception("message %s cannot be read; it is left to the dead letters", held.id)
            with self._changed:
                self._forget(held)
            return None
        if held.payload is None:
            self.delete(held)
            return None
        if not queue.needs_room:
            self.delete(held)
        return held

    # -- what is held

    def _forget(self, held: Held, *, done: bool = False) -> None:
        if self._held.get(held.id) is held:
            del self._held[held.id]
        if done:
            self._done[held.id] = None
            if len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
        self._changed.notify_all()

    def _expiring_leases(self) -> list[Held]:
        """What is to be extended now."""
        with self._changed:
            every = list(self._held.values())
        # One that was settled meanwhile is not held any more by the time that its work is gone.
        lost = [held for held in every if held.is_lost() and held.id in self._held]
        for held in lost:
            logger.warning("nobody works on message %s any more; it is given back", held.id)
            self.release(held)
            self._lost(held)
        now = self._clock()
        expiring = [held for held in every if held.extend_at <= now and held not in lost] if self._is_alive() else []
        for held in expiring:
            held.extend_at = now + self._visibility / 3
        return expiring

    def _abandon(self, held: Held) -> None:
        """Another worker may have it: it is not begun here any more; where it is at work, a new delivery revives it."""
        with self._changed:
            if held in self._waiting:
                self._waiting.remove(held)
                self._forget(held)
            else:
                held.extend_at = math.inf


class Pace:
    """How many messages were done in the last second or so."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0.0
        self._at = clock()

    def count(self) -> None:
        """One more."""
        self._count = self.rate() + 1
        self._at = self._clock()

    def rate(self) -> float:
        """Messages a second."""
        return self._count * math.exp(self._at - self._clock())
