"""Everything that can go wrong, as one tree.

    MdstoreError
    ├── ConfigurationError     a setting is wrong: the deployer mends it
    ├── InvalidRequest         the caller's input is wrong: nothing was stored
    │   ├── InvalidOperations  ... and these operations are why
    │   └── PayloadTooLarge    ... it is more than one request may hold
    ├── RequestConflict        the request id is taken, by other content or by a request too old to be sent again
    ├── NotFound               no such request or record
    ├── IntegrityError              a message or payload that must not be executed: dead-letter it
    ├── Unavailable            throttled, conflicted, unreachable: the same again, later
    ├── DeploymentBroken       access denied, table missing: fail loudly, keep the message
    ├── RequestRejected        DynamoDB refused a call as malformed
    ├── ResultNotRecorded               how a task ended cannot be noted now: its message comes again
    ├── DeliveriesExhausted                 that was so each time: the task counts as failed
    ├── ConditionFailed        the condition of a single write was not met
    └── TransactionCancelled   DynamoDB cancelled a transaction for reasons named per action

A leaf exists only where a caller acts differently on it. Driver errors are translated where the driver is: in `signed`,
`dynamo.client`, `sqs` and `objects`, and boto3's in `aws`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class MdstoreError(Exception):
    """Root of all errors that this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors go from process to process, whatever their constructors want."""
        return restored, (type(self), self.args, self.__dict__)


def restored(kind: type[Exception], args: tuple[object, ...], fields: dict[str, Any]) -> Exception:
    """An error as it was."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigurationError(MdstoreError):
    """A setting is missing or wrong. Fields: `key`, `value`, `expected`."""

    def __init__(self, *, key: str, value: object, expected: str) -> None:
        super().__init__(f"setting {key}={value!r}: expected {expected}")
        self.key, self.value, self.expected = key, value, expected


class InvalidRequest(MdstoreError):
    """The caller's input cannot be accepted; nothing was stored. Fields: `field`, `value`, `expected`."""

    def __init__(self, *, field: str, value: object, expected: str) -> None:
        shown = repr(value)
        super().__init__(f"{field}: expected {expected}, got {shown if len(shown) <= 120 else shown[:117] + '...'}")
        self.field, self.value, self.expected = field, value, expected


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why one operation cannot be accepted: its zero-based index in the request, the field, and the reason in words."""

    index: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"operation {self.index}: {self.field}: {self.reason}"


class InvalidOperations(InvalidRequest):
    """Some operations of a request are invalid. Field: `problems` (the first 100) and `count` (of all)."""

    SHOWN = 100

    def __init__(self, problems: Sequence[Problem], *, count: int) -> None:
        MdstoreError.__init__(
            self, f"{count} invalid operation{'s' if count != 1 else ''}: " + "; ".join(map(str, problems[:5]))
        )
        self.problems, self.count = tuple(problems[: self.SHOWN]), count
        self.field, self.value, self.expected = "operations", count, "valid operations"


class PayloadTooLarge(InvalidRequest):
    """The request holds more than one request may hold."""


class RequestConflict(MdstoreError):
    """The request id was used before, for other content, or so long ago that nobody knows what became of it.

    Field: `request_id`.
    """

    def __init__(self, request_id: str, why: str = "was accepted before with other content") -> None:
        super().__init__(f"request {request_id!r} {why}; use another request id")
        self.request_id = request_id


class NotFound(MdstoreError):
    """No such request or record. Fields: `kind`, `name`."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"no {kind} {name!r}")
        self.kind, self.name = kind, name


class IntegrityError(MdstoreError):
    """A message or payload that fails its checks (place, digest, version, bounds). It must never be executed."""


class Unavailable(MdstoreError):
    """AWS said "not now", or nothing. Whether the call took effect is unknown. Field: `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class DeploymentBroken(MdstoreError):
    """AWS said "never like this": no permission, no table, no bucket. Field: `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class RequestRejected(MdstoreError):
    """DynamoDB refused the call as malformed (`ValidationException`) without naming an action. Field: `code`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class ResultNotRecorded(MdstoreError):
    """How a task ended, or its part in a chord, cannot be noted: AWS is out, or the deployment is broken."""


class DeliveriesExhausted(MdstoreError):
    """The last delivery of a task's message that is allowed ended like the others before it, through no fault of the task."""


class ConditionFailed(MdstoreError):
    """The condition of a single write was not met; nothing was written."""


class TransactionCancelled(MdstoreError):
    """DynamoDB cancelled a transaction.

    `reasons` has one entry per action, in the order sent: `{"Code": str, "Message": str, "Item": {...}}` in
    DynamoDB JSON, `Item` where the action asked for `ALL_OLD` and the item existed.
    """

    def __init__(self, reasons: Sequence[dict[str, Any]]) -> None:
        super().__init__("transaction cancelled: " + ", ".join(str(reason.get("Code")) for reason in reasons))
        self.reasons = reasons
