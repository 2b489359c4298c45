"""An app whose transport sends every message twice: `celery -A tests.acceptance.twice worker`."""

from __future__ import annotations

from typing import Any

from mdstore.queue.app import SqsApp
from mdstore.queue.broker.channel import Channel, Transport
from mdstore.settings import Settings
from mdstore.tasks import create_store_app


class TwiceChannel(Channel):
    """A channel that puts each message into the queue twice."""

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        super()._put(queue, message, **kwargs)
        super()._put(queue, message, **kwargs)


class TwiceTransport(Transport):
    """The transport that uses `TwiceChannel`."""

    Channel = TwiceChannel


def twice_app(settings: Settings | None = None) -> SqsApp:
    """Return the data store's app with a transport that sends every message twice."""
    return create_store_app(settings, broker_transport="tests.acceptance.twice:TwiceTransport")


app = twice_app()
