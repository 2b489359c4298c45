"""A thin DynamoDB client: its JSON protocol over signed calls.

It avoids botocore's serializer, validator, hooks and parser, which take nine tenths of the time of a boto3 call.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mdstore.aws.concurrent import Call, Run, Task
from mdstore.aws.dynamodb.attributes import Item
from mdstore.aws.event_loop import EventLoopRunner
from mdstore.aws.http import ConcurrentCalls, Response, SignedHttp
from mdstore.aws.json_protocol import JsonProtocol, decode, encode, failure, is_retryable
from mdstore.aws.retry import Retry
from mdstore.errors import (
    ConditionFailed,
    DeploymentBroken,
    MdstoreError,
    RequestRejected,
    TransactionCancelled,
    Unavailable,
)

T = TypeVar("T")

_BATCH = 100  # keys per BatchGetItem

_MALFORMED = frozenset({"ValidationException", "SerializationException", "IdempotentParameterMismatchException",
                        "ItemCollectionSizeLimitExceededException"})  # fmt: skip
#: Cancellation reasons that come from contention, not from the operations themselves.
_CONTENTION = frozenset({"TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"})


class DynamoClient:
    """Calls to one DynamoDB endpoint. Threads may share it; forked processes may not."""

    def __init__(self, *, http: SignedHttp, endpoint: str, retry: Retry | None = None) -> None:
        self._http = http
        self._protocol = JsonProtocol(endpoint=endpoint, target="DynamoDB_20120810")
        self.retry = retry or Retry()

    def server_time(self) -> float:
        """Return the time in Unix seconds by DynamoDB's clock."""
        return self._http.server_time()

    def call(self, operation: str, body: Mapping[str, Any] | bytes, *, deadline: float | None = None) -> Any:
        """Call `operation` with a body in DynamoDB JSON and return the response's body. Retries while AWS says "not now".

        Raises `Unavailable`, `DeploymentBroken`, `RequestRejected`, `ConditionFailed` or `TransactionCancelled`.
        """
        encoded = body if isinstance(body, bytes) else encode(body)
        return self.retry.run(lambda: self._attempt(operation, encoded), deadline=deadline)

    def update_if(self, body: Mapping[str, Any], *, deadline: float | None = None) -> Item | None:
        """Call UpdateItem and return the updated item. Return None if the condition failed, which is a normal result."""
        try:
            item: Item = self.call("UpdateItem", {**body, "ReturnValues": "ALL_NEW"}, deadline=deadline)["Attributes"]
        except ConditionFailed:
            return None
        return item

    def update_if_task(self, body: Mapping[str, Any], *, return_values: str = "ALL_NEW") -> Task[Item | None]:
        """Task: do what `update_if` does. With the `return_values` "NONE", the item is empty."""
        try:
            answer = yield "UpdateItem", encode({**body, "ReturnValues": return_values})
        except ConditionFailed:
            return None
        item: Item = answer.get("Attributes", {})
        return item

    def put_if(self, body: Mapping[str, Any], *, deadline: float | None = None) -> bool:
        """Call PutItem and return whether it wrote: False means that the condition failed."""
        try:
            self.call("PutItem", body, deadline=deadline)
        except ConditionFailed:
            return False
        return True

    def put_if_task(self, body: Mapping[str, Any]) -> Task[ConditionFailed | None]:
        """Task: call PutItem, and return the error if the condition failed."""
        try:
            yield "PutItem", encode(body)
        except ConditionFailed as failed:
            return failed
        return None

    def pages(self, operation: str, body: Mapping[str, Any]) -> Iterator[list[Item]]:
        """Yield the items of a Query or Scan, page by page."""
        while True:
            answer = self.call(operation, body)
            yield answer["Items"]
            if "LastEvaluatedKey" not in answer:
                return
            body = {**body, "ExclusiveStartKey": answer["LastEvaluatedKey"]}

    def query_task(self, body: Mapping[str, Any]) -> Task[list[Item]]:
        """Task: return all items of a Query."""
        items: list[Item] = []
        while True:
            answer = yield "Query", encode(body)
            items += answer["Items"]
            if "LastEvaluatedKey" not in answer:
                return items
            body = {**body, "ExclusiveStartKey": answer["LastEvaluatedKey"]}

    def run(self, tasks: Iterable[Task[T]], *, in_flight: int = 1, deadline: float | None = None) -> list[T]:
        """Run all tasks, with up to `in_flight` calls at the same time, and return their results in order.

        A task is sent each call's response, or is thrown its error. `Unavailable` is not thrown but retried here, as by
        `call`. Once a task raises or the deadline passes, no further call is started: the running ones are awaited, and
        the first error is raised.
        """
        with self._http.concurrent_calls() as calls:
            return self._new_run(calls, in_flight, deadline).results(tasks)

    def outcomes(
        self, tasks: Iterable[Task[T]], *, in_flight: int, deadline: float | None = None
    ) -> list[T | Exception]:
        """Run all tasks as `run` does, but let each end on its own. Return, in order, its result or the error that ended it."""
        with self._http.concurrent_calls() as calls:
            return self._new_run(calls, in_flight, deadline).outcomes(tasks)

    def _new_run(self, calls: ConcurrentCalls, in_flight: int, deadline: float | None) -> Run[Any]:
        return Run(
            calls,
            begin=self._protocol.request,
            read=_read,
            retry=self.retry,
            in_flight=in_flight,
            deadline=deadline,
        )

    def event_loop_runner(self) -> EventLoopRunner:
        """Return what runs tasks on the running event loop."""
        return EventLoopRunner(self._http, begin=self._protocol.request, read=_read, retry=self.retry)

    def batch_get(self, table: str, keys: Sequence[Mapping[str, Any]]) -> Task[list[dict[str, Any]]]:
        """Task: read the existing items of `keys`, strongly consistent, in any order, 100 per call. `keys` must be distinct."""
        found: list[dict[str, Any]] = []
        for start in range(0, len(keys), _BATCH):
            asked = list(keys[start : start + _BATCH])
            while asked:
                answer = yield (
                    "BatchGetItem",
                    encode({"RequestItems": {table: {"Keys": asked, "ConsistentRead": True}}}),
                )
                found += answer["Responses"].get(table, [])
                asked = answer.get("UnprocessedKeys", {}).get(table, {}).get("Keys", [])
        return found

    def close(self) -> None:
        """Close the idle connections."""
        self._http.close()

    def _attempt(self, operation: str, body: bytes) -> Any:
        return _read(operation, self._http.send(*self._protocol.request(operation, body)))


def transact(actions: bytes) -> Call:
    """Build a `TransactWriteItems` call from a JSON list of actions. Each attempt sends the same bytes and the same token."""
    token = hashlib.sha256(actions).hexdigest()[:36]
    return "TransactWriteItems", b'{"TransactItems":%b,"ClientRequestToken":"%b"}' % (actions, token.encode())


def _read(operation: str, answer: Response) -> Any:
    """Return a response's body, or raise the error that it reports."""
    if answer.header(b"x-amz-crc32:") not in (None, b"%d" % zlib.crc32(answer.body)):
        raise Unavailable("the response was damaged in transit", code="ChecksumMismatch")
    if answer.status != 200:
        raise _error(operation, answer)
    try:
        body = decode(answer.body)
    except ValueError as error:
        raise Unavailable("the response is not JSON; the call may have taken effect", code="NoAnswer") from error
    if operation == "BatchGetItem" and body.get("UnprocessedKeys") and not any(body["Responses"].values()):
        raise Unavailable("BatchGetItem: none of the keys was processed", code="UnprocessedKeys")
    return body


def _error(operation: str, answer: Response) -> MdstoreError:
    code, message, body = failure(operation, answer)
    if code == "TransactionCanceledException":
        return _cancelled(body.get("CancellationReasons") or [], message)
    if code == "ConditionalCheckFailedException":
        return ConditionFailed(message, item=body.get("Item"))
    if is_retryable(code, answer.status):
        return Unavailable(message, code=code)
    if code in _MALFORMED:
        return RequestRejected(message, code=code)
    return DeploymentBroken(message, code=code)


def _cancelled(reasons: list[dict[str, Any]], message: str) -> MdstoreError:
    codes = {str(reason.get("Code", "None")) for reason in reasons} - {"None"}
    if not codes or codes <= _CONTENTION:
        return Unavailable(message, code=next(iter(sorted(codes)), "TransactionCanceled"))
    return TransactionCancelled(reasons)
