"""Receive and hold messages on separate threads, so that the worker's loop never waits for a call to SQS.

    receivers        up to two per queue: each makes the poll that the schedule chooses next, for any queue
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kombu.log import get_logger

from mdstore.aws.sqs import Message, Sqs
from mdstore.errors import MdstoreError, Unavailable
from mdstore.queue.broker.leases import LeaseExtender
from mdstore.queue.broker.schedule import SMALL, Poll, PolledQueue, Schedule

logger = get_logger(__name__)

_LINGER = 0.02  # seconds that a receiver waits for room for ten messages
_RECEIVE_AGAIN = 2.0  # seconds until a failed receive is retried
_RECEIVERS = 2  # per queue, at most: as many as a queue has polls at the same time
_READ_AGAIN = 300  # seconds until an unreadable message is redelivered, after about 20 s of retries
_URGENT = 1_000  # urgent messages that may wait to be handed out, 256 KB each at most
_REMEMBERED = 10_000  # deleted messages whose ids are kept, because SQS may redeliver them anyway


@dataclass(slots=True, eq=False)
class Held:
    """Describes a message that this worker holds.

    `payload` is the opened message, and `is_small` says whether its work is small. `renew_at` is when its lease must be
    renewed, in seconds of the poller's clock. `is_lost` returns whether its work is lost.
    """

    queue: str
    url: str
    message: Message
    payload: Any
    renew_at: float
    is_small: bool = False
    is_lost: Callable[[], bool] = field(default=lambda: False)

    @property
    def id(self) -> str:
        """Return SQS's id of the message, which is the same in each delivery."""
        return self.message.message_id


def backoff(receives: int) -> int:
    """Return for how many seconds to hide a message that was received `receives` times: 5, 10, 20 ... 300."""
    return min(300, 5 << min(receives - 1, 10))


class Poller:
    """Receives and holds the messages of one channel. All methods may be called from any thread.

    `room` returns how many messages the worker works on at the same time (0: any number); up to `ahead` times as many are
    held. While several queues have a backlog, each gets a share by its weight in `weights`, which is 1 by default.
    `open_message` decodes a message, or returns None if it is invalid and dealt with. `is_small` returns whether the work of a
    decoded message is small: of such messages, sixteen times as many are held. `wake` is called when there is a message
    to take. `is_alive` returns whether the worker's loop ticks. `lost` is called with a message whose work is lost.
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
        is_small: Callable[[Any], bool] = lambda _: False,
        weights: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sqs = sqs
        self._wait_time = wait_time
        self._visibility = visibility
        self._open = open_message
        self._wake = wake
        self._is_alive = is_alive
        self._lost = lost
        self._is_small = is_small
        self._clock = clock
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)  # there is a message to take, or a poll has ended
        self._freed = threading.Condition(self._lock)  # there may be room for another poll
        self._waiting: deque[Held] = deque()
        self._small: deque[Held] = deque()  # waiting, too
        self._small_held = 0
        self._urgent: deque[Held] = deque()
        self._held: dict[str, Held] = {}
        self._done: OrderedDict[str, None] = OrderedDict()
        self._receivers = 0
        self._polls_with_room = 0  # under way, or with messages that are not yet opened
        self._pace = Pace(clock)
        self._schedule = Schedule(
            wait_time=wait_time, ahead=ahead, room=room, rate=self._pace.rate, clock=clock, weights=weights
        )
        self._lease_extender = LeaseExtender(
            sqs=sqs, visibility=visibility, expiring=self._expiring_leases, abandon=self._abandon, clock=clock
        )

    # -- for the channel

    def consume(self, queue: str, url: str, *, needs_room: bool) -> None:
        """Start receiving from a queue."""
        self._lease_extender.start()
        with self._lock:
            self._schedule.add(queue, url, needs_room=needs_room)
            self._start_receiver()
            self._freed.notify()

    def cancel(self, queue: str) -> None:
        """Stop receiving from a queue, and give back its waiting messages. A poll under way gives its messages back, too."""
        with self._lock:
            found = self._schedule.queues.pop(queue, None)
            if found is None:
                return
            found.cancelled.set()
            self._receivers -= found.polls  # a receiver ends after the poll of a queue that is no longer consumed
            unstarted = [held for held in (*self._waiting, *self._small) if held.queue == queue]
            self._waiting = deque(held for held in self._waiting if held.queue != queue)
            self._small = deque(held for held in self._small if held.queue != queue)
            self._freed.notify_all()
        for held in unstarted:
            self.release(held)

    def take(self, *, timeout: float = 0.0, only_urgent: bool = False, no_small: bool = False) -> Held | None:
        """Return the next message, or None if there is none within `timeout` seconds.

        `only_urgent` leaves out messages that need room, except small ones, which `no_small` leaves out.
        """
        with self._lock:
            if not (self._urgent or self._next_with_room(only_urgent, no_small)):
                self._arrived.wait_for(lambda: self._urgent or self._next_with_room(only_urgent, no_small), timeout)
            if self._urgent:
                self._freed.notify()
                return self._urgent.popleft()
            waiting = self._next_with_room(only_urgent, no_small)
            return waiting.popleft() if waiting else None

    def _next_with_room(self, only_urgent: bool, no_small: bool) -> deque[Held] | None:
        """Return the messages that need room and may be taken now, or None if there are none."""
        if self._waiting and not only_urgent:
            return self._waiting
        return self._small if self._small and not no_small else None

    def delete(self, held: Held) -> None:
        """Record that a message is done, and queue it for deletion."""
        with self._lock:
            self._pace.count(1 / SMALL if held.is_small else 1)
            self._forget(held, done=True)
        self._lease_extender.delete(held)

    def release(self, held: Held, *, seconds: int = 0) -> None:
        """Stop holding a message, and give it back; SQS makes it visible again after `seconds`."""
        with self._lock:
            self._forget(held)
        self._lease_extender.set_visibility(held, seconds)

    def close(self, timeout: float, *, wait: bool = True) -> None:
        """Give back all held messages, wait for polls under way, and send what is queued, within `timeout` seconds.

        Messages that are not given back by then become visible after their visibility timeout. Without `wait`, do not wait
        for polls under way.
        """
        deadline = self._clock() + timeout
        for queue in list(self._schedule.queues):
            self.cancel(queue)
        with self._lock:
            every = list(self._held.values())
        for held in every:
            self.release(held)
        if wait:
            with self._lock:
                self._arrived.wait_for(lambda: not self._polls_with_room, max(0.0, deadline - self._clock()))
        self._lease_extender.close(max(0.1, deadline - self._clock()))

    def liveness(self) -> dict[str, float]:
        """Return the seconds since the last SQS response (`answer`) and the last progress of a receive and of `leases`.

        A receive makes progress when it returns and when one of its messages is opened. A failed receive counts as
        progress but not as a response. The first two numbers are those of the slowest queue; idle queues do not count.
        """
        now = self._clock()
        with self._lock:
            queues = list(self._schedule.queues.values())
        return {
            "answer": max((now - queue.answered_at for queue in queues if queue.reserved), default=0.0),
            "receive": max(
                (now - queue.returned_at for queue in queues if queue.reserved or queue.unopened), default=0.0
            ),
            "leases": self._lease_extender.stalled_for(),
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
        polled = PolledQueue(queue, url, needs_room=True)
        return next(filter(None, (self._read(polled, held) for held in self._hold(polled, found))), None)

    def _start_receiver(self) -> None:
        with self._lock:
            if self._receivers >= _RECEIVERS * len(self._schedule.queues):
                return
            self._receivers += 1
        threading.Thread(target=self._run_receiver, name="sqs receiver", daemon=True).start()

    def _run_receiver(self) -> None:
        is_needed = True
        while is_needed:
            try:
                is_needed = self._make_poll()
            except Exception:  # whatever the error is, the queues must be polled again
                logger.exception("a receiver failed; it continues in %d s", _RECEIVE_AGAIN)
                time.sleep(_RECEIVE_AGAIN)

    def _make_poll(self) -> bool:
        """Wait for the next poll and make it. Return whether this thread is needed for another one."""
        poll = self._begin_next()
        if poll is None:
            return False
        try:
            self._receive(poll)
        finally:
            with self._lock:
                poll.queue.polls -= 1
                self._polls_with_room -= poll.queue.needs_room
                self._arrived.notify_all()
                is_needed = not poll.queue.cancelled.is_set()
        return is_needed

    def _begin_next(self) -> Poll | None:
        """Wait for a poll to make, and reserve its room. Return None if there are more receivers than the queues need."""
        with self._lock:
            while self._receivers <= _RECEIVERS * len(self._schedule.queues):
                if poll := self._next_full_poll():
                    self._schedule.begin(poll)
                    self._polls_with_room += poll.queue.needs_room
                    self._freed.notify()  # wake a receiver for the next queue
                    return poll
                self._freed.wait(1.0)
            self._receivers -= 1
            return None

    def _next_full_poll(self) -> Poll | None:
        """Return the next poll, after a short wait if there may soon be room for more messages."""
        until = self._clock() + _LINGER
        while (poll := self._next_poll()) and poll.may_grow and (left := until - self._clock()) > 0:
            self._freed.wait(left)
        return poll

    def _next_poll(self) -> Poll | None:
        held = len(self._held) - self._small_held + self._small_held // SMALL
        return self._schedule.next(held, takes_urgent=len(self._urgent) < _URGENT)

    def _receive(self, poll: Poll) -> None:
        """Hold every message of a poll first, because opening one may take long; then open them one by one."""
        queue = poll.queue
        messages = self._answer(poll)
        with self._lock:
            held = self._hold(queue, messages)
            queue.unopened += len(held)
            self._schedule.received(poll, len(messages))
            self._freed.notify()
        if queue.is_failing:
            queue.cancelled.wait(_RECEIVE_AGAIN)
        if queue.has_backlog and queue.needs_room and not queue.cancelled.is_set():
            self._start_receiver()
        for one in held:
            self._open_and_offer(queue, one)

    def _answer(self, poll: Poll) -> Sequence[Message]:
        """Receive the messages of a poll; return none if the receive fails."""
        queue = poll.queue
        try:
            messages = self._sqs.receive(queue.url, poll.count, wait=poll.wait, visibility=self._visibility)
        except Exception as error:  # whatever the error is, the poll's room must be freed
            queue.is_failing = True
            if not queue.cancelled.is_set():
                trace = None if isinstance(error, MdstoreError) else error
                retry = "receiving from %s failed, retry in %d s: %s"
                logger.error(retry, queue.name, _RECEIVE_AGAIN, error, exc_info=trace)  # noqa: TRY400
            return ()
        queue.is_failing = False
        queue.answered_at = queue.returned_at = self._clock()
        return messages

    def _open_and_offer(self, queue: PolledQueue, held: Held) -> None:
        """Open a held message, and hand it out or, if its queue is no longer consumed, give it back."""
        read = self._read(queue, held)
        with self._lock:
            queue.unopened -= 1
            queue.returned_at = self._clock()
            cancelled = queue.cancelled.is_set()
            if read is not None and not cancelled:
                waiting = self._small if read.is_small else self._waiting
                (waiting if queue.needs_room else self._urgent).append(read)
                self._arrived.notify_all()
        if read is not None and cancelled:
            self.release(read)
        elif read is not None:
            self._wake()

    def _hold(self, queue: PolledQueue, messages: Sequence[Message]) -> list[Held]:
        """Hold received messages, except those that are done or already held. Return the new ones."""
        renew_at = self._clock() + self._visibility / 3
        found = []
        with self._lock:
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

    def _read(self, queue: PolledQueue, held: Held) -> Held | None:
        """Open a message; return None if there is nothing to hand out."""
        if queue.cancelled.is_set():  # it was cancelled while earlier messages were opened
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
            with self._lock:
                self._forget(held)
            return None
        if held.payload is None:
            self.delete(held)
            return None
        if not queue.needs_room:
            self.delete(held)
        else:
            queue.is_small = self._is_small(held.payload)
            with self._lock:
                held.is_small = queue.is_small
                self._small_held += held.is_small and held.id in self._held
        return held

    # -- held messages

    def _forget(self, held: Held, *, done: bool = False) -> None:
        if self._held.get(held.id) is held:
            del self._held[held.id]
            self._small_held -= held.is_small
        if done:
            self._done[held.id] = None
            if len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
        self._freed.notify()

    def _expiring_leases(self) -> list[Held]:
        """Return the messages whose leases must be renewed now; give back those whose work is lost."""
        with self._lock:
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

        A waiting message is not started here. If a task is working on it, a redelivery to this worker resumes the renewals.
        """
        with self._lock:
            waiting = self._small if held.is_small else self._waiting
            if held in waiting:
                waiting.remove(held)
                self._forget(held)
            else:
                held.renew_at = math.inf


class Pace:
    """Measures how many messages were done in about the last second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0.0
        self._at = clock()

    def count(self, messages: float = 1.0) -> None:
        """Count a message, or a part of one."""
        self._count = self.rate() + messages
        self._at = self._clock()

    def rate(self) -> float:
        """Return messages per second."""
        return self._count * math.exp(self._at - self._clock())
