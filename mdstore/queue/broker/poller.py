"""Receive and hold messages on separate threads, so that the worker's loop never waits for a call to SQS.

    receivers        one per queue, two while there is a backlog: long polls, for as many messages as there is room for
    lease extender   one: deletes finished messages, gives back others and renews leases, ten messages per call

A message is *held* from its receive until it is deleted or given back: it waits until the worker takes it, and then a task
works on it. A held message has a lease, which is its visibility timeout, and the lease extender renews it. So a task may run
longer than the timeout, and SQS redelivers the messages of a dead worker after one timeout at most. Renewals stop when the work
is lost (the worker dropped it without acknowledging the message) or when the worker's loop hangs.
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

_LINGER = 0.02  # seconds that a receiver waits for room for ten messages
_RECEIVE_AGAIN = 2.0  # seconds until a failed receive is retried
_RECEIVERS = 2  # per queue, at most
_READ_AGAIN = 300  # seconds until an unreadable message is redelivered, after about 20 s of retries
_URGENT = 1_000  # urgent messages that may wait to be handed out, 256 KB each at most
_REMEMBERED = 10_000  # deleted messages whose ids are kept, because SQS may redeliver them anyway


@dataclass(slots=True, eq=False)
class Held:
    """Describes a message that this worker holds.

    `payload` is the opened message. `renew_at` is when its lease must be renewed, in seconds of the poller's clock. `is_lost`
    returns whether its work is lost.
    """

    queue: str
    url: str
    message: Message
    payload: Any
    renew_at: float
    is_lost: Callable[[], bool] = field(default=lambda: False)

    @property
    def id(self) -> str:
        """Return SQS's id of the message, which is the same in each delivery."""
        return self.message.message_id


@dataclass(slots=True, eq=False)
class _Queue:
    """Describes a queue that is consumed.

    Without `needs_room`, its messages are urgent: they are deleted on arrival and handed out first.
    """

    name: str
    url: str
    needs_room: bool
    cancelled: bool = False
    has_backlog: bool = False  # the last receive returned as many messages as it asked for
    is_failing: bool = False
    reserved: int = 0  # messages that receives under way asked for
    unopened: int = 0  # messages that were received and are not yet opened
    answered_at: float = 0.0
    returned_at: float = 0.0
    receivers: int = 0


def backoff(receives: int) -> int:
    """Return for how many seconds to hide a message that was received `receives` times: 5, 10, 20 ... 300."""
    return min(300, 5 << min(receives - 1, 10))


class Poller:
    """Receives and holds the messages of one channel. All methods may be called from any thread.

    `room` returns how many messages the worker works on at the same time (0: any number); up to `ahead` times as many are
    held. `open_message` decodes a message, or returns None if it is invalid and dealt with. `wake` is called when there is a
    message to take. `is_alive` returns whether the worker's loop ticks. `lost` is called with a message whose work is lost.
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
        """Start receiving from a queue."""
        found = _Queue(queue, url, needs_room)
        with self._changed:
            self._queues[queue] = found
        self._lease_extender.start()
        self._start_receiver(found)

    def cancel(self, queue: str) -> None:
        """Stop receiving from a queue, and give back its waiting messages. A poll under way gives its messages back, too."""
        with self._changed:
            found = self._queues.pop(queue, None)
            if found is None:
                return
            found.cancelled = True
            unstarted = [held for held in self._waiting if held.queue == queue]
            self._waiting = deque(held for held in self._waiting if held.queue != queue)
            self._changed.notify_all()
        for held in unstarted:
            self.release(held)

    def take(self, *, timeout: float = 0.0, only_urgent: bool = False) -> Held | None:
        """Return the next message, or None if there is none within `timeout` seconds.

        `only_urgent` leaves out messages that need room.
        """
        with self._changed:
            if not self._urgent and (only_urgent or not self._waiting):
                self._changed.wait_for(lambda: self._urgent or (self._waiting and not only_urgent), timeout)
            if self._urgent:
                return self._urgent.popleft()
            return self._waiting.popleft() if self._waiting and not only_urgent else None

    def delete(self, held: Held) -> None:
        """Record that a message is done, and queue it for deletion."""
        with self._changed:
            self._pace.count()
            self._forget(held, done=True)
        self._lease_extender.delete(held)

    def release(self, held: Held, *, seconds: int = 0) -> None:
        """Stop holding a message, and give it back; SQS makes it visible again after `seconds`."""
        with self._changed:
            self._forget(held)
        self._lease_extender.set_visibility(held, seconds)

    def close(self, timeout: float, *, wait: bool = True) -> None:
        """Give back all held messages, wait for polls under way, and send what is queued, within `timeout` seconds.

        Messages that are not given back by then become visible after their visibility timeout. Without `wait`, do not wait
        for polls under way.
        """
        deadline = self._clock() + timeout
        queues = list(self._queues.values())
        for queue in queues:
            self.cancel(queue.name)
        with self._changed:
            every = list(self._held.values())
        for held in every:
            self.release(held)
        for thread in self._receivers if wait else ():
            thread.join(max(0.0, deadline - self._clock()))
        self._lease_extender.close(max(0.1, deadline - self._clock()))

    def liveness(self) -> dict[str, float]:
        """Return the seconds since the last SQS response (`answer`) and since the last progress of a receive (`receive`).

        A receive makes progress when it returns and when one of its messages is opened. One that fails returns, but is no
        response. Each number is that of the slowest queue; idle queues do not count.
        """
        now = self._clock()
        with self._changed:
            queues = list(self._queues.values())
        return {
            "answer": max((now - queue.answered_at for queue in queues if queue.reserved), default=0.0),
            "receive": max(
                (now - queue.returned_at for queue in queues if queue.reserved or queue.unopened), default=0.0
            ),
        }

    def count(self) -> int:
        """Return how many messages are held."""
        return len(self._held)

    # -- receiving

    def fetch(self, queue: str, url: str) -> Held | None:
        """Receive one message from a queue that is not consumed; return None if it has none.

        Raises `Unavailable` or `DeploymentBroken`.
        """
        self._lease_extender.start()
        found = self._sqs.receive(url, 1, wait=self._wait_time, visibility=self._visibility)
        polled = _Queue(queue, url, needs_room=True)
        return next(filter(None, (self._read(polled, held) for held in self._hold(polled, found))), None)

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
            except Exception as error:  # whatever it is, the queue must be polled again
                queue.is_failing = True
                self._hold_and_open(queue, count, [])
                if not queue.cancelled:
                    self._receive_failed(queue, error)
                continue
            queue.is_failing = False
            queue.answered_at = queue.returned_at = self._clock()
            self._hold_and_open(queue, count, messages)

    def _receive_failed(self, queue: _Queue, error: Exception) -> None:
        trace = None if isinstance(error, MdstoreError) else error
        logger.error("receiving from %s failed, retry in %d s: %s", queue.name, _RECEIVE_AGAIN, error, exc_info=trace)
        with self._changed:
            self._changed.wait_for(lambda: queue.cancelled, _RECEIVE_AGAIN)

    def _reserve(self, queue: _Queue, is_spare: bool) -> int:
        """Wait for room and reserve it. Return the number of messages, or 0 when the queue is no longer consumed."""
        with self._changed:
            while True:
                while not queue.cancelled and not self._has_room(queue, is_spare):
                    self._changed.wait(1.0)
                if 0 < self._free_room(queue) < MAX_ENTRIES and self._held and self._target() > MAX_ENTRIES:
                    self._changed.wait_for(lambda: queue.cancelled or self._free_room(queue) >= MAX_ENTRIES, _LINGER)
                if queue.cancelled:
                    return 0
                count = min(self._free_room(queue), MAX_ENTRIES)
                if count > 0:  # while this receiver lingered, another one may have taken the room
                    break
            if not queue.reserved:
                queue.returned_at = self._clock()
                queue.answered_at = queue.answered_at if queue.is_failing else queue.returned_at
            queue.reserved += count
            return count

    def _has_room(self, queue: _Queue, is_spare: bool) -> bool:
        return self._free_room(queue) > 0 and (queue.has_backlog or not is_spare)

    def _free_room(self, queue: _Queue) -> int:
        if not queue.needs_room:  # a listener that is slower than the senders leaves the rest in SQS
            return MAX_ENTRIES if len(self._urgent) < _URGENT else 0
        if not self._room():
            return MAX_ENTRIES
        reserved = sum(one.reserved for one in self._queues.values() if one.needs_room)
        return self._target() - len(self._held) - reserved

    def _target(self) -> int:
        """Return how many messages to hold.

        It is what was done in the last second, but at least one and at most `ahead` for each that the worker can work on.
        """
        room = self._room()
        return min(room * self._ahead, max(room, math.ceil(self._pace.rate())))

    def _hold_and_open(self, queue: _Queue, count: int, messages: Sequence[Message]) -> None:
        """Hold every message of a receive first, because opening one may take long; then open them one by one."""
        with self._changed:
            held = self._hold(queue, messages)
            queue.reserved -= count
            queue.unopened += len(held)
            queue.has_backlog = len(messages) == count
            self._changed.notify_all()
        for one in held:
            read = self._read(queue, one)
            with self._changed:
                queue.unopened -= 1
                queue.returned_at = self._clock()
                cancelled = queue.cancelled
                if read is not None and not cancelled:
                    (self._waiting if queue.needs_room else self._urgent).append(read)
                self._changed.notify_all()
            if read is not None and cancelled:
                self.release(read)
            elif read is not None:
                self._wake()
        if queue.has_backlog and queue.needs_room and queue.receivers < _RECEIVERS and not queue.cancelled:
            self._start_receiver(queue, is_spare=True)

    def _hold(self, queue: _Queue, messages: Sequence[Message]) -> list[Held]:
        """Hold received messages, except those that are done or already held. Return the new ones."""
        renew_at = self._clock() + self._visibility / 3
        found = []
        with self._changed:
            for message in messages:
                held = Held(queue.name, queue.url, message, None, renew_at)
                if message.message_id in self._done:
                    self._lease_extender.delete(held)
                elif (known := self._held.get(message.message_id)) is not None:
                    logger.warning("message %s was delivered again while it was held", message.message_id)
                    known.message = message  # only the newest receipt handle can delete it
                    known.renew_at = renew_at
                else:
                    self._held[message.message_id] = held
                    found.append(held)
        return found

    def _read(self, queue: _Queue, held: Held) -> Held | None:
        """Open a message; return None if there is nothing to hand out."""
        if queue.cancelled:  # while earlier messages were opened
            self.release(held)
            return None
        try:
            held.payload = self._open(queue.name, held.message)
        except Unavailable as error:
            logger.warning("message %s cannot be read now: %s", held.id, error)
            self.release(held, seconds=_READ_AGAIN)
            return None
        except Exception:
            logger.exception(
                "message %s cannot be read; SQS redelivers it until its redrive policy dead-letters it", held.id
            )
            with self._changed:
                self._forget(held)
            return None
        if held.payload is None:
            self.delete(held)
            return None
        if not queue.needs_room:
            self.delete(held)
        return held

    # -- held messages

    def _forget(self, held: Held, *, done: bool = False) -> None:
        if self._held.get(held.id) is held:
            del self._held[held.id]
        if done:
            self._done[held.id] = None
            if len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
        self._changed.notify_all()

    def _expiring_leases(self) -> list[Held]:
        """Return the messages whose leases must be renewed now; give back those whose work is lost."""
        with self._changed:
            every = list(self._held.values())
        # The owner of an acknowledged message goes away too, but by then the message is no longer held.
        lost = [held for held in every if held.is_lost() and held.id in self._held]
        for held in lost:
            logger.warning("no task works on message %s any more; it is given back", held.id)
            self.release(held)
            self._lost(held)
        now = self._clock()
        expiring = [held for held in every if held.renew_at <= now and held not in lost] if self._is_alive() else []
        for held in expiring:
            held.renew_at = now + self._visibility / 3
        return expiring

    def _abandon(self, held: Held) -> None:
        """Stop renewing a lease, because another worker may have the message by now.

        A message that waits is not started here. For one that is at work, a redelivery to this worker resumes the renewals.
        """
        with self._changed:
            if held in self._waiting:
                self._waiting.remove(held)
                self._forget(held)
            else:
                held.renew_at = math.inf


class Pace:
    """Measures how many messages were done in about the last second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0.0
        self._at = clock()

    def count(self) -> None:
        """Count one message."""
        self._count = self.rate() + 1
        self._at = self._clock()

    def rate(self) -> float:
        """Return messages per second."""
        return self._count * math.exp(self._at - self._clock())
