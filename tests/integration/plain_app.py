"""A plain Celery app on this project's transport and backend, sending each message as often as DELIVERIES says."""

from __future__ import annotations

import os
from typing import Any

from mdstore.queue import create_app
from mdstore.queue.app import MdstoreApp
from mdstore.queue.transport import Channel, Transport
from mdstore.settings import Settings


class RepeatingChannel(Channel):
    """Puts each message into the queue DELIVERIES times."""

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        for _ in range(int(os.environ.get("DELIVERIES", "1"))):
            super()._put(queue, message, **kwargs)


class RepeatingTransport(Transport):
    """The transport with such channels."""

    Channel = RepeatingChannel


def plain_app(settings: Settings | None = None) -> MdstoreApp:
    """An app with three tasks of its own."""
    made = create_app(settings, broker_transport="tests.integration.plain_app:RepeatingTransport")

    @made.task(name="add", shared=False)  # type: ignore[untyped-decorator]
    def add(x: int, y: int) -> int:
        return x + y

    @made.task(name="total", shared=False)  # type: ignore[untyped-decorator]
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @made.task(name="fail", shared=False, acks_on_failure_or_timeout=True)  # type: ignore[untyped-decorator]
    def fail(reason: str) -> None:
        raise ValueError(reason)

    return made


app = plain_app()
