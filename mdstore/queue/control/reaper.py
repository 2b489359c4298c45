"""Queues that nobody reads: each process marks its own while it lives, and removes those whose marks are old.

A queue of a process that was killed costs nothing, but its topic goes on filling it. Only queues with the namespace's tag are
touched; a queue without a tag, or a name that only looks alike, is somebody else's.
"""

from __future__ import annotations

import logging
import random
import threading
import time

from mdstore.errors import DeploymentBroken
from mdstore.log import event
from mdstore.queue.control.topics import Topics

MARKED_EVERY = 300.0
ORPHANED_AFTER = 3 * MARKED_EVERY + 60
#: In rounds of marking.
_SWEPT_EVERY = 12
#: Queues that one sweep looks at: many workers sweep, and all of them together look at every queue.
_LOOKED_AT = 50


def sweep(topics: Topics, *, listing: bool = False, limit: int | None = None) -> list[str]:
    """Remove left-over queues and their subscriptions; returns the queues' SQS names.

    Without `listing` the queues are found by their subscriptions, for which a worker's role is enough; with it left-over
    reply queues are found too. `limit` looks at so many queues, taken at random. Raises `Unavailable` or `DeploymentBroken`.
    """
    found: dict[str, str | None] = dict(topics.subscribed())
    if listing:
        found |= dict.fromkeys(set(topics.listed()) - set(found))
    names = random.sample(sorted(found), min(limit or len(found), len(found)))
    removed = []
    for name in names:
        seen = topics.seen(name)
        if seen is not None and time.time() - seen > ORPHANED_AFTER:
            topics.discard(name, found[name])
            removed.append(name)
    if removed:
        event("queues.swept", count=len(removed), queues=",".join(removed))
    return removed


class Reaper:
    """Marks this process's queues every 5 minutes, and sweeps soon after its start and about every hour."""

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._kept: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, queue: str) -> None:
        """Mark a queue from now on."""
        with self._lock:
            self._kept.add(queue)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="stale-queue reaper", daemon=True)
                self._thread.start()

    def release(self, queue: str) -> None:
        """Mark a queue no longer."""
        with self._lock:
            self._kept.discard(queue)

    def mark(self) -> None:
        """Mark the queues; one that was removed, because this process was asleep for long, is made anew."""
        with self._lock:
            kept = list(self._kept)
        for queue in kept:
            try:
                self._topics.mark(queue)
            except DeploymentBroken:
                self._topics.make(queue)
                self._topics.join(queue)

    def _run(self) -> None:
        rounds = 0
        delay = random.uniform(1, 60)  # noqa: S311  a fleet that starts at once does not sweep at once
        while True:
            time.sleep(delay)
            delay = MARKED_EVERY * random.uniform(0.8, 1)  # noqa: S311
            try:
                self.mark()
                if rounds % _SWEPT_EVERY == 0:
                    sweep(self._topics, limit=_LOOKED_AT)
                rounds += 1
            except Exception as error:  # the next round tries again; a thread that ended would have its queues removed
                event("queues.failed", level=logging.WARNING, error=repr(error))
