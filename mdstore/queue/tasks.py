"""The three tasks: message -> library call -> outcome, and nothing else.

ingest       one lane: apply it and finish here; many: chord(group(apply_lane * N), finish)
apply_lane   one lane; the one with the highest number also finishes, if it is the last to end
finish       the request's final state, from the lane summaries in the ledger
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
from celery import Celery, chord, shared_task
from celery.exceptions import Ignore, Reject, TaskPredicate
from celery.result import AsyncResult
from celery.utils.log import get_task_logger
from kombu.exceptions import OperationalError

from mdstore import exactjson
from mdstore.errors import DeploymentBroken, InvalidRequest, MdstoreError, NotFound, Unavailable, Untrusted
from mdstore.ingestor import Accepted, OnInvalid
from mdstore.ledger import Request
from mdstore.log import event
from mdstore.model import FINAL_STATES, Reference, State
from mdstore.queue.app import MdstoreApp
from mdstore.queue.outbox import Unsent
from mdstore.queue.task import SqsTask
from mdstore.store import Store

logger = get_task_logger(__name__)
_FINISH_TRIES = 360


class StoreTask(SqsTask):
    """A task that decides by the class of an error what becomes of its message."""

    abstract = True
    app: MdstoreApp
    acks_on_failure_or_timeout = False
    Request = "mdstore.queue.request:StoreRequest"
    #: Postponing spends no attempt; where tries are counted, they are given with the retry.
    max_retries = None

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """A task that hangs is killed; its lane goes on from its receipts. An app's own tasks have the limits it gives them."""
        if isinstance(app, MdstoreApp):  # any app of the process shares the tasks
            cls.time_limit = app.settings.task_time_limit

    @property
    def store(self) -> Store:
        """The process's store."""
        return self.app.store

    @contextmanager
    def deciding(self, message: Any, lane: int | None = None) -> Iterator[None]:
        """Translate failures into outcomes of the message.

        Throttled or unreachable: the same again later, no attempt spent. Untrusted: dead-lettered with its reason.
        Anything else: delivered again after a while, and dead-lettered the last time, from where it can be sent again.
        """
        is_last = self.receives >= self.store.settings.max_receives
        if is_last:
            # Should this last delivery end the process, nobody else will say so; when it succeeds, it says that instead.
            self._note_failure(message, lane, f"delivered {self.receives} times without an end")
        try:
            yield
        except Unavailable as error:
            self._event("message.postponed", error, logging.WARNING)
            raise self.retry(exc=error, countdown=random.uniform(0.5, 5.0), max_retries=None) from error  # noqa: S311
        except Untrusted as error:
            self.dead_letter(message, str(error))
            if self._is_own(message):
                self._note_failure(message, None, str(error))
                self.backend.mark_as_failure(self.request.id, error, request=self.request)
            # The letter is safe, so the message may go: a rejected one would come again.
            raise Ignore from error
        except TaskPredicate:  # celery's own words for what becomes of a message
            raise
        except Exception as error:
            level = logging.CRITICAL if isinstance(error, DeploymentBroken) else logging.ERROR
            self._event("message.kept", error, level)
            if not isinstance(error, DeploymentBroken):
                logger.exception("%s failed", self.name)
            if is_last:
                self._note_failure(message, lane, str(error) or repr(error))
            raise Reject(str(error), requeue=True) from error

    def dead_letter(self, message: Any, reason: str) -> None:
        """Keep a message that must not be executed, with its reason."""
        body = exactjson.dumps({"task": self.name, "message": message}).decode()
        self.app.dead_letter(body=body, reason=reason, task=self.name, receives=self.receives)

    def _event(self, name: str, error: Exception, level: int) -> None:
        event(name, level=level, task=self.name, task_id=str(self.request.id), receives=self.receives, error=str(error))

    @property
    def receives(self) -> int:
        """How often SQS has delivered the message, this time included."""
        return int((self.request.headers or {}).get("receives") or self.request.get("receives") or 1)

    def _is_own(self, message: Any) -> bool:
        """Whether a message is one of ours whose payload is damaged; a forged one must not touch what it names."""
        try:
            reference = read_reference(message)
            return self.store.ledger.get(reference.request_id).reference == reference
        except (Untrusted, NotFound):
            return False

    def _note_failure(self, message: Any, lane: int | None, error: str) -> None:
        """Say in the ledger that a lane, or all that are not done, gave up. A later delivery that succeeds replaces it."""
        try:
            reference = read_reference(message)
            try:
                request = self.store.ledger.progress(reference.request_id)
            except NotFound:  # the producer's note was late or lost, and a small request is not noted before it is done
                request, _ = _start(self.store, reference)
            if request.state is State.COMPLETED or request.reference != reference:  # or a forged message names it
                return
            for number in _missing(self.store, request) if lane is None else [lane]:
                with suppress(Untrusted):  # what cannot be read cannot be counted either
                    self.store.writer.give_up(reference, number, error)
            self.store.ledger.fail(reference.request_id, error)
        except MdstoreError:
            logger.exception("%s: the ledger could not be told; the message is kept", self.name)


def read_reference(message: Any) -> Reference:
    """The reference in a message. Raises `Untrusted`; the payload's place is checked when it is read."""
    try:
        return msgspec.convert(message, Reference)
    except msgspec.ValidationError as error:
        raise Untrusted(f"not a message of this schema: {error}") from error


def _is_lane(message: Any, lane: Any) -> bool:
    """Whether a message names a lane of its own request; a message that is none is judged elsewhere."""
    try:
        return type(lane) is int and 0 <= lane < read_reference(message).lanes
    except Untrusted:
        return True


def fair(reference: Reference) -> dict[str, str]:
    """The option that lets SQS deliver the sources' messages in turn, so that a noisy one does not hold up the others.

    Source: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-fair-queues.html
    """
    return {"MessageGroupId": reference.source}


def _is_reference(value: Any) -> bool:
    return isinstance(value, Mapping) and "payload" in value and "digest" in value


@contextmanager
def translated_broker() -> Iterator[None]:
    """Turn the broker's errors into the package's own."""
    try:
        yield
    except Unsent as unsent:
        failed = unsent.failed[0][1]
        kind = DeploymentBroken if failed.sender_fault else Unavailable
        raise kind(f"SQS send: {unsent}", code=failed.code) from unsent
    except OperationalError as error:
        raise Unavailable(f"SQS send: {error}", code=type(error).__name__) from error


class IngestTask(StoreTask):
    """Does the claim check on the caller's side: operations to S3, their reference to SQS."""

    abstract = True

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> AsyncResult:
        """Store the operations and send their reference; returns the result of the request.

        `args` is `(operations,)`; `kwargs` may have `request_id`, `source` and `on_invalid`. A request that is known
        already is not sent again, unless a signature's task id waits for it.
        """
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        if options.get("expires") is not None:
            raise InvalidRequest(
                field="expires", value=options["expires"], expected="none: what is accepted is applied"
            )
        if args and _is_reference(args[0]):
            return super().apply_async(args, kwargs, **options)
        task_id = options.pop("task_id", None)
        request_id = kwargs.pop("request_id", None) or task_id
        accepted = self.submit(*args, request_id=request_id, task_id=task_id, options=options, **kwargs)
        if accepted.published is None:
            return self.AsyncResult(accepted.reference.request_id)
        result: AsyncResult = accepted.published
        return result

    def submit(
        self,
        operations: Any,
        *,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
        task_id: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Accepted:
        """Accept a request and publish it; without a task id of the caller's the request id is the task's."""
        if isinstance(operations, Mapping | str | bytes):
            raise InvalidRequest(field="operations", value=operations, expected="a list of operations")
        send = super().apply_async

        def publish(reference: Reference) -> AsyncResult:
            message = msgspec.to_builtins(reference)
            with translated_broker():
                return send(
                    (message,), {}, task_id=task_id or reference.request_id, **fair(reference), **(options or {})
                )

        return self.store.ingestor.submit(
            operations,
            publish=publish,
            request_id=request_id,
            source=source,
            on_invalid=on_invalid,
            republish=task_id is not None,
        )


@shared_task(base=IngestTask, bind=True, name="mdstore.ingest", typing=False)  # type: ignore[untyped-decorator]
def ingest(self: IngestTask, message: dict[str, Any]) -> dict[str, Any]:
    """Apply a request, or spread its lanes over the workers. Its result is the request's summary."""
    if self.request.called_directly or self.request.is_eager:
        raise InvalidRequest(field="ingest", value="called in place", expected="ingest.delay(operations), or a worker")
    with self.deciding(message):
        reference = read_reference(message)
        if reference.lanes <= 1:
            return self.store.writer.apply_request(reference).summary()
        request, missing = _start(self.store, reference)
        if request.state is State.COMPLETED or not missing:
            return self.store.ledger.finish(reference.request_id).summary()
    tasks = self.app.tasks  # of the app that runs this, which need not be the current one
    header = [tasks[apply_lane.name].si(message, lane).set(**fair(reference)) for lane in missing]
    raise self.replace(chord(header, tasks[finish.name].si(message).set(**fair(reference)), app=self.app))


@shared_task(base=StoreTask, bind=True, name="mdstore.apply_lane", ignore_result=True)  # type: ignore[untyped-decorator]
def apply_lane(self: StoreTask, message: dict[str, Any], lane: int) -> None:
    """Apply one lane."""
    if not _is_lane(message, lane):
        self.dead_letter(message, f"lane {lane!r} is none of the request's")
        raise Ignore
    with self.deciding(message, lane):
        reference = read_reference(message)
        self.store.writer.apply_lane(reference, lane)
    if lane == reference.lanes - 1:  # often the last to end: who looks at the request is spared a message
        with suppress(MdstoreError):  # `finish` follows all the same
            self.store.ledger.finish(reference.request_id)


@shared_task(base=StoreTask, bind=True, name="mdstore.finish")  # type: ignore[untyped-decorator]
def finish(self: StoreTask, message: dict[str, Any]) -> dict[str, Any]:
    """Set the request's final state. Lanes that another delivery still works on are waited for."""
    with self.deciding(message):
        try:
            request = self.store.ledger.finish(read_reference(message).request_id)
        except NotFound as error:
            raise Untrusted(f"{error}: nothing was begun that could be finished") from error
        if request.state in FINAL_STATES:
            return request.summary()
    raise self.retry(countdown=5, max_retries=_FINISH_TRIES)


def _start(store: Store, reference: Reference) -> tuple[Request, list[int]]:
    """Note that the request runs; returns it with the lanes that are not completed."""
    header = store.payloads.header(reference)
    request = store.ledger.start(reference, operations=header.operations, refused=header.refused_counts)
    return request, _missing(store, request)


def _missing(store: Store, request: Request) -> list[int]:
    done: set[int] = set()
    if request.lanes > 1 and request.state is not State.COMPLETED:
        summaries = store.ledger.lanes(request.request_id)
        done = {summary.lane for summary in summaries if summary.state is State.COMPLETED}
    return [lane for lane in range(request.lanes) if lane not in done]
