"""The class of the data store's tasks: carries out what is decided about a message, and keeps the ledger informed."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from celery.exceptions import Ignore, Reject, TaskPredicate
from celery.utils.log import get_task_logger

from mdstore import exactjson
from mdstore.errors import IntegrityError, MdstoreError, NotFound
from mdstore.log import event
from mdstore.model import Reference, State
from mdstore.queue.task import SqsTask
from mdstore.queue.worker.request import SqsRequest
from mdstore.store import Store
from mdstore.store.ledger import RequestStatus
from mdstore.tasks.decisions import DeadLetter, Decision, Deliveries, Done, Pause, Postpone, Redeliver, decide

if TYPE_CHECKING:
    from mdstore.tasks.app import StoreApp

T = TypeVar("T")
logger = get_task_logger(__name__)

_SHORTEST_POSTPONEMENT = 0.5  # seconds


class StoreRequest(SqsRequest):
    """A delivery of one of these tasks: an accepted request does not expire, and whatever fails it is delivered again.

    Celery drops an expired message and, from then on, every other message of its task id: a forged message would take the
    genuine one with it.
    """

    def maybe_expire(self) -> bool:
        """Never expire."""
        return False

    def reject(self, requeue: bool = False) -> None:  # noqa: ARG002
        """Give the message back, whatever the reason, until its last delivery."""
        super().reject(requeue=True)


@dataclass(frozen=True, kw_only=True)
class _Delivery:
    """One delivery of a message, as it came; `lane` is the one that it names, if any."""

    message: Any
    reference: Reference | None
    lane: int | None


class StoreTask(SqsTask):
    """A task whose message names a request."""

    abstract = True
    app: StoreApp
    acks_on_failure_or_timeout = False
    Request: Any = StoreRequest
    #: Postponing spends no attempt; where attempts are counted, the limit is given with the retry.
    max_retries = None

    @property
    def store(self) -> Store:
        """The process's store."""
        return self.app.store

    @property
    def deliveries(self) -> Deliveries:
        """How often SQS has delivered this task's message."""
        count = (self.request.headers or {}).get("receives") or self.request.get("receives") or 1
        return Deliveries(count=int(count), limit=self.store.settings.max_receives)

    def process(self, message: Any, work: Callable[[Reference], T], *, lane: int | None = None) -> T:
        """Return what `work` makes of the request that a message names; where it fails, carry out what is decided."""
        try:
            reference = read_reference(message, lane=lane)
        except IntegrityError as error:
            self._carry_out(DeadLetter(str(error)), _Delivery(message=message, reference=None, lane=lane), error)
            raise
        delivery = _Delivery(message=message, reference=reference, lane=lane)
        deliveries = self.deliveries
        if deliveries.is_last:
            # Should this delivery end the process, nobody else would say so; a success replaces what is said here.
            self._record_failure(reference, lane, f"delivered {deliveries.count} times without finishing")
        try:
            result = work(reference)
        except TaskPredicate:  # Celery's own decisions: retry, replace, ignore
            raise
        except Exception as error:
            self._carry_out(decide(error, deliveries), delivery, error)
            raise
        return result

    def _carry_out(self, decision: Decision, delivery: _Delivery, error: Exception) -> None:
        """Tell Celery what becomes of a failed message: raises `Retry`, `Ignore` or `Reject`."""
        match decision:
            case Done():
                return
            case Postpone(seconds):
                self._event("message.postponed", error, logging.WARNING)
                countdown = random.uniform(_SHORTEST_POSTPONEMENT, seconds)  # noqa: S311
                raise self.retry(exc=error, countdown=countdown, max_retries=None) from error
            case DeadLetter(reason):
                self._dead_letter(delivery, reason, error)
                # The dead letter is safe, so the message may go: a rejected one would come again.
                raise Ignore from error
            case Pause(gives_up):
                self._event("message.kept", error, logging.CRITICAL)
            case Redeliver(gives_up):
                self._event("message.kept", error, logging.ERROR)
                logger.error("%s failed", self.name, exc_info=error)
        if gives_up and delivery.reference is not None:
            self._record_failure(delivery.reference, delivery.lane, str(error) or repr(error))
        raise Reject(str(error), requeue=True) from error

    def _dead_letter(self, delivery: _Delivery, reason: str, error: Exception) -> None:
        """Keep a message that must not be executed, with its reason; where it is genuine, its request has failed."""
        body = exactjson.dumps({"task": self.name, "message": delivery.message}).decode()
        self.app.dead_letter(body=body, reason=reason, task=self.name, receives=self.deliveries.count)
        if delivery.reference is not None and self._is_genuine(delivery.reference):
            self._record_failure(delivery.reference, None, reason)
            self.backend.mark_as_failure(self.request.id, error, request=self.request)

    def _event(self, name: str, error: Exception, level: int) -> None:
        count = self.deliveries.count
        event(name, level=level, task=self.name, task_id=str(self.request.id), receives=count, error=str(error))

    def _is_genuine(self, reference: Reference) -> bool:
        """Whether the ledger has accepted this very reference; a forged one must not touch the request that it names."""
        try:
            return self.store.ledger.get(reference.request_id).reference == reference
        except NotFound:
            return False

    def _record_failure(self, reference: Reference, lane: int | None, error: str) -> None:
        """Record in the ledger that a lane failed, or all that are not done. A later delivery that succeeds replaces it."""
        try:
            try:
                status = self.store.ledger.progress(reference.request_id)
            except NotFound:  # the producer's note was late or lost; a small request has none before it is done
                status, _ = start(self.store, reference)
            if status.state is State.COMPLETED or status.reference != reference:  # or a forged message names it
                return
            for number in missing_lanes(self.store, status) if lane is None else [lane]:
                with suppress(IntegrityError):  # what cannot be read cannot be counted either
                    self.store.writer.give_up(reference, number, error)
            self.store.ledger.fail(reference.request_id, error)
        except MdstoreError:
            logger.exception("%s: the failure could not be recorded; the message is kept", self.name)


def read_reference(message: Any, *, lane: Any = None) -> Reference:
    """The reference in a message. Raises `IntegrityError`, also where `lane` is none of the request's.

    The payload's place is checked when it is read.
    """
    try:
        reference = msgspec.convert(message, Reference)
    except msgspec.ValidationError as error:
        raise IntegrityError(f"not a message of this schema: {error}") from error
    if lane is not None and not (type(lane) is int and 0 <= lane < reference.lanes):
        raise IntegrityError(f"lane {lane!r} is none of the request's")
    return reference


def start(store: Store, reference: Reference) -> tuple[RequestStatus, list[int]]:
    """Record that a request runs; returns its status and the lanes that are not completed."""
    header = store.payloads.header(reference)
    status = store.ledger.start(reference, operations=header.operations, refused=header.refused_counts)
    return status, missing_lanes(store, status)


def missing_lanes(store: Store, status: RequestStatus) -> list[int]:
    """The lanes of a request that are not completed."""
    done: set[int] = set()
    if status.lanes > 1 and status.state is not State.COMPLETED:
        summaries = store.ledger.lanes(status.request_id)
        done = {summary.lane for summary in summaries if summary.state is State.COMPLETED}
    return [lane for lane in range(status.lanes) if lane not in done]
