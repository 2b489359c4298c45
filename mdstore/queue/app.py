"""The Celery app: its clients of AWS, batched publishing, and dead letters."""

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
    """What a process builds over its clients."""

    aws: AwsClients
    claim_checks: ClaimChecks
    delayed_table: DelayedTable


class SqsApp(Celery):
    """A Celery app on SQS, SNS, S3 and DynamoDB, whose tasks are sent in batches.

    Each process has clients of its own, because connections do not survive a fork.
    """

    task_cls = "mdstore.queue.task:SqsTask"
    control_cls = "mdstore.queue.control.remote:Control"
    events_cls = "mdstore.queue.control.events:Events"
    settings: Settings
    topics: Topics
    _aws: AwsClients | None = None
    _parts: _Parts | None = None
    _lock = threading.RLock()

    @property
    def aws(self) -> AwsClients:
        """The clients of this process."""
        aws = self._aws
        # Read without the lock: another thread may hold it while a worker forks, and the child would wait for ever.
        if aws is not None and aws.owner_pid == os.getpid():
            return aws
        with self._lock:
            if self._aws is None or self._aws.owner_pid != os.getpid():
                self._aws = AwsClients(self.settings)
            return self._aws

    @property
    def claim_checks(self) -> ClaimChecks:
        """Stores messages that are too large for SQS."""
        return self._own_parts.claim_checks

    @property
    def delayed_table(self) -> DelayedTable:
        """Keeps messages that are due later than SQS can delay them."""
        return self._own_parts.delayed_table

    @property
    def _own_parts(self) -> _Parts:
        """Built once a process: publishing a message is no time to build them, and the table remembers what it has written."""
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
    def GroupResult(self) -> Any:  # noqa: N802  celery's name
        """The class of groups' results."""
        return self.subclass_with_self("mdstore.queue.results.results:BatchedGroupResult", reverse="GroupResult")

    @cached_property  # type: ignore[untyped-decorator]
    def publisher(self) -> BatchPublisher:
        """Sends tasks' messages."""
        return BatchPublisher(lambda: self.aws.queues)

    def batched(self) -> AbstractContextManager[None]:
        """Send the tasks published inside of the context ten a call, at its end at the latest. Raises `Unsent` there."""
        context: AbstractContextManager[None] = self.publisher.context()
        return context

    @contextmanager
    def producer_or_acquire(self, producer: Any = None) -> Iterator[Any]:
        """Extend Celery's context: the outermost one sends what was published inside of it, so a group goes out in batches."""
        with self.publisher.context(), super().producer_or_acquire(producer) as acquired:
            yield acquired

    def dead_letter(self, *, body: str, reason: str, task: str, receives: int) -> None:
        """Keep a message that must not be executed. Raises `Unavailable` or `DeploymentBroken`."""
        queue = self.settings.dead_letter_queue
        dead_letter(self.aws.queues, queue, body=body, reason=reason, task=task, receives=receives)
        event(
            "message.dead_lettered", level=logging.ERROR, task=task, receives=receives, error=reason.partition("\n")[0]
        )

    def warm_up(self) -> None:
        """Build what tasks use, in a worker's child process, before its first message."""
        _ = self.aws


App = TypeVar("App", bound=SqsApp)


def create_app(
    settings: Settings | None = None, *, name: str = "mdstore", event_queue: str | None = None, **conf: Any
) -> SqsApp:
    """Make a Celery app with SQS as broker and DynamoDB as result backend. Opens no connection.

    `conf` overrides Celery's configuration; raises `ConfigurationError` where it asks for anything but JSON. `event_queue`
    (at most 20 characters) names the queue of the process's one event listener; without it, each listener has a queue that
    ends with it.
    """
    return configure(SqsApp(name, set_as_current=False), settings, event_queue=event_queue, **conf)


def configure(app: App, settings: Settings | None = None, *, event_queue: str | None = None, **conf: Any) -> App:
    """Give a new `app` its settings, Celery's configuration and the worker's steps; see `create_app`."""
    app.settings = settings or load_settings().settings
    app.topics = Topics(app.settings, lambda: app.aws, event_queue=event_queue)
    app.conf.update(celery_configuration(app, conf))
    app.steps["worker"] |= {Watchdog, MoverStep, RecoveryStep}
    child_process.connect_signals()
    return app
