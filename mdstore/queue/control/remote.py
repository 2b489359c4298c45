"""Celery's remote control, over a transport in which a process knows only its own bindings."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from botocore.exceptions import BotoCoreError, ClientError
from celery.app.control import Control as CeleryControl
from celery.app.control import Mailbox as CeleryMailbox
from celery.utils.log import get_logger
from celery.utils.serialization import jsonify
from celery.worker.consumer.control import Control as CeleryControlStep
from celery.worker.control import add_consumer as celery_add_consumer
from celery.worker.control import nok
from kombu import Producer, pidbox
from kombu.exceptions import OperationalError
from kombu.utils.encoding import safe_str

from mdstore.errors import ConfigurationError, MdstoreError

logger = get_logger(__name__)


class Node(pidbox.Node):
    """Answers commands for a worker."""

    def reply(self, data: Any, exchange: str, routing_key: str, ticket: str, **_: Any) -> None:
        """Send an answer, without retries: the client may be gone, and the worker must not wait for that.

        A value that is not JSON, such as an object in the transport's options, is sent as its `repr`.
        """
        try:
            Producer(self.channel, auto_declare=False).publish(
                jsonify(data, unknown_type_filter=safe_str),
                exchange=exchange,
                routing_key=routing_key,
                headers={"ticket": ticket, "clock": self.mailbox.clock.forward()},
                serializer="json",
            )
        except (MdstoreError, OperationalError, ClientError, BotoCoreError) as error:
            logger.warning("the answer to a command could not be sent: %s", error)


class Mailbox(CeleryMailbox):
    """Carries commands and their answers. Each command has a reply queue of its own."""

    node_cls = Node

    @property
    def oid(self) -> str:
        """Return the id of the reply queue. kombu derives it from addresses in memory, which may repeat."""
        oid: str = self.__dict__.setdefault("_oid", uuid4().hex[:20])
        return oid

    def __call__(self, connection: Any) -> Mailbox:
        """Return a mailbox that is bound to a connection, for one command."""
        bound: Mailbox = super().__call__(connection)
        bound.__dict__.pop("_oid", None)
        return bound


class Control(CeleryControl):
    """Sends commands for a client."""

    Mailbox = Mailbox

    def broadcast(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """Send a command to workers. Raises `ConfigurationError` if remote control is off."""
        if not self.app.settings.remote_control:
            raise ConfigurationError(key="remote_control", value=False, expected="true, for commands to workers")
        # The timeout becomes the command's expiry, and workers refuse a command without one.
        kwargs["timeout"] = kwargs.get("timeout") or 1.0
        return super().broadcast(command, *args, **kwargs)


def add_consumer(state: Any, queue: str, *args: Any, **options: Any) -> Any:
    """Start consuming a queue. Refuse one that does not exist: Celery would end the worker."""
    try:
        state.consumer.task_consumer.channel.queue_url(queue)
    except (MdstoreError, ClientError, BotoCoreError) as error:
        logger.error("queue %s cannot be consumed: %s", queue, error)  # noqa: TRY400  a traceback would add nothing
        return nok(str(error))
    return celery_add_consumer(state, queue, *args, **options)


class ControlStep(CeleryControlStep):
    """Starts remote control in a worker. If topics or permissions are missing, the worker logs that and runs without it."""

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self.start, self.shutdown = self._start, self._shutdown
        self.box.node.handlers = {**self.box.node.handlers, "add_consumer": add_consumer}

    def _start(self, c: Any) -> None:
        try:
            self.box.start(c)
        except (MdstoreError, ClientError, BotoCoreError) as error:
            logger.error(  # noqa: TRY400  a traceback would add nothing
                "remote control does not work until this is fixed and the worker is restarted (run mdstore provision, or set"
                " MDSTORE_REMOTE_CONTROL=false): %s",
                error,
            )
            self._shutdown(c)

    def _shutdown(self, c: Any) -> None:
        self.box.shutdown(c)
        node = self.box.node
        try:
            c.app.topics.remove(node.mailbox.get_queue(node.hostname).name)
        except MdstoreError as error:
            logger.warning("the worker's control queue could not be deleted, and is left to the reaper: %s", error)
