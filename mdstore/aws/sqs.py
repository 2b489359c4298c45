"""SQS over signed calls: messages ten a call, several calls at the same time, and each message's own answer read.

A batch call answers 200 where some of its entries failed: those are tried again one by one, and what fails for good is
returned to the caller and never overlooked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from mdstore.aws.concurrent import Run, Task
from mdstore.aws.http import Answer, SignedHttp
from mdstore.aws.json_protocol import JsonProtocol, decode, encode, failure, is_retryable
from mdstore.aws.retry import Retry
from mdstore.errors import DeploymentBroken, MdstoreError, Unavailable

MAX_ENTRIES = 10  # of one batch call
MAX_BYTES = 2**20  # of one message, and of one batch
MAX_DELAY = 900  # seconds of one message; a FIFO queue delays none
_IN_FLIGHT = 8  # batch calls


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """A message to be sent, as the API names its parts."""

    message_body: str
    delay_seconds: int | None = None
    message_group_id: str | None = None
    message_deduplication_id: str | None = None
    message_attributes: dict[str, dict[str, str]] | None = None

    @property
    def size(self) -> int:
        """Bytes that SQS counts."""
        attributes = self.message_attributes or {}
        return len(self.message_body.encode()) + sum(
            len(name.encode()) + sum(len(text.encode()) for text in value.values())
            for name, value in attributes.items()
        )


class Failed(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """Why an entry was not taken. `sender_fault`: the same again would fail again; without `id`, so would any other entry."""

    id: str = ""
    code: str
    sender_fault: bool = False
    message: str = ""

    @property
    def is_refused(self) -> bool:
        """Whether SQS refused the entry for what it is."""
        return self.sender_fault and bool(self.id)

    def __str__(self) -> str:
        return f"{self.code}: {self.message or 'no message'}"


class Message(msgspec.Struct, kw_only=True, rename="pascal"):
    """A message that was received."""

    message_id: str
    receipt_handle: str
    body: str
    attributes: dict[str, str] = {}

    @property
    def receives(self) -> int:
        """How often SQS has delivered it, this time included."""
        return int(self.attributes.get("ApproximateReceiveCount", 1))


class Sqs:
    """Calls to SQS. Safe to share between threads, not across a fork."""

    def __init__(self, *, http: SignedHttp, endpoint: str, retry: Retry | None = None) -> None:
        self.http = http
        self._protocol = JsonProtocol(endpoint=endpoint, target="AmazonSQS")
        self._retry = retry or Retry()
        self._urls: dict[str, str] = {}

    def call(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        """Any call, retried while SQS says "not now". Raises `Unavailable` or `DeploymentBroken`."""
        encoded = encode(body)
        return self._retry.run(lambda: self._attempt(operation, encoded))

    def url(self, queue: str) -> str:
        """A queue's URL, asked for once. Raises `DeploymentBroken` where there is no such queue."""
        if queue not in self._urls:
            try:
                self._urls[queue] = self.call("GetQueueUrl", {"QueueName": queue})["QueueUrl"]
            except DeploymentBroken as error:
                if not is_gone(error.code):
                    raise
                why = f"there is no queue {queue!r}; mdstore provision makes those of the settings"
                raise DeploymentBroken(why, code=error.code) from error
        return self._urls[queue]

    def receive(self, url: str, count: int, *, wait: int, visibility: int) -> list[Message]:
        """Up to `count` messages, waiting up to `wait` seconds for the first, hidden for `visibility` seconds; tried once."""
        body = {
            "QueueUrl": url,
            "MaxNumberOfMessages": count,
            "WaitTimeSeconds": wait,
            "VisibilityTimeout": visibility,
            "AttributeNames": ["ApproximateReceiveCount"],
        }
        return msgspec.convert(self._attempt("ReceiveMessage", encode(body)).get("Messages") or [], list[Message])

    def send(self, url: str, entries: Sequence[Entry], *, in_order: bool = False) -> list[Failed | None]:
        """Send; for each entry None, or why it was not sent.

        Sent again after an answer that was lost, messages come twice: at least once is what SQS promises anyway.
        """
        return self._batches("SendMessageBatch", url, entries, in_order=in_order)

    def delete(self, url: str, handles: Sequence[str]) -> list[Failed | None]:
        """Delete received messages; for each None, or why not."""
        return self._batches("DeleteMessageBatch", url, [{"ReceiptHandle": one} for one in handles])

    def change_visibility(self, url: str, handles: Sequence[tuple[str, int]]) -> list[Failed | None]:
        """Make received messages, given with seconds, visible so much later; for each None, or why not."""
        changes = [{"ReceiptHandle": handle, "VisibilityTimeout": seconds} for handle, seconds in handles]
        return self._batches("ChangeMessageVisibilityBatch", url, changes)

    def _batches(
        self, operation: str, url: str, entries: Sequence[Any], *, in_order: bool = False
    ) -> list[Failed | None]:
        found: list[Failed | None] = [Failed(code="NotTried")] * len(entries)
        tasks = [self._batch(operation, url, entries, span, found) for span in spans(entries)]
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
            return [failed if one and one.code == "NotTried" else one for one in found]
        return found

    def _batch(
        self, operation: str, url: str, entries: Sequence[Any], span: range, found: list[Failed | None]
    ) -> Task[None]:
        """Task: one batch call, and one for each entry that it did not take; fills in the answers in `found`."""
        answer = yield _batch_call(operation, url, entries, span)
        again = self._note(answer, entries, found)
        for at in again:
            self._note((yield _batch_call(operation, url, entries, [at])), entries, found)

    def _note(self, answer: Mapping[str, Any], entries: Sequence[Any], found: list[Failed | None]) -> list[int]:
        """Fill in what an answer says of its entries; returns those to be tried again."""
        for sent in answer.get("Successful", ()):
            at = int(sent["Id"])
            found[at] = None
            if "MD5OfMessageBody" in sent and sent["MD5OfMessageBody"] != _md5(entries[at].message_body):
                found[at] = Failed(code="ChecksumMismatch", message="it was damaged on its way")
        failed = msgspec.convert(answer.get("Failed") or [], list[Failed])
        for one in failed:
            found[int(one.id)] = one
        return [int(one.id) for one in failed if not one.sender_fault]

    def _attempt(self, operation: str, body: bytes) -> dict[str, Any]:
        return read(operation, self.http.send(*self._protocol.request(operation, body)))


def is_gone(code: str) -> bool:
    """Whether an error says that there is no such queue; its name has changed with the protocol."""
    return code.endswith(("QueueDoesNotExist", "NonExistentQueue"))


def is_fifo(queue: str) -> bool:
    """Whether a queue, by its name or its URL, keeps the order of its messages."""
    return queue.endswith(".fifo")


def spans(entries: Sequence[Any]) -> Iterator[range]:
    """Cut into the batches that one call takes each."""
    start = size = 0
    for at, entry in enumerate(entries):
        bytes_ = entry.size if isinstance(entry, Entry) else 0
        if at > start and (at - start == MAX_ENTRIES or size + bytes_ > MAX_BYTES):
            yield range(start, at)
            start, size = at, 0
        size += bytes_
    if start < len(entries):
        yield range(start, len(entries))


def read(operation: str, answer: Answer) -> dict[str, Any]:
    """An answer's body, or the error that it means; `Unavailable` where nothing of a batch was taken for now."""
    if answer.status != 200:
        raise _error(operation, answer)
    if not answer.body:
        return {}
    try:
        body: dict[str, Any] = decode(answer.body)
    except ValueError as error:
        raise Unavailable(f"{operation}: the answer is not JSON", code="NoAnswer") from error
    failed = body.get("Failed")
    if failed and not body.get("Successful") and not any(one.get("SenderFault") for one in failed):
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


def _error(operation: str, answer: Answer) -> MdstoreError:
    code, message, _ = failure(operation, answer)
    kind = Unavailable if is_retryable(code, answer.status) else DeploymentBroken
    return kind(message, code=code)
