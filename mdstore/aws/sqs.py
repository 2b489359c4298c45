"""SQS over signed calls: ten messages per call, concurrent calls, and a result for each message.

A batch call returns 200 even if some of its entries failed. Those are retried one by one, and the caller gets the
reason for each one that fails for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from mdstore.aws.concurrent import Run, Task
from mdstore.aws.http import Response, SignedHttp
from mdstore.aws.json_protocol import JsonProtocol, encode, failure, is_retryable
from mdstore.aws.retry import Retry
from mdstore.errors import DeploymentBroken, MdstoreError, Unavailable

MAX_ENTRIES = 10  # per batch call
MAX_BYTES = 2**20  # per message, and per batch call
MAX_DELAY = 900  # seconds per message; FIFO queues do not support it
_IN_FLIGHT = 8  # batch calls
#: The operations that SQS may answer without a body.
_WITHOUT_OUTPUT = frozenset({"AddPermission", "ChangeMessageVisibility", "DeleteMessage", "DeleteQueue", "PurgeQueue",
                             "RemovePermission", "SetQueueAttributes", "TagQueue", "UntagQueue"})  # fmt: skip
#: The code of an entry whose text was damaged on its way to SQS. It was sent, so it is not retried.
_DAMAGED = "ChecksumMismatch"
_object_decoder = msgspec.json.Decoder(dict[str, Any])


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """A message to send. Its fields are those of the SQS API."""

    message_body: str
    delay_seconds: int | None = None
    message_group_id: str | None = None
    message_deduplication_id: str | None = None
    message_attributes: dict[str, dict[str, str]] | None = None

    @property
    def size(self) -> int:
        """The number of bytes that SQS counts for it."""
        attributes = self.message_attributes or {}
        return len(self.message_body.encode()) + sum(
            len(name.encode()) + sum(len(text.encode()) for text in value.values())
            for name, value in attributes.items()
        )


class Failed(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """Why SQS did not accept an entry.

    `sender_fault` means that a retry would fail too. Without an `id`, the whole call failed, so any other entry would
    fail as well.
    """

    id: str = ""
    code: str
    sender_fault: bool = False
    message: str = ""

    @property
    def is_refused(self) -> bool:
        """Return whether SQS rejected this entry because of its content."""
        return self.sender_fault and bool(self.id)

    def __str__(self) -> str:
        return f"{self.code}: {self.message or 'no message'}"


class Message(msgspec.Struct, kw_only=True, rename="pascal"):
    """A received message."""

    message_id: str
    receipt_handle: str
    body: str
    attributes: dict[str, str] = {}

    @property
    def receives(self) -> int:
        """The number of times that SQS has delivered it, including this time."""
        return int(self.attributes.get("ApproximateReceiveCount", 1))

    @property
    def sent_at(self) -> float:
        """The time at which SQS got it, in Unix seconds by SQS's clock."""
        return int(self.attributes["SentTimestamp"]) / 1000


class Sqs:
    """Calls to SQS. Threads may share it; forked processes may not."""

    def __init__(self, *, http: SignedHttp, endpoint: str, retry: Retry | None = None) -> None:
        self.http = http
        self._protocol = JsonProtocol(endpoint=endpoint, target="AmazonSQS")
        self._retry = retry or Retry()
        self._urls: dict[str, str] = {}

    def server_time(self) -> float:
        """Return the time in Unix seconds by SQS's clock."""
        return self.http.server_time()

    def call(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make any call, retrying while SQS says "not now". Raises `Unavailable` or `DeploymentBroken`."""
        encoded = encode(body)
        return self._retry.run(lambda: self._attempt(operation, encoded))

    def url(self, queue: str) -> str:
        """Return a queue's URL, which is looked up once. Raises `DeploymentBroken` if there is no such queue."""
        if queue not in self._urls:
            try:
                self._urls[queue] = self.call("GetQueueUrl", {"QueueName": queue})["QueueUrl"]
            except DeploymentBroken as error:
                if not is_gone(error.code):
                    raise
                makes = (
                    f"mdstore provision makes the queues of the settings, mdstore provision --queue {queue} this one"
                )
                why = f"there is no queue {queue!r}; {makes}"
                raise DeploymentBroken(why, code=error.code) from error
        return self._urls[queue]

    def receive(self, url: str, count: int, *, wait: int, visibility: int) -> list[Message]:
        """Receive up to `count` messages within `wait` seconds, hidden for `visibility` seconds. This call is not retried."""
        body = {
            "QueueUrl": url,
            "MaxNumberOfMessages": count,
            "WaitTimeSeconds": wait,
            "VisibilityTimeout": visibility,
            "AttributeNames": ["ApproximateReceiveCount", "SentTimestamp"],
        }
        return msgspec.convert(self._attempt("ReceiveMessage", encode(body)).get("Messages") or [], list[Message])

    def send(self, url: str, entries: Sequence[Entry], *, in_order: bool = False) -> list[Failed | None]:
        """Send messages and return, for each, None or why it was not sent.

        If a response is lost, the retry sends its messages twice. SQS promises only at-least-once delivery anyway.
        """
        return self._batches("SendMessageBatch", url, entries, in_order=in_order)

    def delete(self, url: str, handles: Sequence[str]) -> list[Failed | None]:
        """Delete received messages and return, for each, None or why it was not deleted."""
        return self._batches("DeleteMessageBatch", url, [{"ReceiptHandle": one} for one in handles])

    def change_visibility(self, url: str, handles: Sequence[tuple[str, int]]) -> list[Failed | None]:
        """Hide each received message for the given seconds from now; return, for each, None or why that failed."""
        changes = [{"ReceiptHandle": handle, "VisibilityTimeout": seconds} for handle, seconds in handles]
        return self._batches("ChangeMessageVisibilityBatch", url, changes)

    def _batches(
        self, operation: str, url: str, entries: Sequence[Any], *, in_order: bool = False
    ) -> list[Failed | None]:
        results: list[Failed | None] = [Failed(code="NotTried")] * len(entries)
        tasks = [self._batch(operation, url, entries, span, results) for span in spans(entries)]
        if in_order:
            tasks = [_one_after_another(tasks)]
        try:
            with self.http.concurrent_calls() as concurrent_calls:
                Run[None](
                    concurrent_calls,
                    begin=self._protocol.request,
                    read=read,
                    retry=self._retry,
                    in_flight=_IN_FLIGHT,
                    deadline=None,
                ).results(tasks)
        except (Unavailable, DeploymentBroken) as error:
            broken = isinstance(error, DeploymentBroken)
            failed = Failed(code=error.code, message=str(error), sender_fault=broken)
            return [failed if one and one.code == "NotTried" else one for one in results]
        return results

    def _batch(
        self, operation: str, url: str, entries: Sequence[Any], span: range, results: list[Failed | None]
    ) -> Task[None]:
        """Task: make one batch call, then retry one by one the entries that were not accepted. Write to `results`."""
        self._read_results((yield _batch_call(operation, url, entries, span)), entries, results)
        for at in span:
            result = results[at]
            if result is not None and not result.sender_fault and result.code != _DAMAGED:
                self._read_results((yield _batch_call(operation, url, entries, [at])), entries, results)

    def _read_results(self, answer: Mapping[str, Any], entries: Sequence[Any], results: list[Failed | None]) -> None:
        """Write the results in a response to `results`. A response that leaves an entry out does not change its result."""
        for sent in answer.get("Successful", ()):
            at = int(sent["Id"])
            results[at] = None
            if "MD5OfMessageBody" in sent and sent["MD5OfMessageBody"] != _md5(entries[at].message_body):
                results[at] = Failed(code=_DAMAGED, message="the message was damaged in transit")
        for one in msgspec.convert(answer.get("Failed") or [], list[Failed]):
            results[int(one.id)] = one

    def _attempt(self, operation: str, body: bytes) -> dict[str, Any]:
        return read(operation, self.http.send(*self._protocol.request(operation, body)))


def is_gone(code: str) -> bool:
    """Return whether an error code says that the queue does not exist. SQS's protocols use different codes for that."""
    return code.endswith(("QueueDoesNotExist", "NonExistentQueue"))


def is_fifo(queue: str) -> bool:
    """Return whether a queue, given by name or URL, is a FIFO queue."""
    return queue.endswith(".fifo")


def spans(entries: Sequence[Any]) -> Iterator[range]:
    """Split entries into ranges that fit one batch call each."""
    start = size = 0
    for at, entry in enumerate(entries):
        bytes_ = entry.size if isinstance(entry, Entry) else 0
        if at > start and (at - start == MAX_ENTRIES or size + bytes_ > MAX_BYTES):
            yield range(start, at)
            start, size = at, 0
        size += bytes_
    if start < len(entries):
        yield range(start, len(entries))


def read(operation: str, answer: Response) -> dict[str, Any]:
    """Return a response's body, or raise its error. Raises `Unavailable` if a batch response names no entry as done."""
    if answer.status != 200:
        raise _error(operation, answer)
    if not answer.body and operation in _WITHOUT_OUTPUT:
        return {}
    try:
        body = _object_decoder.decode(answer.body)
    except ValueError as error:
        raise Unavailable(f"{operation}: the response is not a JSON object", code="NoAnswer") from error
    failed, successful = body.get("Failed"), body.get("Successful")
    if operation.endswith("Batch") and not failed and not successful:
        raise Unavailable(f"{operation}: the response names no entry", code="NoAnswer")
    if failed and not successful and not any(one.get("SenderFault") for one in failed):
        raise Unavailable(f"{operation}: {failed[0].get('Message') or 'no message'}", code=str(failed[0].get("Code")))
    return body


def _one_after_another(tasks: Iterable[Task[None]]) -> Task[None]:
    for task in tasks:
        yield from task


def _batch_call(operation: str, url: str, entries: Sequence[Any], which: Iterable[int]) -> tuple[str, bytes]:
    body = {"QueueUrl": url, "Entries": [{"Id": str(at), **msgspec.to_builtins(entries[at])} for at in which]}
    return operation, encode(body)


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _error(operation: str, answer: Response) -> MdstoreError:
    code, message, _ = failure(operation, answer)
    kind = Unavailable if is_retryable(code, answer.status) else DeploymentBroken
    return kind(message, code=code)
