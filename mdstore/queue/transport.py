"""kombu's SQS transport, with the project's own connections.

Queues are named and never created or listed at run time: a role that may send, receive and delete is enough. A message's
receive count travels with it as the header `receives`, so a task can tell its last attempt from its first.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import SQS
from kombu.utils.objects import cached_property


class Channel(SQS.Channel):
    """Reads two transport options of its own: `client_factory` (makes a boto3 SQS client) and `queues` (their options)."""

    def new_sqs_client(self, *_: Any, **__: Any) -> Any:
        """Make a client of the project's own; kombu's would want keys in the broker's URL."""
        return self.transport_options["client_factory"]()

    @cached_property  # type: ignore[untyped-decorator]
    def predefined_queues(self) -> dict[str, dict[str, Any]]:
        """The queues with their URLs, asked for once a connection, so that creating an app needs no network."""
        known: dict[str, dict[str, Any]] | None = getattr(self.connection, "known_queues", None)
        if known is None:
            client = self.new_sqs_client()
            known = {
                name: {**options, "url": client.get_queue_url(QueueName=name)["QueueUrl"]}
                for name, options in self.transport_options["queues"].items()
            }
            self.connection.known_queues = known
        return known

    def _envelope_payload(self, payload: Any, raw_text: str, message: Any, q_url: str) -> Any:
        envelope = super()._envelope_payload(payload, raw_text, message, q_url)
        receives = message.get("Attributes", {}).get("ApproximateReceiveCount")
        if receives is not None and isinstance(envelope.get("headers"), dict):
            envelope["headers"]["receives"] = int(receives)
        return envelope


class Transport(SQS.Transport):
    """The transport; `polling_interval` bounds how long a free worker process waits before it asks for more."""

    Channel = Channel
    known_queues: dict[str, dict[str, Any]] | None = None
