"""An in-memory SQS that records every call."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence

from mdstore.aws.sqs import Entry, Failed, Message, Sqs
from mdstore.errors import Unavailable


class FakeSqs(Sqs):
    """Holds queues by URL. A received message is not received again until it arrives again.

    `refuse` maps handles and message bodies to failures; while `broken` is set, every receive fails.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, deque[Message]] = defaultdict(deque)
        self.sent: list[list[Entry]] = []
        self.asked: list[int] = []
        self.deleted: list[list[str]] = []
        self.visibility_changes: list[tuple[str, int]] = []
        self.refuse: dict[str, Failed] = {}
        self.broken = False
        self._changed = threading.Condition()

    def arrive(
        self, url: str, body: str, *, message_id: str | None = None, handle: str | None = None, receives: int = 1
    ) -> None:
        """Make a message available. `receives` is its receive count, this delivery included."""
        with self._changed:
            message = Message(
                message_id=message_id or body,
                receipt_handle=handle or f"handle of {body}",
                body=body,
                attributes={"ApproximateReceiveCount": str(receives)},
            )
            self.waiting[url].append(message)
            self._changed.notify_all()

    def receive(self, url: str, count: int, *, wait: int, visibility: int) -> list[Message]:  # noqa: ARG002
        with self._changed:
            self.asked.append(count)
            if self.broken:
                raise Unavailable("down", code="Down")
            self._changed.wait_for(lambda: self.waiting[url], min(wait, 0.3))
            return [self.waiting[url].popleft() for _ in range(min(count, len(self.waiting[url])))]

    def send(self, url: str, entries: Sequence[Entry], *, in_order: bool = False) -> list[Failed | None]:  # noqa: ARG002
        self.sent.append(list(entries))
        return [self.refuse.get(entry.message_body) for entry in entries]

    def delete(self, url: str, handles: Sequence[str]) -> list[Failed | None]:  # noqa: ARG002
        self.deleted.append(list(handles))
        return [self.refuse.get(handle) for handle in handles]

    def change_visibility(self, url: str, handles: Sequence[tuple[str, int]]) -> list[Failed | None]:  # noqa: ARG002
        self.visibility_changes += handles
        return [self.refuse.get(handle) for handle, _ in handles]

    @property
    def all_deleted(self) -> list[str]:
        """Return the deleted handles of all calls, in order."""
        return [handle for handles in self.deleted for handle in handles]
