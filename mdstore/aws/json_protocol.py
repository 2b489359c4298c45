"""AWS's JSON protocol: a POST names its operation in a header, and an error response names its code in the body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from mdstore.aws.http import Response

#: Error codes of S3, SQS, SNS and DynamoDB that mean "not now". HTTP 5xx means the same, whatever its code.
_NOT_NOW = frozenset({
    "ConditionalRequestConflict", "InternalError", "InternalFailure", "InternalServerError", "KmsThrottled",
    "LimitExceededException", "OverLimit", "ProvisionedThroughputExceededException", "ReplicatedWriteConflictException",
    "RequestLimitExceeded", "RequestThrottled", "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable", "SlowDown",
    "Throttled", "ThrottledException", "Throttling", "ThrottlingException", "TransactionConflictException",
    "TransactionInProgressException",
})  # fmt: skip
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder().decode


class Failure(NamedTuple):
    """An error response: its code, its message and its whole body."""

    code: str
    message: str
    body: dict[str, Any]


class JsonProtocol:
    """Builds the calls to one service. `target` is the service's name and version in the protocol."""

    def __init__(self, *, endpoint: str, target: str) -> None:
        self._url = endpoint.rstrip("/") + "/"
        self._target = target

    def request(self, operation: str, body: bytes) -> tuple[str, Sequence[str], bytes]:
        """Return URL, headers and body of a call."""
        headers = ("Content-Type: application/x-amz-json-1.0", f"X-Amz-Target: {self._target}.{operation}")
        return self._url, headers, body


def is_retryable(code: str, status: int) -> bool:
    """Return whether the same call may succeed later."""
    return code in _NOT_NOW or status >= 500


def failure(operation: str, answer: Response) -> Failure:
    """Read an error response, `{"__type": "prefix#Code", "message": ...}`. Without such a body, the code is the HTTP status."""
    try:
        body = decode(answer.body)
        code = str(body["__type"]).rpartition("#")[2]
    except (ValueError, LookupError, TypeError):
        body, code = {}, f"HTTP{answer.status}"
    return Failure(code, f"{operation}: {body.get('message') or body.get('Message') or 'no message'}", body)
