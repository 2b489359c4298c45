"""Make the Celery app, with its AWS clients, batched publishing and dead letters."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

from celery import Celery, _state
from celery.app.amqp import AMQP
from celery.exceptions import InvalidTaskError
from kombu import Connection
from kombu.utils.objects import cached_property

from mdstore.aws.clients import AwsClients
from mdstore.aws.sqs import Sqs
from mdstore.log import event
from mdstore.queue.broker.authentication import Authenticator, FixedKeys, Keys, SecretKeys
from mdstore.queue.broker.claim_check import ClaimChecks
from mdstore.queue.broker.dead_letters import dead_letter
from mdstore.queue.broker.envelope import Malformed
from mdstore.queue.broker.publisher import BatchPublisher
from mdstore.queue.control.reaper import Reaper
from mdstore.queue.control.topics import Topics
from mdstore.queue.delayed.mover import MoverStep
from mdstore.queue.delayed.table import DelayedTable
from mdstore.queue.results.recovery import RecoveryStep
from mdstore.queue.settings import celery_defaults, check, check_values, default_options, where
from mdstore.queue.worker import child_process
from mdstore.queue.worker.unexecuted import fail_text
from mdstore.queue.worker.watchdog import Watchdog
from mdstore.settings import Settings, load_settings


class _Parts(NamedTuple):
    """Holds the objects that a process builds once from its AWS clients."""

    aws: AwsClients
    claim_checks: ClaimChecks
    delayed_table: DelayedTable
    authenticator: Authenticator | None


#: Parameters of `celery.Celery` that are keys of its configuration under other names.
_KEYS = {"broker": "broker_url", "backend": "result_backend"}


class SqsConnection(Connection):
    """Connects to SQS, and shows region and endpoint in the worker's banner and log."""

    def as_uri(self, *args: Any, **kwargs: Any) -> str:
        """Return region and endpoint."""
        return str(self.transport_options.get("uri") or super().as_uri(*args, **kwargs))


class SqsAmqp(AMQP):
    """Makes the app use `SqsConnection`."""

    Connection = BrokerConnection = SqsConnection


class SqsApp(Celery):
    """Runs Celery on SQS, SNS, S3 and DynamoDB, and sends the messages of tasks in batches.

    Each process builds its own clients, because connections do not survive a fork. The parameters are those of `create_app`.
    """

    amqp_cls = SqsAmqp
    registry_cls = "mdstore.queue.task:SqsTasks"
    control_cls = "mdstore.queue.control.remote:Control"
    events_cls = "mdstore.queue.control.events:Events"
    #: Whether the app needs the data store's tables.
    has_store = False
    settings: Settings
    topics: Topics
    _aws: AwsClients | None = None
    _parts: _Parts | None = None
    _lock = threading.RLock()

    def __init__(
        self,
        main: str | None = None,
        *,
        settings: Settings | None = None,
        event_queue: str | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings or load_settings().settings
        self.listen_as(event_queue)
        given = {_KEYS.get(name, name): value for name, value in options.items() if value is not None}
        check_values(self.settings, given)  # before others can see the app
        super().__init__(main, **options)
        self.steps["worker"] |= {Watchdog, MoverStep, RecoveryStep}
        child_process.connect_signals()

    def __reduce_keys__(self) -> dict[str, Any]:
        """Return the arguments that recreate this app in a process that was not forked from this one."""
        own = {"settings": self.settings, "event_queue": self._event_queue}
        return {**super().__reduce_keys__(), **own}

    def listen_as(self, event_queue: str | None) -> None:
        """Name the queue of the only event listener in this process, or let each listener have its own."""
        self._event_queue = event_queue
        self.__dict__.pop("_transport_parts", None)
        self.topics = Topics(self.settings, lambda: self.aws, event_queue=event_queue)

    def set_current(self) -> None:
        """Make this the current app of this thread, and the default app of all threads unless the user has made another one.

        Celery makes an app current in one thread only. In other threads, `shared_task` would connect to AMQP on localhost.
        """
        super().set_current()
        default = _state.default_app
        if default is None or isinstance(default, SqsApp) or default.main == "default":
            self.set_default()

    def _load_config(self) -> Any:
        self._pending_defaults.appendleft(self._insert_defaults)
        return super()._load_config()

    def _insert_defaults(self) -> dict[str, Any]:
        """Insert this app's defaults between the user's configuration and Celery's, and return no further defaults.

        Inserted by `add_defaults`, they would override a configuration that the user gives as an object.
        """
        conf = self._conf
        defaults = celery_defaults(self.settings, conf)
        for maps in (conf.maps, conf.defaults):
            maps.insert(len(maps) - 1, defaults)
        return {}

    def _connection(self, url: str, *args: Any, transport_options: Any = None, **kwargs: Any) -> Any:
        """Return a connection. Its objects stay out of the configuration, because users may read and replace that."""
        check(self.settings, self.conf)
        given = {**(self.conf.broker_transport_options or {}), **(transport_options or {})}
        options = {**default_options(self.settings), **given, **self._transport_parts}
        return super()._connection(url, *args, transport_options=options, **kwargs)

    def _get_backend(self) -> Any:
        check(self.settings, self.conf)
        return super()._get_backend()

    def _sqs(self) -> Sqs:
        return self.aws.queues

    def _claim_checks(self) -> ClaimChecks:
        return self.claim_checks

    def _delayed_table(self) -> DelayedTable:
        return self.delayed_table

    def _authenticator(self) -> Authenticator | None:
        return self._own_parts.authenticator

    @cached_property  # type: ignore[untyped-decorator]
    def _transport_parts(self) -> dict[str, Any]:
        """Return the objects that channels use. kombu compares connections by them, so each exists once."""
        settings = self.settings
        parts: dict[str, Any] = {
            "uri": f"sqs://{settings.region} ({where(settings, 'sqs')})",
            "sqs": self._sqs,
            "publisher": self.publisher,
            "admit": self.admit,
            "is_small": self.is_small,
            "dead_letter": self.dead_letter,
            "fail_unexecuted": self.fail_unexecuted,
            "max_receives": settings.max_receives,
            "claim_checks": self._claim_checks,
            "delayed_table": self._delayed_table,
        }
        if settings.signing_keys or settings.signing_secret:
            parts["authenticator"] = self._authenticator
        if settings.remote_control or settings.events:
            parts |= {"topics": self.topics, "reaper": Reaper(self.topics)}
        return parts

    @property
    def aws(self) -> AwsClients:
        """Return the AWS clients of this process."""
        aws = self._aws
        # Do not take the lock here: if another thread held it when the worker forked, the child would wait forever.
        if aws is not None and aws.owner_pid == os.getpid():
            return aws
        with self._lock:
            if self._aws is None or self._aws.owner_pid != os.getpid():
                self._aws = AwsClients(self.settings)
            return self._aws

    @property
    def claim_checks(self) -> ClaimChecks:
        """Return this process's claim checks, which keep large messages in S3."""
        return self._own_parts.claim_checks

    @property
    def delayed_table(self) -> DelayedTable:
        """Return this process's table of messages that are due later than SQS can delay them."""
        return self._own_parts.delayed_table

    @property
    def _own_parts(self) -> _Parts:
        """Build the parts once per process and return them.

        Building them for each message would take too long, and the delayed table remembers what it has written.
        """
        aws, settings = self.aws, self.settings
        if self._parts is None or self._parts.aws is not aws:
            claim_checks = ClaimChecks(
                objects=aws.objects,
                prefix=settings.claim_prefix,
                threshold=settings.claim_threshold,
                max_bytes=settings.max_claim_bytes,
            )
            table = DelayedTable(dynamo=aws.dynamo, table=settings.delayed_table)
            self._parts = _Parts(aws, claim_checks, table, _authenticator(settings, aws))
        return self._parts

    @cached_property  # type: ignore[untyped-decorator]
    def Worker(self) -> Any:  # noqa: N802  Celery's name
        """Return the class of workers."""
        return self.subclass_with_self("mdstore.queue.worker.worker:SqsWorker", reverse="Worker")

    def queue_names(self) -> list[str]:
        """Return the names in SQS of the queues of tasks that the configuration names."""
        with self.connection_for_write() as connection:
            return [connection.default_channel.canonical_queue_name(queue) for queue in self.amqp.queues]

    @cached_property  # type: ignore[untyped-decorator]
    def GroupResult(self) -> Any:  # noqa: N802  Celery's name
        """Return the class of group results."""
        return self.subclass_with_self("mdstore.queue.results.results:BatchedGroupResult", reverse="GroupResult")

    @cached_property  # type: ignore[untyped-decorator]
    def publisher(self) -> BatchPublisher:
        """Return the publisher of the tasks' messages."""
        return BatchPublisher(self._sqs)

    def batched(self) -> AbstractContextManager[None]:
        """Send the tasks published inside the context, ten per call, when it ends or sooner. Raises `Unsent` at its end."""
        context: AbstractContextManager[None] = self.publisher.context()
        return context

    @contextmanager
    def producer_or_acquire(self, producer: Any = None) -> Iterator[Any]:
        """Extend Celery's context: the outermost one sends what was published inside it, so a group is sent in batches."""
        with self.publisher.context(), super().producer_or_acquire(producer) as acquired:
            yield acquired

    def dead_letter(self, *, body: str, reason: str, task: str, receives: int) -> None:
        """Store a message that must not be executed in the dead-letter queue. Raises `Unavailable` or `DeploymentBroken`."""
        queue = self.settings.dead_letter_queue
        dead_letter(self.aws.queues, queue, body=body, reason=reason, task=task, receives=receives)
        event(
            "message.dead_lettered", level=logging.ERROR, task=task, receives=receives, error=reason.partition("\n")[0]
        )

    def admit(self, task: str, canvas: Any) -> None:  # noqa: ARG002
        """Raise `Malformed` for a message whose task, or whose canvas (what runs after it), this app's workers do not execute.

        `celery.chord_unlock` polls a chord for as long as its message asks. No result backend of these apps uses it.
        """
        if task == "celery.chord_unlock":
            raise Malformed(f"the task {task!r} is disabled: the result backend completes chords itself")

    def is_small(self, headers: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Return whether a message's headers announce work that a process may do side by side with other small work.

        The task needs a method `prepare`, and its requests decide whether they are small: see `mdstore.queue.worker.jobs`.
        """
        return False

    def prepare_canvas(self, canvas: Any) -> Any:
        """Return what to send in place of a canvas (signatures, in lists or alone) that is about to be sent or stored."""
        return canvas

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, *others: Any, **options: Any) -> Any:
        """Send a task, after preparing the canvas of what follows it."""
        for part in ("link", "link_error", "chain", "chord"):
            if options.get(part):
                options[part] = self.prepare_canvas(options[part])
        return super().send_task(name, args, kwargs, *others, **options)

    def fail_unexecuted(self, text: str, error: Exception) -> None:
        """Fail the task of a message, given as its text, that no worker can execute. Raises errors of AWS."""
        fail_text(self, text, InvalidTaskError(str(error)))

    def start(self, argv: Sequence[str] | None = None) -> int:
        """Run the command `celery` with `argv`, and return its exit code, which Celery's own method drops."""
        from celery.bin.celery import celery  # noqa: PLC0415  producers do not need it

        celery.params[0].default = self
        try:
            code = celery.main(args=argv, standalone_mode=False)
        finally:
            celery.params[0].default = None
        return code if isinstance(code, int) else 0

    def worker_main(self, argv: Sequence[str] | None = None) -> None:
        """Run a worker. If it fails, exit with its exit code."""
        if code := self.start(sys.argv if argv is None else argv):
            sys.exit(code)

    def warm_up(self) -> None:
        """Build what tasks use. A worker's child process calls this before its first message."""
        _ = self.aws


def _authenticator(settings: Settings, aws: AwsClients) -> Authenticator | None:
    """Return what signs and verifies messages, or None if the settings name no key."""
    keys: Keys = FixedKeys(settings.signing_keys)
    if settings.signing_secret:
        keys = SecretKeys(partial(aws.secret_versions, settings.signing_secret))
    elif not settings.signing_keys:
        return None
    return Authenticator(keys, required=settings.require_signatures)


def create_app(
    settings: Settings | None = None, *, name: str = "mdstore", event_queue: str | None = None, **options: Any
) -> SqsApp:
    """Make a Celery app with SQS as its broker and DynamoDB as its result backend. This opens no connection.

    `options` are those of `celery.Celery`: its parameters, e.g. `set_as_current`, `task_cls` and `include`, and any key of
    Celery's configuration. As with Celery, the app becomes the current one, and its configuration may also come from
    `app.config_from_object` or `app.conf`. Raises `ConfigurationError`, here or when the app is used, if the configuration
    asks for something unsupported: JSON is the only format, and results are stored in DynamoDB.
    `event_queue` (at most 20 characters) names the queue of the only event listener in this process, so that a
    restart finds the same queue. Without it, each listener has its own queue, which ends with the listener.
    """
    return SqsApp(name, settings=settings, event_queue=event_queue, **options)
