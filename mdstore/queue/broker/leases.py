"""Delete finished messages, give back others and renew the leases of held ones: ten per call, on a separate thread."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kombu.log import get_logger

from mdstore.aws.sqs import MAX_ENTRIES, Failed, Sqs, is_gone

if TYPE_CHECKING:
    from mdstore.queue.broker.poller import Held

logger = get_logger(__name__)

_FLUSH_AFTER = 0.1  # seconds that a change waits for nine others to share its call
_CHECK_EVERY = 0.5  # seconds between checks for leases that must be renewed
_TRIES = 3


@dataclass(slots=True, eq=False)
class _Change:
    """Asks SQS to make a message visible in `seconds` or, if that is None, to delete it."""

    held: Held
    seconds: int | None
    is_renewal: bool = False
    tries: int = 0


class LeaseExtender:
    """Maintains the leases of one poller's messages.

    `expiring` returns the messages whose leases must be renewed now. `abandon` is called with a message whose lease was lost.
    """

    def __init__(
        self,
        *,
        sqs: Sqs,
        visibility: int,
        expiring: Callable[[], list[Held]],
        abandon: Callable[[Held], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sqs = sqs
        self._visibility = visibility
        self._expiring = expiring
        self._abandon = abandon
        self._changed = threading.Condition()
        self._changes: deque[_Change] = deque()
        self._is_closing = False
        self._clock = clock
        self._progress_at = clock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs already."""
        if self._thread is None:
            self._progress_at = self._clock()
            self._thread = threading.Thread(target=self._run, name="sqs leases", daemon=True)
            self._thread.start()

    def delete(self, held: Held) -> None:
        """Queue a message for deletion."""
        self._add(_Change(held, None))

    def set_visibility(self, held: Held, seconds: int) -> None:
        """Queue a change of a message's visibility: it becomes visible `seconds` after the call to SQS."""
        self._add(_Change(held, seconds))

    def close(self, timeout: float) -> None:
        """Send the changes that are left, within `timeout` seconds."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        if self._changes or (self._thread is not None and self._thread.is_alive()):
            logger.warning("some messages could not be deleted or given back in time; they will be redelivered")

    def stalled_for(self) -> float:
        """Return the seconds since the thread last made progress. Before it starts and once it is closing, return 0."""
        return 0.0 if self._thread is None or self._is_closing else self._clock() - self._progress_at

    def _add(self, change: _Change) -> None:
        with self._changed:
            self._changes.append(change)
            self._changed.notify_all()

    def _run(self) -> None:
        while self._send_next():
            pass

    def _send_next(self) -> bool:
        """Send the next changes, and return whether there may be more.

        No error may end the thread: without renewals, every long-running task would run twice.
        """
        changes: list[_Change] = []
        try:
            changes = self._next()
            self._send(changes)
        except Exception as error:
            logger.exception("deleting messages and renewing leases failed, retry in %s s", _CHECK_EVERY)
            time.sleep(_CHECK_EVERY)
            for change in changes:  # some may be sent twice, which does no harm
                self._failed(change, Failed(code=type(error).__name__, message=str(error)))
        return bool(changes) or not self._is_closing

    def _next(self) -> list[_Change]:
        """Wait for changes and return them. Return an empty list once the extender is closing and all changes are sent."""
        while True:
            self._progress_at = self._clock()
            with self._changed:
                self._changed.wait_for(lambda: self._changes or self._is_closing, _CHECK_EVERY)
                if self._changes and not self._is_closing:
                    self._changed.wait_for(lambda: len(self._changes) >= MAX_ENTRIES or self._is_closing, _FLUSH_AFTER)
                found = list(self._changes)
                self._changes.clear()
                is_closing = self._is_closing
            if not is_closing:
                found += self._renewals()
            if found or is_closing:
                return found

    def _renewals(self) -> list[_Change]:
        try:
            return [_Change(held, self._visibility, is_renewal=True) for held in self._expiring()]
        except Exception:
            logger.exception("leases could not be renewed now; their messages may be redelivered")
            return []

    def _send(self, changes: Sequence[_Change]) -> None:
        calls: dict[tuple[str, bool], list[_Change]] = defaultdict(list)
        for change in changes:
            calls[change.held.url, change.seconds is None].append(change)
        # Deletes come last, because they can wait.
        for (url, is_delete), some in sorted(calls.items(), key=lambda call: call[0][1]):
            answers = self._answers(url, some, is_delete=is_delete)
            self._progress_at = self._clock()  # after failed calls too: an outage is no reason to end the worker
            for change, failed in zip(some, answers, strict=True):
                if failed is not None:
                    self._failed(change, failed)

    def _answers(self, url: str, some: Sequence[_Change], *, is_delete: bool) -> Sequence[Failed | None]:
        handles = [change.held.message.receipt_handle for change in some]
        try:
            if is_delete:
                return self._sqs.delete(url, handles)
            seconds = [change.seconds or 0 for change in some]
            return self._sqs.change_visibility(url, list(zip(handles, seconds, strict=True)))
        except Exception as error:
            logger.exception("a call to delete messages or to change their visibility failed")
            return [Failed(code=type(error).__name__, message=str(error))] * len(some)

    def _failed(self, change: _Change, failed: Failed) -> None:
        """Retry a change that may work later. Otherwise leave the message to become visible after its visibility timeout."""
        if is_gone(failed.code):
            return  # the queue was deleted, and its messages with it
        change.tries += 1
        is_its_own = failed.sender_fault and bool(failed.id)  # SQS refused this entry, not the whole call
        if is_its_own or change.tries >= _TRIES:
            other = "delete" if change.seconds is None else "give back"
            action = "renew the lease of" if change.is_renewal else other
            logger.warning("could not %s message %s: %s", action, change.held.id, failed)
            if change.is_renewal and is_its_own:
                self._abandon(change.held)
        elif not change.is_renewal:  # a later check renews it anyway
            self._add(change)
