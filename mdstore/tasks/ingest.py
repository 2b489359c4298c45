"""The producer's side of `ingest`: store the operations in S3 and send only a reference to them through SQS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from mdstore.errors import DeploymentBroken, InvalidRequest, Unavailable
from mdstore.model import Reference
from mdstore.queue.broker.publisher import Unsent
from mdstore.store.batch import is_small
from mdstore.store.ingestor import Accepted, OnInvalid
from mdstore.tasks.result import KnownRequestResult, RequestResult
from mdstore.tasks.task import StoreTask


class IngestTask(StoreTask):
    """The task `mdstore.ingest`. Publishing it stores the operations as a payload and sends a reference to the payload."""

    abstract = True

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
            publish = partial(self.publish, task_id=task_id, options=options or {})
            return ingestor.accept_built(built, publish=publish, republish=task_id is not None)

    def publish(
        self, reference: Reference, *, task_id: str | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Send a message that refers to a payload. Return its task's result.

        The task's id is `task_id`, or else that of the request or batch.
        """
        with broker_errors():
            return super().apply_async(
                (msgspec.to_builtins(reference),),
                {},
                task_id=task_id or reference.request_id,
                **fairness_options(reference),
                **options,
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
