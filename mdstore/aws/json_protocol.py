"""AWS's JSON protocol: a POST that names its operation in a header, and errors that name their code in the body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from mdstore.aws.http import Answer

#: Codes of S3, SQS, SNS and DynamoDB that say "not now"; HTTP 5xx says it too, whatever its code.
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
    """An error answer: its code, its words, and the whole of its body."""

    code: str
    message: str
    body: dict[str, Any]


class JsonProtocol:
    """What a call to one service looks like on the wire. `target` is the service's name in the protocol."""

    def __init__(self, *, endpoint: str, target: str) -> None:
        self._url = endpoint.rstrip("/") + "/"
        self._target = target

    def request(self, operation: str, body: bytes) -> tuple[str, Sequence[str], bytes]:
        """URL, headers and body of a call."""
        headers = ("Content-Type: application/x-amz-json-1.0", f"X-Amz-Target: {self._target}.{operation}")
        return self._url, headers, body


def is_retryable(code: str, status: int) -> bool:
    """Whether an error may be gone when the same is tried again later."""
    return code in _NOT_NOW or status >= 500


def failure(operation: str, answer: Answer) -> Failure:
    """Read an error answer, `{"__type": "prefix#Code", "message": ...}`; a proxy's goes by its HTTP status."""
    try:
        body = decode(answer.body)
        code = str(body["__type"]).rpartition("#")[2]
    except (ValueError, LookupError, TypeError):
        body, code = {}, f"HTTP{answer.status}"
    return Failure(code, f"{operation}: {body.get('message') or body.get('Message') or 'no message'}", body)
