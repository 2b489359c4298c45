"""Decide which queue a worker polls next, for how many messages, and for how long.

The queues of a worker share its room. `target` is how many messages to hold now, and `bound` is the most that it may ever hold.

    drain     a short poll of a queue whose last poll returned messages: it asks for up to ten and never waits
    listen    a long poll of an idle queue: it waits, and asks for one message
    sole      a long poll of the only queue: it waits, and asks for up to ten messages

Only drains use the room up to `target`, and they end at once. Listening polls use the room between `target` and `bound`. So an
idle queue never keeps room from a queue with a backlog, and no queue waits until another one has got messages.

If there are more idle queues than room to listen, they take turns with shorter polls. Each queue is still asked about once per
wait time, except that no poll is shorter than a second. Queues with a backlog take turns by weight. This is start-time fair
queueing: the queue with the earliest turn is polled next, and its turn moves on by the number of messages that it delivers,
divided by its weight.
`docs/adr/0019-shared-room.md` has the reasons.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from mdstore.aws.sqs import MAX_ENTRIES

_POLLS = 2  # at the same time per queue, at most
SMALL = 16  # so many small messages take the room of one
_SHORT_WAIT = 1  # seconds that a poll waits if it keeps room that another queue may need


class Use(Enum):
    """Tells which room a poll reserves."""

    TARGET = "target"
    BOUND = "bound"
    NONE = "none"


@dataclass(slots=True, eq=False)
class PolledQueue:
    """Describes a queue that is consumed.

    Without `needs_room`, its messages are urgent: they are deleted on arrival and handed out first. `is_small` says whether
    the message that arrived last is small.
    """

    name: str
    url: str
    needs_room: bool
    weight: int = 1
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_idle: bool = False  # the last poll returned no message
    has_backlog: bool = False  # the last poll returned as many messages as it asked for
    is_failing: bool = False
    is_small: bool = False
    polls: int = 0  # under way, or with messages that are not yet opened
    reserved: int = 0  # messages that receives under way asked for
    unopened: int = 0  # messages that were received and are not yet opened
    asked_at: float = 0.0
    answered_at: float = 0.0
    returned_at: float = 0.0
    turn: float = 0.0


@dataclass(slots=True, eq=False)
class Poll:
    """Describes a receive: `count` messages of a queue at most, within `wait` seconds."""

    queue: PolledQueue
    count: int
    wait: int
    use: Use
    may_grow: bool = False  # a little later there may be room for more messages


class Schedule:
    """Chooses the polls of one poller. Its caller holds a lock during each call.

    `room` returns how many messages the worker works on at the same time (0: any number), and `rate` how many it did in the
    last second; up to `ahead` times `room` are held.
    """

    def __init__(
        self,
        *,
        wait_time: int,
        ahead: int,
        room: Callable[[], int],
        rate: Callable[[], float],
        clock: Callable[[], float],
        weights: Mapping[str, int] | None = None,
    ) -> None:
        self._wait_time = wait_time
        self._ahead = ahead
        self._room = room
        self._rate = rate
        self._clock = clock
        self._weights = weights or {}
        self._reserved = dict.fromkeys(Use, 0)
        self._turn = 0.0
        self._probed_at = -math.inf
        self.queues: dict[str, PolledQueue] = {}

    def add(self, queue: str, url: str, *, needs_room: bool) -> None:
        """Poll a queue from now on."""
        self.queues[queue] = PolledQueue(queue, url, needs_room, self._weights.get(queue, 1))

    def next(self, held: int, *, takes_urgent: bool) -> Poll | None:
        """Return the poll to begin now, or None if there is none. `held` is the number of messages held."""
        ready = sorted((one for one in self.queues.values() if _is_ready(one)), key=lambda one: one.turn)
        urgent = [one for one in ready if not one.needs_room]
        if urgent and takes_urgent:  # a listener that is slower than the senders leaves the rest in SQS
            return Poll(urgent[0], MAX_ENTRIES, self._wait_time, Use.NONE)
        return self._next_with_room([one for one in ready if one.needs_room], held)

    def _next_with_room(self, ready: list[PolledQueue], held: int) -> Poll | None:
        if not ready:
            return None
        if not (room := self._room()):
            return Poll(ready[0], MAX_ENTRIES, self._wait_time, Use.NONE)
        bound = room * self._ahead
        target = min(bound, max(room, math.ceil(self._rate())))
        sharing = sum(one.needs_room for one in self.queues.values())
        if sharing == 1:
            return self._drain(ready, held, target, bound, self._wait_time if ready[0].asked_at else _SHORT_WAIT)
        waiting = [one for one in ready if not one.is_idle]
        return self._listen(ready, held, target, bound, sharing) or self._drain(waiting, held, target, bound, 0)

    def begin(self, poll: Poll) -> None:
        """Reserve the room of a poll, and count its messages as the queue's turn."""
        queue, now = poll.queue, self._clock()
        if not queue.reserved:
            queue.returned_at = now
            queue.answered_at = queue.answered_at if queue.is_failing else now
        queue.polls += 1
        queue.reserved += poll.count
        queue.asked_at = now
        self._reserved[poll.use] += poll.count
        self._turn = max(self._turn, queue.turn)
        queue.turn = self._turn + poll.count / queue.weight

    def received(self, poll: Poll, count: int) -> None:
        """Free the room of a poll that has returned `count` messages, which are held from now on."""
        queue = poll.queue
        queue.reserved -= poll.count
        queue.is_idle, queue.has_backlog = not count, count == poll.count
        queue.turn -= (poll.count - count) / queue.weight
        self._reserved[poll.use] -= poll.count

    def _listen(self, ready: list[PolledQueue], held: int, target: int, bound: int, sharing: int) -> Poll | None:
        """Return a poll of the idle queue that was polled least recently.

        If `target` leaves no room to listen, it waits for a second at most, and not at all while another queue has a backlog.
        """
        idle = [one for one in ready if one.is_idle and not one.polls]
        if not idle or held >= target or self._free(held, bound) < 1:
            return None
        queue = min(idle, key=lambda one: one.asked_at)
        listening = self._reserved[Use.BOUND]
        if spare := bound - target:
            wait = min(self._wait_time, math.ceil(self._wait_time * spare / sharing))
            return Poll(queue, 1, wait, Use.BOUND) if listening < spare else None
        if all(one.is_idle for one in self.queues.values() if one.needs_room):
            return Poll(queue, 1, _SHORT_WAIT, Use.BOUND) if listening * self._wait_time < sharing else None
        if self._clock() - self._probed_at < self._wait_time / max(sharing, self._wait_time):
            return None
        self._probed_at = self._clock()
        return Poll(queue, 1, 0, Use.BOUND)

    def _drain(self, ready: list[PolledQueue], held: int, target: int, bound: int, wait: int) -> Poll | None:
        if not ready:
            return None
        # Small messages are expected where the last one was small. If others come, the bound holds all the same.
        expected = SMALL if ready[0].is_small else 1
        free = min((target - held - self._reserved[Use.TARGET]) * expected, self._free(held, bound), MAX_ENTRIES)
        if free < 1:
            return None
        may_grow = free < MAX_ENTRIES < target and held > 0 and expected == 1
        return Poll(ready[0], free, wait, Use.TARGET, may_grow=may_grow)

    def _free(self, held: int, bound: int) -> int:
        return bound - held - self._reserved[Use.TARGET] - self._reserved[Use.BOUND]


def _is_ready(queue: PolledQueue) -> bool:
    """Return whether another poll of the queue may begin: a second one only while the queue has a backlog."""
    return queue.polls < (_POLLS if queue.has_backlog and queue.needs_room else 1)
