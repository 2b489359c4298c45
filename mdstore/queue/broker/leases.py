"""Deletes what is done, gives back what is not wanted and extends what is held: ten messages a call, on a thread of its own."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kombu.log import get_logger

from mdstore.aws.sqs import MAX_ENTRIES, Failed, Sqs, is_gone

if TYPE_CHECKING:
    from mdstore.queue.broker.poller import Held

logger = get_logger(__name__)

_FLUSH_AFTER = 0.1  # seconds that a change waits for nine others
_LOOK_EVERY = 0.5  # seconds from one look for what must be extended to the next
_TRIES = 3


@dataclass(slots=True, eq=False)
class _Change:
    """A message that is to be visible again in `seconds`; None deletes it."""

    held: Held
    seconds: int | None
    is_extension: bool = False
    tries: int = 0


class LeaseExtender:
    """One a courier. `expiring` returns what is to be extended now; `abandon` is told what is not this worker's any more."""

    def __init__(
        self, *, sqs: Sqs, visibility: int, expiring: Callable[[], list[Held]], abandon: Callable[[Held], None]
    ) -> None:
        self._sqs = sqs
        self._visibility = visibility
        self._expiring = expiring
        self._abandon = abandon
        self._changed = threading.Condition()
        self._changes: deque[_Change] = deque()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sqs keeper", daemon=True)
            self._thread.start()

    def delete(self, held: Held) -> None:
        """Delete a message soon."""
        self._add(_Change(held, None))

    def show(self, held: Held, seconds: int) -> None:
        """Make a message visible again, in `seconds` from then."""
        self._add(_Change(held, seconds))

    def close(self, timeout: float) -> None:
        """Send what is left, for at most `timeout` seconds."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        if self._changes or (self._thread is not None and self._thread.is_alive()):
            logger.warning("some messages could not be deleted or given back in time; they come again")

    def _add(self, change: _Change) -> None:
        with self._changed:
            self._changes.append(change)
            self._changed.notify_all()

    def _run(self) -> None:
        while changes := self._next():
            self._send(changes)

    def _next(self) -> list[_Change]:
        """Wait for changes; returns none when all is sent and the keeper is closing."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._changes or self._is_closing, _LOOK_EVERY)
                if self._changes and not self._is_closing:
                    self._changed.wait_for(lambda: len(self._changes) >= MAX_ENTRIES or self._is_closing, _FLUSH_AFTER)
                found = list(self._changes)
                self._changes.clear()
                is_closing = self._is_closing
            if not is_closing:
                found += self._extensions()
            if found or is_closing:
                return found

    def _extensions(self) -> list[_Change]:
        try:
            return [_Change(held, self._visibility, is_extension=True) for held in self._expiring()]
        except Exception:
            logger.exception("messages could not be extended in time; they may come again")
            return []

    def _send(self, changes: Sequence[_Change]) -> None:
        calls: dict[tuple[str, bool], list[_Change]] = defaultdict(list)
        for change in changes:
            calls[change.held.url, change.seconds is None].append(change)
        for (url, is_delete), some in sorted(calls.items(), key=lambda call: call[0][1]):  # deletes can wait
            for change, failed in zip(some, self._answers(url, some, is_delete=is_delete), strict=True):
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
            logger.exception("messages could not be deleted or extended now")
            return [Failed(code=type(error).__name__, message=str(error))] * len(some)

    def _failed(self, change: _Change, failed: Failed) -> None:
        """Try again what may work then; what is left is visible again after its visibility timeout."""
        if is_gone(failed.code):
            return  # and its messages with it
        change.tries += 1
        is_its_own = failed.sender_fault and bool(failed.id)  # the entry's fault, and not the call's
        if is_its_own or change.tries >= _TRIES:
            what = "extended" if change.is_extension else "given back" if change.seconds is not None else "deleted"
            logger.warning("message %s could not be %s: %s", change.held.id, what, failed)
            if change.is_extension and is_its_own:
                self._abandon(change.held)
        elif not change.is_extension:  # that comes round by itself
            self._add(change)
