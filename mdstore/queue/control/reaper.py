"""Removal of stale queues: each process marks its own queues as alive, and removes queues whose mark is old.

The queue of a process that was killed costs nothing by itself, but its topic keeps filling it. Only queues with the namespace's
tag are removed. A queue without the tag belongs to another system, even if its name looks the same.
"""

from __future__ import annotations

import logging
import random
import threading
import time

from mdstore.errors import DeploymentBroken
from mdstore.log import event
from mdstore.queue.control.topics import Topics

MARK_INTERVAL = 300.0  # seconds
ORPHANED_AFTER = 3 * MARK_INTERVAL + 60  # seconds without a mark after which a queue is stale
#: Rounds of marking between two removals of stale queues.
_ROUNDS_BETWEEN_REMOVALS = 12
#: The most queues that one removal checks. Many workers do this, and together they check every queue.
_MAX_CHECKED = 50


def remove_stale_queues(topics: Topics, *, listing: bool = False, limit: int | None = None) -> list[str]:
    """Remove stale queues and their subscriptions; return the SQS names of the queues.

    Queues are found by their subscriptions, which a worker's role allows. With `listing`, `ListQueues` is called as well, which
    also finds reply queues. At most `limit` queues, chosen at random, are checked. Raises `Unavailable` or `DeploymentBroken`.
    """
    found: dict[str, str | None] = dict(topics.subscribed())
    if listing:
        found |= dict.fromkeys(set(topics.listed()) - set(found))
    names = random.sample(sorted(found), min(limit or len(found), len(found)))
    removed = []
    for name in names:
        last_seen = topics.last_seen(name)
        if last_seen is not None and time.time() - last_seen > ORPHANED_AFTER:
            topics.discard(name, found[name])
            removed.append(name)
    if removed:
        event("queues.swept", count=len(removed), queues=",".join(removed))
    return removed


class Reaper:
    """Marks this process's queues as alive every 5 minutes, and removes stale queues about every hour.

    The first round of both is within a minute after the first queue is registered.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._queues: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def register(self, queue: str) -> None:
        """Keep a queue marked as alive from now on."""
        with self._lock:
            self._queues.add(queue)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="stale-queue reaper", daemon=True)
                self._thread.start()

    def unregister(self, queue: str) -> None:
        """Stop marking a queue."""
        with self._lock:
            self._queues.discard(queue)

    def mark_queues(self) -> None:
        """Mark the queues as alive. Create a queue again if it was removed because this process had slept for too long."""
        with self._lock:
            queues = list(self._queues)
        for queue in queues:
            try:
                self._topics.mark_alive(queue)
            except DeploymentBroken:
                self._topics.create(queue)
                self._topics.subscribe(queue)

    def _run(self) -> None:
        rounds = 0
        delay = random.uniform(1, 60)  # noqa: S311  workers that start together do not check queues together
        while True:
            time.sleep(delay)
            delay = MARK_INTERVAL * random.uniform(0.8, 1)  # noqa: S311
            try:
                self.mark_queues()
                if rounds % _ROUNDS_BETWEEN_REMOVALS == 0:
                    remove_stale_queues(self._topics, limit=_MAX_CHECKED)
                rounds += 1
            except Exception as error:  # if the thread ended, other processes would remove these queues
                event("queues.failed", level=logging.WARNING, error=repr(error))
