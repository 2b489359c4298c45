"""The errors of this package, as one tree.

    MdstoreError
    ├── ConfigurationError     a setting is missing or wrong: the deployer must fix it
    ├── InvalidRequest         the caller's input is wrong; nothing was stored
    │   ├── InvalidOperations  ... because some of the operations are invalid
    │   └── PayloadTooLarge    ... because it is larger than one request may be
    ├── RequestConflict        the request id already belongs to other content, or to a request too old to send again
    ├── NotFound               there is no such request, record, object or API key
    ├── IntegrityError         a message or payload fails its checks: dead-letter it, never execute it
    ├── LaneUnfinished         a lane's turn is over: send its message again, for the other waves
    ├── Unavailable            AWS throttled the call, reported a conflict or did not answer: try again later
    ├── DeploymentBroken       access is denied, or a table is missing: fail loudly and leave the message in the queue
    ├── RequestRejected        DynamoDB rejected a call as malformed
    ├── ResultNotRecorded      the result of a task cannot be stored now: SQS delivers its message again
    ├── DeliveriesExhausted    the infrastructure failed on the last allowed delivery too: the task counts as failed
    ├── ConditionFailed        the condition of a single write was not met
    └── TransactionCancelled   DynamoDB cancelled a transaction and gave a reason for each action

A class exists only where callers handle it differently. The modules that call AWS translate its errors: `aws.http`,
`aws.dynamodb.client`, `aws.sqs` and `aws.s3`. Errors of boto3 are translated in `aws.boto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class MdstoreError(Exception):
    """Base class of the errors that this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the fields, not a constructor call: these constructors take other arguments than `Exception` stores."""
        return restored, (type(self), self.args, self.__dict__)


def restored(kind: type[Exception], args: tuple[object, ...], fields: dict[str, Any]) -> Exception:
    """Rebuild a pickled error without calling its constructor."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigurationError(MdstoreError):
    """A setting is missing or wrong. Its fields are `key`, `value` and `expected`."""

    def __init__(self, *, key: str, value: object, expected: str) -> None:
        super().__init__(f"setting {key}={value!r}: expected {expected}")
        self.key, self.value, self.expected = key, value, expected


class InvalidRequest(MdstoreError):
    """The caller's input cannot be accepted; nothing was stored. Its fields are `field`, `value` and `expected`."""

    def __init__(self, *, field: str, value: object, expected: str) -> None:
        shown = repr(value)
        super().__init__(f"{field}: expected {expected}, got {shown if len(shown) <= 120 else shown[:117] + '...'}")
        self.field, self.value, self.expected = field, value, expected


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why one operation cannot be accepted: its zero-based index in the request, the invalid field, and the reason as text."""

    index: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"operation {self.index}: {self.field}: {self.reason}"


class InvalidOperations(InvalidRequest):
    """Some operations of a request are invalid. Its fields are `problems` (the first 100) and `count`.

    `count` is the number of invalid operations that were found. From `ENOUGH` on, there may be more that were not read.
    """

    SHOWN = 100
    ENOUGH = 1_000  # invalid operations, after which the rest of the request is not read

    def __init__(self, problems: Sequence[Problem], *, count: int) -> None:
        MdstoreError.__init__(
            self,
            f"{'at least ' if count >= self.ENOUGH else ''}{count} invalid operation{'s' if count != 1 else ''}: "
            + "; ".join(map(str, problems[:5])),
        )
        self.problems, self.count = tuple(problems[: self.SHOWN]), count
        self.field, self.value, self.expected = "operations", count, "valid operations"


class PayloadTooLarge(InvalidRequest):
    """The request is larger than one request may be."""


class RequestConflict(MdstoreError):
    """The request id was used before: for other content, or so long ago that its outcome is no longer known.

    Its field is `request_id`.
    """

    def __init__(self, request_id: str, why: str = "was accepted before with other content") -> None:
        super().__init__(f"request {request_id!r} {why}; use another request id")
        self.request_id = request_id


class NotFound(MdstoreError):
    """There is no such request, record, object or API key. Its fields are `kind` and `name`."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"no {kind} {name!r}")
        self.kind, self.name = kind, name


class IntegrityError(MdstoreError):
    """A message or payload fails its checks (S3 key, digest, schema version, size) and must never be executed."""


class LaneUnfinished(MdstoreError):
    """A lane's turn is over before all of its waves are applied. Its message is sent again, behind others."""


class Unavailable(MdstoreError):
    """AWS answered "not now" or did not answer. Whether the call took effect is unknown. Its field is `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class DeploymentBroken(MdstoreError):
    """The call cannot succeed until the deployment is fixed: permission, table or bucket is missing. Its field is `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class RequestRejected(MdstoreError):
    """DynamoDB rejected the call as malformed (`ValidationException`) without naming an action. Its field is `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class ResultNotRecorded(MdstoreError):
    """A task's result, or its part of a chord, cannot be stored: AWS is unavailable, or the deployment is broken."""


class DeliveriesExhausted(MdstoreError):
    """The infrastructure failed on the last allowed delivery of a task's message: it stored no result, or sent no message."""


class ConditionFailed(MdstoreError):
    """The condition of a single write was not met. `item` is the existing item in DynamoDB JSON, if the write asked for it."""

    def __init__(self, message: str, *, item: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.item = item


class TransactionCancelled(MdstoreError):
    """DynamoDB cancelled a transaction.

    `reasons` has one entry per action, in the order sent: `{"Code": str, "Message": str, "Item": {...}}`. `Item` is in
    DynamoDB JSON; it is present if the action asked for `ALL_OLD` and the item existed.
    """

    def __init__(self, reasons: Sequence[dict[str, Any]]) -> None:
        super().__init__("transaction cancelled: " + ", ".join(str(reason.get("Code")) for reason in reasons))
        self.reasons = reasons
