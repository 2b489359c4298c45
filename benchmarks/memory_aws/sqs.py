"""SQS in memory: standard queues with long polls, delays, visibility timeouts and redrive policies.

A poll is answered as soon as a message arrives, as on AWS.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from benchmarks.memory_aws.dynamodb import ApiError

Answer = Callable[[dict[str, Any]], None]
_ORDER = count()


@dataclass(slots=True, eq=False)
class _Message:
    id: str
    body: str
    md5: str
    sent_at: int
    attributes: dict[str, Any]
    group: str
    receives: int = 0
    first_at: int = 0
    handle: str = ""
    hidden_until: float = 0.0
    is_deleted: bool = False


@dataclass(slots=True, eq=False)
class _Poll:
    count: int
    visibility: float
    names: frozenset[str]
    answer: Answer
    timer: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class _Queue:
    name: str
    url: str
    attributes: dict[str, str]
    ready: deque[_Message] = field(default_factory=deque)
    hidden: list[tuple[float, int, _Message]] = field(default_factory=list)  # a heap; a message may be in it twice
    held: dict[str, _Message] = field(default_factory=dict)
    polls: deque[_Poll] = field(default_factory=deque)
    tags: dict[str, str] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None

    @property
    def arn(self) -> str:
        return f"arn:aws:sqs:us-east-1:000000000000:{self.name}"


class Sqs:
    """All queues, at URLs that begin with `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._queues: dict[str, _Queue] = {}

    def call(self, operation: str, body: dict[str, Any], answer: Answer) -> None:
        """Make a call; `answer` is called with its response, after a while if it is a long poll. Raises `ApiError`."""
        if operation == "ReceiveMessage":
            self._receive(body, answer)
            return
        found = getattr(self, f"_{operation.lower()}", None)
        if found is None:
            raise ApiError("InvalidAction", f"{operation} is not supported")
        answer(found(body))

    def deliver(self, name: str, text: str) -> None:
        """Send a message to a queue, as a topic does."""
        queue = self._queues.get(name)
        if queue is not None:
            self._send(queue, {"MessageBody": text})
            self._serve(queue)

    # -- messages

    def _sendmessage(self, body: dict[str, Any]) -> dict[str, Any]:
        queue = self._queue(body)
        message = self._send(queue, body)
        self._serve(queue)
        return {"MessageId": message.id, "MD5OfMessageBody": message.md5}

    def _sendmessagebatch(self, body: dict[str, Any]) -> dict[str, Any]:
        queue = self._queue(body)
        sent = []
        for entry in body["Entries"]:
            message = self._send(queue, entry)
            sent.append({"Id": entry["Id"], "MessageId": message.id, "MD5OfMessageBody": message.md5})
        self._serve(queue)
        return {"Successful": sent, "Failed": []}

    def _deletemessage(self, body: dict[str, Any]) -> dict[str, Any]:
        _delete(self._queue(body), body["ReceiptHandle"])
        return {}

    def _deletemessagebatch(self, body: dict[str, Any]) -> dict[str, Any]:
        queue = self._queue(body)
        for entry in body["Entries"]:
            _delete(queue, entry["ReceiptHandle"])
        return {"Successful": [{"Id": entry["Id"]} for entry in body["Entries"]], "Failed": []}

    def _changemessagevisibility(self, body: dict[str, Any]) -> dict[str, Any]:
        queue = self._queue(body)
        message = queue.held.get(body["ReceiptHandle"])
        if message is not None:
            self._hide(queue, message, body["VisibilityTimeout"])
            self._serve(queue)
        return {}

    def _changemessagevisibilitybatch(self, body: dict[str, Any]) -> dict[str, Any]:
        for entry in body["Entries"]:
            self._changemessagevisibility({"QueueUrl": body["QueueUrl"], **entry})
        return {"Successful": [{"Id": entry["Id"]} for entry in body["Entries"]], "Failed": []}

    def _receive(self, body: dict[str, Any], answer: Answer) -> None:
        queue = self._queue(body)
        names = frozenset(body.get("AttributeNames", [])) | frozenset(body.get("MessageSystemAttributeNames", []))
        visibility = body.get("VisibilityTimeout", queue.attributes.get("VisibilityTimeout", 30))
        poll = _Poll(body.get("MaxNumberOfMessages", 1), float(visibility), names, answer)
        wait = float(body.get("WaitTimeSeconds", queue.attributes.get("ReceiveMessageWaitTimeSeconds", 0)))
        self._show_again(queue)
        if queue.ready or not wait:
            answer(self._taken(queue, poll))
            return
        poll.timer = asyncio.get_running_loop().call_later(wait, partial(self._end_poll, queue, poll))
        queue.polls.append(poll)

    def _send(self, queue: _Queue, entry: Mapping[str, Any]) -> _Message:
        text = entry["MessageBody"]
        md5 = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        group, attributes = entry.get("MessageGroupId", ""), entry.get("MessageAttributes", {})
        message = _Message(str(uuid.uuid4()), text, md5, int(time.time() * 1000), attributes, group)
        delay = float(entry.get("DelaySeconds", queue.attributes.get("DelaySeconds", 0)))
        if delay:
            self._hide(queue, message, delay)
        else:
            queue.ready.append(message)
        return message

    def _serve(self, queue: _Queue) -> None:
        """Answer the polls that wait, and set a timer for the next hidden message."""
        self._show_again(queue)
        while queue.polls and queue.ready:
            poll = queue.polls.popleft()
            if poll.timer is not None:
                poll.timer.cancel()
            poll.answer(self._taken(queue, poll))
        if queue.timer is None and queue.polls and queue.hidden:
            pause = max(0.0, queue.hidden[0][0] - time.monotonic())
            queue.timer = asyncio.get_running_loop().call_later(pause, partial(self._on_timer, queue))

    def _on_timer(self, queue: _Queue) -> None:
        queue.timer = None
        self._serve(queue)

    def _end_poll(self, queue: _Queue, poll: _Poll) -> None:
        if poll in queue.polls:
            queue.polls.remove(poll)
            self._show_again(queue)
            poll.answer(self._taken(queue, poll))

    def _taken(self, queue: _Queue, poll: _Poll) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        redrive = json.loads(queue.attributes.get("RedrivePolicy", "null"))
        while queue.ready and len(found) < poll.count:
            message = queue.ready.popleft()
            queue.held.pop(message.handle, None)
            if redrive and message.receives >= int(redrive["maxReceiveCount"]):
                dead = self._queues.get(redrive["deadLetterTargetArn"].rpartition(":")[2])
                if dead is not None:
                    dead.ready.append(message)
                    self._serve(dead)
                continue
            message.receives += 1
            message.first_at = message.first_at or int(time.time() * 1000)
            message.handle = uuid.uuid4().hex
            queue.held[message.handle] = message
            self._hide(queue, message, poll.visibility)
            found.append(_received(message, poll.names))
        return {"Messages": found} if found else {}

    def _hide(self, queue: _Queue, message: _Message, seconds: float) -> None:
        message.hidden_until = time.monotonic() + seconds
        heapq.heappush(queue.hidden, (message.hidden_until, next(_ORDER), message))

    def _show_again(self, queue: _Queue) -> None:
        now = time.monotonic()
        while queue.hidden and queue.hidden[0][0] <= now:
            until, _, message = heapq.heappop(queue.hidden)
            if message.hidden_until == until and not message.is_deleted:
                queue.ready.append(message)

    # -- queues

    def _queue(self, body: Mapping[str, Any]) -> _Queue:
        name = str(body["QueueUrl"]).rpartition("/")[2]
        try:
            return self._queues[name]
        except KeyError:
            raise ApiError("QueueDoesNotExist", f"there is no queue {name}") from None

    def _createqueue(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["QueueName"]
        if name not in self._queues:
            url = f"{self._endpoint}/000000000000/{name}"
            self._queues[name] = _Queue(name, url, dict(body.get("Attributes", {})), tags=dict(body.get("tags", {})))
        return {"QueueUrl": self._queues[name].url}

    def _getqueueurl(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"QueueUrl": self._queue({"QueueUrl": body["QueueName"]}).url}

    def _listqueues(self, body: dict[str, Any]) -> dict[str, Any]:
        prefix = body.get("QueueNamePrefix", "")
        return {"QueueUrls": [queue.url for name, queue in self._queues.items() if name.startswith(prefix)]}

    def _deletequeue(self, body: dict[str, Any]) -> dict[str, Any]:
        del self._queues[self._queue(body).name]
        return {}

    def _purgequeue(self, body: dict[str, Any]) -> dict[str, Any]:
        queue = self._queue(body)
        queue.ready.clear()
        queue.hidden.clear()
        queue.held.clear()
        return {}

    def _setqueueattributes(self, body: dict[str, Any]) -> dict[str, Any]:
        self._queue(body).attributes.update(body["Attributes"])
        return {}

    def _getqueueattributes(self, body: dict[str, Any]) -> dict[str, Any]:
        queue = self._queue(body)
        self._show_again(queue)
        counts = {
            "ApproximateNumberOfMessages": str(len(queue.ready)),
            "ApproximateNumberOfMessagesNotVisible": str(len(queue.held)),
            "ApproximateNumberOfMessagesDelayed": str(sum(not message.receives for *_, message in queue.hidden)),
        }
        every = {"QueueArn": queue.arn, **counts, **queue.attributes}
        names = body.get("AttributeNames", [])
        return {"Attributes": every if "All" in names else {name: every[name] for name in names if name in every}}

    def _tagqueue(self, body: dict[str, Any]) -> dict[str, Any]:
        self._queue(body).tags.update(body["Tags"])
        return {}

    def _listqueuetags(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"Tags": self._queue(body).tags}


def _delete(queue: _Queue, handle: str) -> None:
    message = queue.held.pop(handle, None)
    if message is not None:
        message.is_deleted = True


def _received(message: _Message, names: frozenset[str]) -> dict[str, Any]:
    attributes = {
        "ApproximateReceiveCount": str(message.receives),
        "SentTimestamp": str(message.sent_at),
        "ApproximateFirstReceiveTimestamp": str(message.first_at),
        "SenderId": "000000000000",
        **({"MessageGroupId": message.group} if message.group else {}),
    }
    found: dict[str, Any] = {
        "MessageId": message.id,
        "ReceiptHandle": message.handle,
        "MD5OfBody": message.md5,
        "Body": message.body,
    }
    if names:
        found["Attributes"] = {name: text for name, text in attributes.items() if "All" in names or name in names}
    if message.attributes:
        found["MessageAttributes"] = message.attributes
    return found
