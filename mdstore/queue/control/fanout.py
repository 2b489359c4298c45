"""Fan-out for kombu's SQS channel: some exchanges are SNS topics, and queues subscribe to them.

The name of an exchange decides whether it is a topic (`mdstore.queue.control.topics`), not the type with which it is declared.
Celery declares the exchange of its events as `topic`, and so does Flower, which creates its own receiver.
"""

from __future__ import annotations

from typing import Any

from amqp.protocol import queue_declare_ok_t
from kombu.log import get_logger
from kombu.transport import SQS
from kombu.utils.json import dumps

from mdstore.aws.sqs import Message
from mdstore.errors import IntegrityError, MdstoreError
from mdstore.queue.broker.authentication import Authenticator, unsigned
from mdstore.queue.broker.claim_check import ClaimChecks, is_claim
from mdstore.queue.broker.envelope import Malformed
from mdstore.queue.control.broadcasts import unwrap
from mdstore.queue.control.topics import Kind, Topics

logger = get_logger(__name__)


class FanoutChannel(SQS.Channel):
    """Adds fan-out to kombu's channel if the transport options hold `topics` and `reaper`.

    Messages of control, reply and event queues are deleted when they arrive, not when they are done. So a command is obeyed at
    most once.
    """

    @property
    def topics(self) -> Topics | None:
        """Return the namespace's topics, or None if there is no fan-out."""
        topics: Topics | None = self.transport_options.get("topics")
        return topics

    @property
    def supports_fanout(self) -> bool:
        """Return whether there is fan-out."""
        return self.topics is not None

    def kind_of(self, queue: str) -> Kind | None:
        """Return what a queue is for, or None for a queue of tasks."""
        return self.topics.kind_of(queue) if self.topics else None

    # -- exchanges and queues

    def exchange_declare(self, exchange: str | None = None, type: str = "direct", **kwargs: Any) -> None:  # noqa: A002
        """Declare an exchange, with type `fanout` if it is a topic."""
        if self.topics and exchange and self.topics.topic_of(exchange):
            type = "fanout"  # noqa: A001  kombu's name
        super().exchange_declare(exchange, type=type, **kwargs)

    def queue_declare(self, queue: str | None = None, *_: Any, **__: Any) -> Any:
        """Create a queue, unless it is for tasks: those are provisioned, and looked up when they are used."""
        if self.topics and queue and self.kind_of(queue):
            self.topics.create(queue)
        return queue_declare_ok_t(queue or "", 0, 0)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: Any, queue: str) -> None:
        """Do nothing: `subscribe_to_topic` follows when a consumer starts."""

    def subscribe_to_topic(self, queue: str) -> None:
        """Subscribe a queue to its topic if it has one, and keep the queue marked as alive."""
        if self.topics and self.kind_of(queue) in (Kind.CONTROL, Kind.EVENTS):
            self.topics.subscribe(queue)
            self.transport_options["reaper"].register(queue)

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop consuming. A queue without a consumer is no longer marked as alive, and becomes stale."""
        queue = self._tag_to_queue.get(consumer_tag, "")
        if self.kind_of(queue) in (Kind.CONTROL, Kind.EVENTS):
            self.transport_options["reaper"].unregister(queue)
        super().basic_cancel(consumer_tag)

    def _delete(self, queue: str, exchange: str | None = None, *_: Any, **__: Any) -> None:
        if not (self.topics and self.kind_of(queue)):
            raise NotImplementedError(f"queue {queue}: a queue of tasks is deleted where it was provisioned")
        table = self.get_table(exchange)
        # kombu would keep these bindings, one for each command that was sent.
        table[:] = [binding for binding in table if binding[2] != queue]
        try:
            self.topics.remove(queue)
        except MdstoreError as error:
            logger.warning("queue %s could not be deleted, and is left to the reaper: %s", queue, error)

    def _new_queue(self, queue: str, **kwargs: Any) -> str:
        if self.topics and self.kind_of(queue):
            return self.topics.url(queue)
        url: str = super()._new_queue(queue, **kwargs)
        return url

    def canonical_queue_name(self, queue_name: str) -> str:
        """Return the SQS name of a queue."""
        if self.topics and self.kind_of(queue_name):
            return self.topics.name_of(queue_name)
        name: str = super().canonical_queue_name(queue_name)
        return name

    # -- messages

    @property
    def claim_checks(self) -> ClaimChecks:
        """Return the calling process's claim checks."""
        claim_checks: ClaimChecks = self.transport_options["claim_checks"]()
        return claim_checks

    @property
    def authenticator(self) -> Authenticator | None:
        """Return what signs and verifies messages, or None if there is no key."""
        found = self.transport_options.get("authenticator")
        authenticator: Authenticator | None = found() if found else None
        return authenticator

    def authenticated(self, queue: str, message: Message) -> str:
        """Return the body of a message of a queue, without its signature, which is verified if there is a key.

        Raises `Unauthenticated`, `Unavailable` or `DeploymentBroken`.
        """
        authenticator = self.authenticator
        if authenticator is None:
            return unsigned(message.body)
        return authenticator.verify(message.body, self.destination_of(queue), sent_at=message.sent_at)

    def destination_of(self, queue: str) -> str:
        """Return the name for which a queue's messages are signed: that of its topic if it has one, else its SQS name."""
        topics = {Kind.CONTROL: self.topics.control, Kind.EVENTS: self.topics.events} if self.topics else {}
        kind = self.kind_of(queue)
        return topics[kind] if kind in topics else self.canonical_queue_name(queue)

    def text_of(self, body: str) -> str:
        """Return a message's text, from S3 if its body is a pointer. Raises `IntegrityError` or `Unavailable`."""
        return self.claim_checks.load(body) if is_claim(body) else body

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **_: Any) -> None:  # noqa: ARG002
        if self.topics:
            text, authenticator = dumps(message), self.authenticator
            signed = authenticator.sign(text, str(self.topics.topic_of(exchange))) if authenticator else text
            self.topics.publish(exchange, signed)

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        # The client knows the binding of its reply queue; the worker, which runs this, does not.
        if self.topics and exchange == self.topics.reply_exchange:
            return [self.topics.reply_queue(routing_key)]
        found: list[str] = super()._lookup(exchange, routing_key, default)
        return found

    def open_broadcast(self, queue: str, message: Message) -> dict[str, Any] | None:
        """Return the content of a message from a control, reply or event queue, or None if it is refused."""
        topics, kind = self.topics, self.kind_of(queue)
        if not (topics and kind):
            return None
        try:
            body = self.authenticated(queue, message)
            # Answers are sent like tasks, so large ones are in S3. Commands and events come over SNS, which takes 256 KiB.
            text = self.text_of(body) if kind is Kind.REPLY else body
            return unwrap(kind, text, tag=message.message_id, reply_exchange=topics.reply_exchange)
        except (Malformed, IntegrityError) as error:
            logger.warning("a message of queue %s was refused: %s", queue, error)
            return None
