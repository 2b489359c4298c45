"""Send messages one at a time or, inside `batched`, ten per call and several calls at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kombu.exceptions import OperationalError

from mdstore.aws.sqs import Entry, Failed, Sqs, is_fifo
from mdstore.errors import restored

_FLUSH_AT = 100  # messages: ten calls
_FLUSH_AFTER = 0.2  # seconds, because the tasks of a group may come from a slow generator


class Unsent(OperationalError):
    """SQS did not accept some messages. `failed` lists the task id of each, and the reason."""

    def __init__(self, failed: list[tuple[str, Failed]], *, of: int) -> None:
        shown = "; ".join(f"{task_id}: {reason}" for task_id, reason in failed[:10])
        super().__init__(f"{len(failed)} of {of} messages were not sent: {shown}")
        self.failed = failed

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (type(self), self.args, self.__dict__)

    @property
    def is_refused(self) -> bool:
        """Return whether SQS will never accept at least one of the messages."""
        return any(reason.is_refused for _, reason in self.failed)


class BatchPublisher(threading.local):
    """Sends messages in batches. Each thread collects its own, and sends them when its outermost context ends.

    Celery's `group` opens a context around those of its tasks, so they are sent together. A task that is sent alone has only
    its own context, so its message is sent at once.
    """

    def __init__(self, sqs: Callable[[], Sqs]) -> None:
        self._sqs = sqs
        self._depth = 0
        self._pending: dict[str, list[tuple[Entry, str]]] = {}
        self._count = 0
        self._since = 0.0
        self._unsent: list[tuple[str, Failed]] = []
        self._sent = 0

    @contextmanager
    def context(self) -> Iterator[None]:
        """Send the messages that inner contexts add, at the latest when this context ends.

        Messages that were added before an error are sent all the same. Raises `Unsent`, even if that replaces the error; the
        error is then its `__context__`.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._finish()

    def add(self, url: str, entry: Entry, task_id: str) -> None:
        """Send a message, now or soon. Raises `Unsent`, now or at the end of the context."""
        if self._count and time.monotonic() - self._since > _FLUSH_AFTER:
            self._flush()  # leave out the new message, so that the tasks of earlier ones can start before it
        self._pending.setdefault(url, []).append((entry, task_id))
        self._count += 1
        if self._count == 1:
            self._since = time.monotonic()
        if self._depth <= 1:
            self._finish()
        elif self._count >= _FLUSH_AT:
            self._flush()

    def _finish(self) -> None:
        try:
            self._flush()
        finally:
            unsent, self._unsent = self._unsent, []
            sent, self._sent = self._sent, 0
        if unsent:
            raise Unsent(unsent, of=sent)

    def _flush(self) -> None:
        pending, self._pending, self._count = self._pending, {}, 0
        for url, some in pending.items():
            self._sent += len(some)
            answers = self._sqs().send(url, [entry for entry, _ in some], in_order=is_fifo(url))
            self._unsent += [
                (task_id, failed) for (_, task_id), failed in zip(some, answers, strict=True) if failed is not None
            ]
