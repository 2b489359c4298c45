"""kombu's SQS transport, with the project's own connections.

Queues are named and never created or listed at run time: a role that may send, receive and delete is enough. A message's
receive count travels with it as the header `receives`, so a task can tell its last attempt from its first.
"""

from __future__ import annotations

from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from kombu.log import get_logger
from kombu.transport import SQS
from kombu.utils.objects import cached_property
from vine import promise, transform

logger = get_logger(__name__)
#: Seconds until a receive that failed is tried again.
_RECEIVE_AGAIN = 2


def backoff(receives: int) -> int:
    """Seconds until a message that was received `receives` times is visible again: 5, 10, 20 ... 300."""
    return min(300, 5 << min(receives - 1, 10))


class QoS(SQS.QoS):
    """Unacknowledged messages. One that is requeued comes back the later the more often it has come."""

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give a message back; without `requeue` it is deleted, or left for the dead letters, by kombu's rules."""
        if requeue and delivery_tag in self._delivered:
            self.channel.postpone(self._delivered[delivery_tag].delivery_info)
        super().reject(delivery_tag, requeue=False)


class Channel(SQS.Channel):
    """Reads two transport options of its own: `client_factory` (makes a boto3 SQS client) and `queues` (their options)."""

    QoS = QoS

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

    def postpone(self, delivery_info: dict[str, Any]) -> None:
        """Make a message visible again after the back-off of its receive count."""
        message = delivery_info["sqs_message"]
        receives = int(message.get("Attributes", {}).get("ApproximateReceiveCount", 1))
        try:
            self.sqs(queue=delivery_info["routing_key"]).change_message_visibility(
                QueueUrl=delivery_info["sqs_queue"],
                ReceiptHandle=message["ReceiptHandle"],
                VisibilityTimeout=backoff(receives),
            )
        except (ClientError, BotoCoreError):
            logger.exception("a message could not be given back; it is visible again after its visibility timeout")

    def _schedule_queue(self, queue: str) -> None:
        """Ask for messages, and ask again whatever happens.

        kombu 5.7.0 asks again only after an answer: after a refused connection, a 5xx or a 4xx its worker lives on and hears
        nothing.
        """
        if queue not in self._active_queues:
            return
        if not self.qos.can_consume():
            self._loop1(queue)
            return
        try:
            self._get_bulk_async(queue, callback=promise(self._loop1, (queue,), on_error=self._receive_failed))
        except Exception as error:  # before the call was sent: signing, the queue's URL
            self._receive_failed(queue, error)

    def _get_async(self, queue: str, count: int = 1, callback: Any = None) -> Any:
        url = self._new_queue(queue)
        ready = transform(self._on_messages_ready, callback, url, queue)
        # Without a handler of its own vine raises the failure into the worker's loop, and tells `callback` nothing.
        ready.on_error = lambda *arguments: callback.throw(arguments[-1])
        name = self.canonical_queue_name(queue)
        return self._get_from_sqs(
            queue_name=name, queue_url=url, count=count, connection=self.asynsqs(queue=name), callback=ready
        )

    def _receive_failed(self, queue: str, error: Exception) -> None:
        logger.error("receive from %s failed, again in %d s: %r", queue, _RECEIVE_AGAIN, error)
        self.hub.call_later(_RECEIVE_AGAIN, self._schedule_queue, queue)

    def _on_messages_ready(self, queue: str, qname: str, messages: Any) -> Any:
        if not isinstance(messages, dict):  # kombu's word for a timeout and a 5xx is an empty list
            raise ConnectionError("no answer from SQS")
        return sum(self._taken(queue, qname, message) for message in messages.get("Messages", ()))

    def _taken(self, queue: str, qname: str, message: dict[str, Any]) -> int:
        """Hand one message to the worker. One that breaks on its way must not take the others of its batch with it."""
        try:
            taken: int = super()._on_messages_ready(queue, qname, {"Messages": [message]})
        except Exception:
            logger.exception("a message of %s cannot be taken; it is left to the dead letters", qname)
            # Else its prefetch slot would be held for good, and with the last slot the worker would fall silent.
            if message["ReceiptHandle"] in self.qos._delivered:
                self.qos.reject(message["ReceiptHandle"])
            return 0
        return taken

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
