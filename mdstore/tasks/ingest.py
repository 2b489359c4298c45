"""The producer's side of `ingest`: store the operations in S3 and send only a reference to them through SQS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

import msgspec
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from mdstore.aws.concurrent import Task
from mdstore.errors import DeploymentBroken, IntegrityError, InvalidRequest, Unavailable
from mdstore.model import Reference
from mdstore.queue.broker.publisher import Unsent
from mdstore.queue.small_tasks import SMALL_PER_JOB
from mdstore.store.batch import MAX_OPERATIONS, is_batch_id, is_small
from mdstore.store.ingestor import Accepted, OnInvalid
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.payload import Header
from mdstore.store.writer import is_small_payload
from mdstore.tasks.result import KnownRequestResult, RequestResult
from mdstore.tasks.task import StoreRequest, StoreTask, read_reference

#: The header of a message that holds the number of its request's operations. It is a hint: nobody relies on it.
OPERATIONS = "operations"


class IngestRequest(StoreRequest):
    """A delivery of `mdstore.ingest`."""

    @property
    def is_small(self) -> bool:
        """Return whether the request is small, and the task has nothing but the request to care for."""
        args, kwargs, canvas = self.message.payload
        return (
            self.app.is_small(self.request_dict)
            and len(args) == 1
            and not kwargs
            and not any((canvas or {}).values())
            and isinstance(args[0], Mapping)
            and args[0].get("lanes") in (0, 1)
        )


class IngestTask(StoreTask):
    """The task `mdstore.ingest`. Publishing it stores the operations as a payload and sends a reference to the payload."""

    abstract = True
    Request = IngestRequest
    store_errors_even_if_ignored = True

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> AsyncResult:
        """Store the operations, send a reference to them, and return the request's result.

        `args` is `(operations,)`; `kwargs` may contain `request_id`, `source`, `on_invalid` and `newest_wins`. A request
        that was accepted before is not sent again, unless the caller set a task id: then a client may wait for the result of
        that task.
        """
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        if options.get("expires") is not None:
            raise InvalidRequest(
                field="expires", value=options["expires"], expected="no expiry: every accepted request is applied"
            )
        if args and _is_reference(args[0]):
            return super().apply_async(args, kwargs, **options)
        task_id = options.pop("task_id", None)
        request_id = kwargs.pop("request_id", None) or task_id
        accepted = self.accept(*args, request_id=request_id, task_id=task_id, options=options, **kwargs)
        if not accepted.new and (task_id is None or accepted.published is None):
            return KnownRequestResult(accepted.request_id, app=self.app)
        result: AsyncResult = accepted.published
        return result

    def prepare(self, arguments: Sequence[Sequence[Any]]) -> list[RequestStatus | Exception | None]:
        """Apply, side by side, the small requests that the arguments of several messages name.

        Return each message's status, or the error that ended its request. None means that nothing was done: the task itself
        has to look.
        """
        references: dict[int, Reference] = {}
        for number, args in enumerate(arguments):
            with suppress(IntegrityError):  # the task will find it, too
                references[number] = read_reference(args[0])
        outcomes = self.store.aws.dynamo.outcomes(map(self._apply_small, references.values()), in_flight=SMALL_PER_JOB)
        found = dict(zip(references, outcomes, strict=True))
        return [found.get(number) for number in range(len(arguments))]

    def _apply_small(self, reference: Reference) -> Task[RequestStatus | None]:
        store = self.store
        payload = yield from store.payloads.open_task(reference)
        if not is_small_payload(payload):
            return None
        self.report_models(payload.header, reference)
        return (yield from store.writer.apply_small_task(payload))

    def report_models(self, header: Header, reference: Reference) -> None:
        """Log if the producer checked a request against other models than this worker has."""
        self.store.entities.report_other_models(header.models, request_id=reference.request_id, source=reference.source)

    def AsyncResult(self, task_id: str, **options: Any) -> RequestResult:  # noqa: N802  Celery's name
        """Return the result of a task of this name."""
        return RequestResult(task_id, task_name=self.name, app=self.app, **options)

    def accept(
        self,
        operations: Any,
        *,
        request_id: str | None = None,
        source: str = "default",
        on_invalid: OnInvalid = "raise",
        newest_wins: bool = False,
        task_id: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Accepted:
        """Accept a request and publish it. A small one shares the message of those that other threads submit now.

        With `task_id` or `options`, which may be empty, the request has a task of its own, whose result can be waited for. Its
        id is `task_id`, or else the request id.
        """
        if isinstance(operations, Mapping | str | bytes):
            raise InvalidRequest(field="operations", value=operations, expected="a list of operations")
        has_own_task = task_id is not None or options is not None
        ingestor = self.store.ingestor
        built = ingestor.build(
            operations, request_id=request_id, source=source, on_invalid=on_invalid, newest_wins=newest_wins
        )
        with closing(built.builder):
            if not has_own_task and built.invalid is None and is_small(built.builder):
                return self.app.group_commit.submit(built)
            publish = partial(self.publish, operations=built.builder.count, task_id=task_id, options=options)
            return ingestor.accept_built(built, publish=publish, republish=task_id is not None)

    def publish(
        self,
        reference: Reference,
        *,
        operations: int = MAX_OPERATIONS,
        task_id: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Send a message that refers to a payload of up to `operations` operations. Return its task's result.

        The task's id is `task_id`, or else that of the request or batch. Without `task_id` and `options`, the result is not
        stored: the ledger has it.
        """
        given = dict(options or {})
        if task_id is None and options is None:
            given["ignore_result"] = True
        if not is_batch_id(reference.request_id):
            given["headers"] = {**(given.get("headers") or {}), OPERATIONS: operations}
        with broker_errors():
            return super().apply_async(
                (msgspec.to_builtins(reference),),
                {},
                task_id=task_id or reference.request_id,
                **fairness_options(reference),
                **given,
            )


def fairness_options(reference: Reference) -> dict[str, str]:
    """Return the option that makes SQS deliver the messages of all sources in turn, so that a busy source delays no other.

    Source: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-fair-queues.html
    """
    return {"MessageGroupId": reference.source}


def _is_reference(value: Any) -> bool:
    return isinstance(value, Mapping) and "payload" in value and "digest" in value


@contextmanager
def broker_errors() -> Iterator[None]:
    """Translate the broker's errors into this package's errors."""
    try:
        yield
    except Unsent as unsent:
        failed = unsent.failed[0][1]
        kind = DeploymentBroken if failed.sender_fault else Unavailable
        raise kind(f"SQS send: {unsent}", code=failed.code) from unsent
    except OperationalError as error:
        raise Unavailable(f"SQS send: {error}", code=type(error).__name__) from error
