"""The base class of the data store's tasks. It carries out the decision about a message and records failures in the ledger."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from celery import Task
from celery.exceptions import Ignore, Reject, TaskPredicate
from celery.utils.log import get_task_logger

from mdstore.errors import IntegrityError, MdstoreError, NotFound
from mdstore.log import event
from mdstore.model import Reference, State
from mdstore.queue.broker import ascii_json
from mdstore.queue.worker.request import SqsRequest
from mdstore.store import Store
from mdstore.store.ledger_items import RequestStatus
from mdstore.tasks.decisions import Continue, DeadLetter, Decision, Deliveries, Done, Pause, Postpone, Redeliver, decide

if TYPE_CHECKING:
    from mdstore.tasks.app import StoreApp

T = TypeVar("T")
logger = get_task_logger(__name__)

_SHORTEST_POSTPONEMENT = 0.5  # seconds


class StoreRequest(SqsRequest):
    """A delivery of one of these tasks. If it fails, SQS redelivers its message, up to the last delivery.

    An accepted request is neither expired nor revoked: Celery would delete its message.
    """

    def revoked(self) -> bool:
        """Return False, even if the message has expired or its task's id is revoked."""
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:  # noqa: ARG002
        """Let the task run. Celery would delete the message of a task that it terminates."""
        logger.warning("task %s[%s] belongs to an accepted request, and is not terminated", self.name, self.id)

    def reject(self, requeue: bool = False) -> None:  # noqa: ARG002
        """Return the message to the queue, whatever the caller asks for; the last delivery is dead-lettered."""
        super().reject(requeue=True)


@dataclass(frozen=True, kw_only=True)
class _Delivery:
    """One delivery: the message as received, its reference if that could be read, and the lane that it names, if any."""

    message: Any
    reference: Reference | None
    lane: int | None


class StoreTask(Task):
    """A task whose message names a request."""

    abstract = True
    app: StoreApp
    acks_on_failure_or_timeout = False
    Request: Any = StoreRequest
    #: Postponing does not count as an attempt. Retries that do count pass their own limit.
    max_retries = None

    def owns_result(self, request: Any) -> bool:
        """Return whether the result under the task's id is this task's alone: the id is that of the request it names."""
        message = next(iter(request.args or ()), None)
        return isinstance(message, Mapping) and message.get("request_id") == request.id

    @property
    def store(self) -> Store:
        """This process's store."""
        return self.app.store

    @property
    def deliveries(self) -> Deliveries:
        """How often SQS has delivered this task's message, and how often workers execute it."""
        count = (self.request.headers or {}).get("receives") or self.request.get("receives") or 1
        return Deliveries(count=int(count), limit=self.store.settings.max_receives)

    @property
    def is_sent_again(self) -> bool:
        """Return whether an earlier delivery sent this message again: a lane had its turn, or AWS was unavailable."""
        return bool(self.request.retries)

    def process(self, message: Any, work: Callable[[Reference], T], *, lane: int | None = None) -> T:
        """Call `work` with the message's reference and return its result. If that fails, decide what becomes of the message."""
        try:
            reference = read_reference(message, lane=lane)
        except IntegrityError as error:
            self._carry_out(DeadLetter(str(error)), _Delivery(message=message, reference=None, lane=lane), error)
            raise
        delivery = _Delivery(message=message, reference=reference, lane=lane)
        deliveries = self.deliveries
        if deliveries.is_last:
            # Record the failure first: if this delivery kills the process, no other delivery would. A success replaces it.
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
        """Carry out the decision about a message whose task failed. Raises `Retry`, `Ignore` or `Reject` to tell Celery."""
        match decision:
            case Done():
                return
            case Continue():
                self._event("lane.continued", error, logging.INFO)
                raise self.retry(exc=error, countdown=0, max_retries=None) from error
            case Postpone(seconds):
                self._event("message.postponed", error, logging.WARNING)
                countdown = random.uniform(_SHORTEST_POSTPONEMENT, seconds)  # noqa: S311
                raise self.retry(exc=error, countdown=countdown, max_retries=None) from error
            case DeadLetter(reason):
                self._dead_letter(delivery, reason, error)
                # The dead letter is stored, so the message may be deleted. Rejecting it would have it delivered again.
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
        """Dead-letter a message with the reason. If its reference is genuine, record that its request and task have failed."""
        body = ascii_json.dumps({"task": self.name, "message": delivery.message})
        self.app.dead_letter(body=body, reason=reason, task=self.name, receives=self.deliveries.count)
        if delivery.reference is not None and self._is_genuine(delivery.reference):
            self._record_failure(delivery.reference, None, reason)
            self.backend.mark_as_failure(self.request.id, error, request=self.request)

    def _event(self, name: str, error: Exception, level: int) -> None:
        count = self.deliveries.count
        event(name, level=level, task=self.name, task_id=str(self.request.id), receives=count, error=str(error))

    def _is_genuine(self, reference: Reference) -> bool:
        """Return whether the ledger holds exactly this reference. A forged one must not change the request that it names."""
        try:
            return self.store.ledger.get(reference.request_id).reference == reference
        except NotFound:
            return self.store.payloads.is_batch(reference)

    def _record_failure(self, reference: Reference, lane: int | None, error: str) -> None:
        """Record in the ledger that `lane` failed, or with None every unfinished lane. A later success replaces the record."""
        try:
            if self.store.payloads.is_batch(reference):
                self.store.writer.fail_batch(reference, error)
                return
            try:
                status = self.store.ledger.progress(reference.request_id)
            except NotFound:
                # The producer's record is late or lost, and workers write none before a one-lane request is done.
                status, _ = start(self.store, reference)
            if status.state is State.COMPLETED or status.reference != reference:  # a different one: a forged message
                return
            for number in missing_lanes(self.store, status) if lane is None else [lane]:
                # If a lane cannot be read, or does not fit into memory, its operations cannot be counted.
                with suppress(IntegrityError, MemoryError):
                    self.store.writer.give_up(reference, number, error)
            self.store.ledger.fail(reference.request_id, error)
        except MdstoreError:
            logger.exception("%s: could not record the failure in the ledger; the message is kept", self.name)


def read_reference(message: Any, *, lane: Any = None) -> Reference:
    """Decode a message's reference. Raises `IntegrityError` if it is malformed, or if the request has no such `lane`.

    The payload's S3 key is checked later, when the payload is read.
    """
    try:
        reference = msgspec.convert(message, Reference)
    except msgspec.ValidationError as error:
        raise IntegrityError(f"not a message of this schema: {error}") from error
    if lane is not None and not (type(lane) is int and 0 <= lane < reference.lanes):
        raise IntegrityError(f"lane {lane!r} does not exist: the request's lanes are 0 to {reference.lanes - 1}")
    return reference


def start(store: Store, reference: Reference, *, by: str = "") -> tuple[RequestStatus, list[int]]:
    """Record that the task `by` starts a request. Returns its status and the lanes that are not completed."""
    header = store.payloads.header(reference)
    status = store.ledger.start(reference, operations=header.operations, refused=header.refused_counts, by=by)
    return status, missing_lanes(store, status)


def missing_lanes(store: Store, status: RequestStatus) -> list[int]:
    """Return the lanes of a request that are not completed."""
    done: set[int] = set()
    if status.lanes > 1 and status.state is not State.COMPLETED:
        summaries = store.ledger.lanes(status.request_id)
        done = {summary.lane for summary in summaries if summary.state is State.COMPLETED}
    return [lane for lane in range(status.lanes) if lane not in done]
