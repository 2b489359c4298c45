"""Remote control: Celery's, over a transport that knows the bindings of its own process only."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from botocore.exceptions import BotoCoreError, ClientError
from celery.app.control import Control as CeleryControl
from celery.app.control import Mailbox as CeleryMailbox
from celery.utils.log import get_logger
from celery.utils.serialization import jsonify
from celery.worker.consumer.control import Control as CeleryControlStep
from kombu import Producer, pidbox
from kombu.exceptions import OperationalError
from kombu.utils.encoding import safe_str

from mdstore.errors import ConfigurationError, MdstoreError

logger = get_logger(__name__)


class Node(pidbox.Node):
    """A worker's end of the mailbox."""

    def reply(self, data: Any, exchange: str, routing_key: str, ticket: str, **_: Any) -> None:
        """Answer, once: whoever asked may be gone, and a worker does not wait for that.

        What is not JSON (an object among the transport's options) is sent as its `repr`.
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
            logger.warning("an answer to a command could not be sent: %s", error)


class Mailbox(CeleryMailbox):
    """Where commands and their answers go. Each question has an answer queue of its own."""

    node_cls = Node

    @property
    def oid(self) -> str:
        """The id of the answer queue; kombu's is made of addresses in memory, which come again."""
        oid: str = self.__dict__.setdefault("_oid", uuid4().hex[:20])
        return oid

    def __call__(self, connection: Any) -> Mailbox:
        """Bind to a connection, for one question."""
        bound: Mailbox = super().__call__(connection)
        bound.__dict__.pop("_oid", None)
        return bound


class Control(CeleryControl):
    """The client's end."""

    Mailbox = Mailbox

    def broadcast(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """Send a command to workers. Raises `ConfigurationError` where remote control is off."""
        if not self.app.settings.remote_control:
            raise ConfigurationError(key="remote_control", value=False, expected="true, for commands to workers")
        kwargs["timeout"] = kwargs.get("timeout") or 1.0  # it becomes the command's expiry: without one it is refused
        return super().broadcast(command, *args, **kwargs)


class ControlStep(CeleryControlStep):
    """The worker's part. Where topics or permissions are missing, the worker says so and works without it."""

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self.start, self.shutdown = self._start, self._shutdown

    def _start(self, c: Any) -> None:
        try:
            self.box.start(c)
        except (MdstoreError, ClientError, BotoCoreError) as error:
            logger.error(  # noqa: TRY400  the reason is enough
                "no remote control until this is mended and the worker restarted (mdstore provision; or set"
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
            logger.warning("the worker's control queue is left to the janitor: %s", error)
