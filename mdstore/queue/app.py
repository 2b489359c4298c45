"""Make the Celery app, with its AWS clients, batched publishing and dead letters."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

from celery import Celery
from kombu.utils.objects import cached_property

from mdstore.aws.clients import AwsClients
from mdstore.log import event
from mdstore.queue.broker.claim_check import ClaimChecks
from mdstore.queue.broker.dead_letters import dead_letter
from mdstore.queue.broker.publisher import BatchPublisher
from mdstore.queue.control.topics import Topics
from mdstore.queue.delayed.mover import MoverStep
from mdstore.queue.delayed.table import DelayedTable
from mdstore.queue.results.recovery import RecoveryStep
from mdstore.queue.settings import celery_configuration
from mdstore.queue.worker import child_process
from mdstore.queue.worker.watchdog import Watchdog
from mdstore.settings import Settings, load_settings


class _Parts(NamedTuple):
    """Holds the objects that a process builds once from its AWS clients."""

    aws: AwsClients
    claim_checks: ClaimChecks
    delayed_table: DelayedTable


class SqsApp(Celery):
    """Runs Celery on SQS, SNS, S3 and DynamoDB, and sends the messages of tasks in batches.

    Each process builds its own clients, because connections do not survive a fork.
    """

    registry_cls = "mdstore.queue.task:SqsTasks"
    control_cls = "mdstore.queue.control.remote:Control"
    events_cls = "mdstore.queue.control.events:Events"
    settings: Settings
    topics: Topics
    _aws: AwsClients | None = None
    _parts: _Parts | None = None
    _lock = threading.RLock()

    @property
    def aws(self) -> AwsClients:
        """Return the AWS clients of this process."""
        aws = self._aws
        # Do not take the lock here: if another thread held it when the worker forked, the child would wait for ever.
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
            self._parts = _Parts(aws, claim_checks, DelayedTable(dynamo=aws.dynamo, table=settings.delayed_table))
        return self._parts

    @cached_property  # type: ignore[untyped-decorator]
    def GroupResult(self) -> Any:  # noqa: N802  Celery's name
        """Return the class of group results."""
        return self.subclass_with_self("mdstore.queue.results.results:BatchedGroupResult", reverse="GroupResult")

    @cached_property  # type: ignore[untyped-decorator]
    def publisher(self) -> BatchPublisher:
        """Return the publisher of the tasks' messages."""
        return BatchPublisher(lambda: self.aws.queues)

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

    def warm_up(self) -> None:
        """Build what tasks use. A worker's child process calls this before its first message."""
        _ = self.aws


App = TypeVar("App", bound=SqsApp)


def create_app(
    settings: Settings | None = None, *, name: str = "mdstore", event_queue: str | None = None, **conf: Any
) -> SqsApp:
    """Make a Celery app with SQS as its broker and DynamoDB as its result backend. This opens no connection.

    `conf` overrides Celery's configuration. Raises `ConfigurationError` if it asks for anything but JSON.
    `event_queue` (at most 20 characters) names the queue of the only event listener in this process, so that a
    restart finds the same queue. Without it, each listener has its own queue, which ends with the listener.
    """
    return configure(SqsApp(name, set_as_current=False), settings, event_queue=event_queue, **conf)


def configure(app: App, settings: Settings | None = None, *, event_queue: str | None = None, **conf: Any) -> App:
    """Give a new `app` its settings, Celery's configuration and the worker's steps. Parameters are those of `create_app`."""
    app.settings = settings or load_settings().settings
    app.topics = Topics(app.settings, lambda: app.aws, event_queue=event_queue)
    app.conf.update(celery_configuration(app, conf))
    app.steps["worker"] |= {Watchdog, MoverStep, RecoveryStep}
    child_process.connect_signals()
    return app
