"""The table of delayed messages: it holds messages that are due later than SQS can delay them.

SQS delays a message by 900 s at most. A message that is due later is put here, and moved to its queue 900 s before it is due.
SQS's own delay covers those 900 s, so the message arrives with SQS's precision. A FIFO queue cannot delay a single message, so
its messages are moved when they are due, and arrive late by up to the time between two checks of the table, about `INTERVAL`.

    pk = {hour of the move}#{shard}   sk = {time of the move}#{digest}      a message
         2026-11-25T15#3                   1795618800123#9f86d081884c7d65
         queue, body
         ident                deduplication id
         group                id of the message group, if there is one
         due                  Unix ms
         expires_at           Unix s, 90 days after the time of the move, so never before the message is due
    pk = drain                        sk = drain                            the state, the only item that is ever updated
         since                hour: no message was ever put into an earlier one
         first#3              hour: shard 3 holds no message of an earlier one
         until#3              Unix ms: shard 3 is leased, or pauses, until then

The digest covers queue, due time and deduplication id. It also decides the shard, so messages that are due at one moment are
spread over 8 partitions, which take 8,000 write units per second. No item lists the hours that hold messages: a leased run
queries each hour from `first` to the present one. After a pause of a day, that is 24 reads per shard.
`docs/adr/0016-due-time-table.md` has the reasons.

Delivery is at least once: a message is deleted after SQS has accepted it, so a worker that dies in between repeats messages and
loses none.

An idle table costs little. If no message was ever put, each worker reads one item (1 read unit) every 10 s: 8,640 units or
$0.001 a day. After that, the workers together lease and read each shard every 7 to 10 s, for 2 write and 2 read units: at most
200,000 of each, or $0.15, a day, however many workers there are.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from mdstore.aws.dynamodb.attributes import Item, from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.dynamodb.updates import expressions, given, placeholders
from mdstore.aws.sqs import MAX_DELAY, MAX_ENTRIES, is_fifo
from mdstore.errors import InvalidRequest, Unavailable
from mdstore.log import event
from mdstore.settings import DAY

MAX_BODY = 350 * 1024  # bytes; an item holds 400 KB
SHARDS = 8  # may grow but never shrink: no worker would move the messages of the removed shards
THREADS = 4  # shards that one worker moves at the same time
#: Seconds between two checks of one worker, on average.
INTERVAL = 10.0
#: Seconds between two leased runs of a shard.
PAUSE = 7.0
#: Seconds for which a shard is leased, and between two leased runs if the first one had to leave messages behind.
LEASE = 60.0
#: Seconds after which a leased run begins no new batch. If the calls for its last batch are retried until the lease ends,
#: the next run may send that batch too; delivery is at least once anyway.
MAX_RUN = 15.0
#: Seconds allowed for the duration of a put, and for the wrong clock of a process that has had no response from DynamoDB yet.
#: AWS refuses a call whose time is off by 15 minutes.
CLOCK_TOLERANCE = 3_600
CALL_TIMEOUT = 5.0  # seconds for each call that `move` makes; the next check repeats a call that failed
RETENTION = 90 * DAY
MAX_AHEAD = 10 * 366 * DAY
MAX_BEHIND = DAY

_STATE = to_item({"pk": "drain", "sk": "drain"})
_QUEUE = re.compile(r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo")
_GROUP = re.compile(r"[!-~]{1,128}")


class DelayedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Holds a message that SQS can take now.

    `due_at` is in Unix seconds, and `delay_seconds` is the time left until then, None for a FIFO queue. Only a FIFO
    queue uses the `deduplication_id`. `key` is the message's `pk` and `sk` in the table.
    """

    queue: str
    body: str
    due_at: float
    deduplication_id: str
    group_id: str | None
    delay_seconds: int | None
    key: tuple[str, str]


#: Publishes up to 10 messages of one queue, and returns those that are safe: in SQS or among the dead letters.
#: The other messages, or all if it raises, stay in the table and are tried again.
Send = Callable[[Sequence[DelayedMessage]], Sequence[DelayedMessage]]


class DelayedTable:
    """Stores delayed messages and moves them to their queues. Threads may share it; a forked process may not.

    `put` needs the permission for PutItem; `move` needs those for GetItem, UpdateItem, Query and BatchWriteItem. Every call may
    raise `Unavailable` or `DeploymentBroken`.
    """

    def __init__(self, *, dynamo: DynamoClient, table: str, clock: Callable[[], float] | None = None) -> None:
        self._dynamo = dynamo
        self._table = table
        self._clock = (
            clock or dynamo.server_time
        )  # a worker with a wrong clock must not move messages too early or too late
        self._has_state = False

    def put(self, queue: str, body: str, due_at: float, *, deduplication_id: str, group_id: str | None = None) -> bool:
        """Keep a message for `queue` until `due_at`, in Unix seconds. Return False if the table holds it already.

        A message is identified by its queue, `due_at` and `deduplication_id`, such as a task's id with its number of retries.
        Raises `InvalidRequest`.
        """
        now = self._clock()
        _validate(queue, body, due_at, deduplication_id=deduplication_id, group_id=group_id, now=now)
        if not self._has_state:
            # The state comes before the first message, because `move` looks for messages only if the state exists.
            self._put({**_STATE, **to_item({"since": _hour(now - CLOCK_TOLERANCE)})})
            self._has_state = True
        move_at = due_at if is_fifo(queue) else due_at - MAX_DELAY
        digest = hashlib.sha256(f"{queue}\n{round(due_at * 1000)}\n{deduplication_id}".encode()).hexdigest()
        listed_at = max(now, move_at)  # no run looks for new messages in an hour that has passed
        values = {
            "pk": _partition(_hour(listed_at), int(digest[:8], 16) % SHARDS),
            "sk": f"{round(move_at * 1000):013d}#{digest[:32]}",
            "queue": queue,
            "body": body,
            "ident": deduplication_id,
            "group": group_id,
            "due": round(due_at * 1000),
            "expires_at": round(listed_at + RETENTION),
        }
        return self._put(to_item(values))

    def move(self, send: Send, *, stopping: Callable[[], bool] = lambda: False) -> int:
        """Move the messages that are due to be moved to their queues, and return how many `send` returned as safe.

        End after one leased run of each shard that is free, or soon after `stopping` returns true. Several workers may move
        messages at once. If `send` fails for a queue, log that, and skip the queue for the rest of the shard's run.
        """
        state = from_item(self._call("GetItem", {"Key": _STATE, "ConsistentRead": True}).get("Item", {}))
        if "since" not in state:
            return 0
        now = round(self._clock() * 1000)
        free = [shard for shard in range(SHARDS) if state.get(f"until#{shard}", 0) < now]
        random.shuffle(free)  # so that workers which start together do not ask for the same shards
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mdstore-due") as pool:
            runs = [pool.submit(self._run_leased, shard, send, stopping) for shard in free]
        return sum(run.result() for run in runs)

    def _run_leased(self, shard: int, send: Send, stopping: Callable[[], bool]) -> int:
        """Lease a shard, move its messages, and return how many. Return 0 if another worker has the lease."""
        if stopping():
            return 0
        until = round((self._clock() + LEASE) * 1000)
        state = self._lease(shard, until, {"until": until})
        if state is None:
            return 0
        run = LeasedRun(self, shard, send, stopping, state.get(f"first#{shard}", state["since"]))
        pause = run.run()
        # If a call above raises, the lease stays until it expires.
        self._lease(shard, until, {"until": round((self._clock() + pause) * 1000), "first": run.first}, held=True)
        return run.published

    def _lease(self, shard: int, until: int, changes: dict[str, int], *, held: bool = False) -> dict[str, Any] | None:
        """Write a shard's part of the state, and return the state.

        Return None, and write nothing, if another worker has the lease. `held` says that the caller has it, until `until`.
        """
        item = self._dynamo.update_if(
            {
                "TableName": self._table,
                "Key": _STATE,
                **expressions(
                    set=given(changes),
                    condition="#until = :is" if held else "attribute_not_exists(#until) OR #until < :is",
                    names={name: f"{name}#{shard}" for name in changes},
                ),
                "ExpressionAttributeValues": to_item(
                    placeholders({**changes, "is": until if held else round(self._clock() * 1000)})
                ),
            },
            deadline=self._deadline(),
        )
        return None if item is None else from_item(item)

    def pages(self, hour: int, shard: int) -> Iterator[list[dict[str, Any]]]:
        """Yield the messages of one partition that can be moved now, in order, up to 1 MB a page."""
        query = {
            "ConsistentRead": True,
            "KeyConditionExpression": "#pk = :pk AND #sk < :now",
            "ExpressionAttributeNames": {"#pk": "pk", "#sk": "sk"},
            "ExpressionAttributeValues": to_item({
                ":pk": _partition(hour, shard),
                ":now": f"{round(self._clock() * 1000):013d}$",  # the character after #
            }),
        }  # fmt: skip
        while True:
            answer = self._call("Query", query)
            yield [from_item(item) for item in answer["Items"]]
            if "LastEvaluatedKey" not in answer:
                return
            query["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    def delete(self, keys: Iterable[tuple[str, str]]) -> None:
        """Delete up to 25 messages."""
        deadline = self._dynamo.retry.deadline(None)
        left = {self._table: [{"DeleteRequest": {"Key": to_item({"pk": pk, "sk": sk})}} for pk, sk in keys]}

        def attempt() -> None:
            nonlocal left
            answer = self._dynamo.call("BatchWriteItem", {"RequestItems": left}, deadline=deadline)
            left = answer.get("UnprocessedItems")
            if left:
                raise Unavailable("BatchWriteItem: some messages were not deleted", code="UnprocessedItems")

        self._dynamo.retry.run(attempt, deadline=deadline)

    def now(self) -> float:
        """Return the time in Unix seconds."""
        return self._clock()

    def _put(self, item: Item) -> bool:
        condition = expressions(condition="attribute_not_exists(#pk)")
        return self._dynamo.put_if({"TableName": self._table, "Item": item, **condition})

    def _call(self, operation: str, body: dict[str, Any]) -> Any:
        return self._dynamo.call(operation, {"TableName": self._table, **body}, deadline=self._deadline())

    def _deadline(self) -> float:
        return self._dynamo.retry.clock() + CALL_TIMEOUT


class LeasedRun:
    """Moves the messages of one shard while a worker has its lease. `first` is the first hour that may hold a message."""

    def __init__(self, table: DelayedTable, shard: int, send: Send, stopping: Callable[[], bool], first: int) -> None:
        self._table = table
        self._shard = shard
        self._send = send
        self._stopping = stopping
        self._ends_at = table.now() + MAX_RUN
        self._has_leftovers = False
        self._failing_queues: set[str] = set()
        self.first = first
        self.published = 0

    def run(self) -> float:
        """Move what can be moved, and return the seconds until the shard is free again."""
        closed = _hour(self._table.now() - CLOCK_TOLERANCE)  # no later put can reach an earlier hour
        for hour in range(self.first, _hour(self._table.now()) + 1):
            for page in self._table.pages(hour, self._shard):
                for batch in _batches(page, self._table.now):
                    if self._must_end():
                        return 0.0
                    self._move(batch)
            if not self._has_leftovers and hour < closed:
                self.first = hour + 1
            if self._must_end():
                return 0.0
        return LEASE if self._has_leftovers else PAUSE

    def _must_end(self) -> bool:
        return self._stopping() or self._table.now() >= self._ends_at

    def _move(self, batch: list[DelayedMessage]) -> None:
        queue = batch[0].queue
        sent: Sequence[DelayedMessage] = []
        if queue not in self._failing_queues:
            try:
                sent = self._send(batch)
            except Exception as error:
                event("due.kept", level=logging.ERROR, queue=queue, messages=len(batch), error=repr(error))
                self._failing_queues.add(queue)
        if sent:
            self._table.delete(message.key for message in sent)
        self.published += len(sent)
        self._has_leftovers = self._has_leftovers or len(sent) < len(batch)


def _batches(page: list[dict[str, Any]], now: Callable[[], float]) -> Iterator[list[DelayedMessage]]:
    """Yield batches of one queue each, in order.

    A message's delay is computed when its batch is asked for, because sending the batches before it takes time.
    """
    queues: dict[str, list[dict[str, Any]]] = {}
    for values in page:
        queues.setdefault(values["queue"], []).append(values)
    for items in queues.values():
        for start in range(0, len(items), MAX_ENTRIES):
            yield [_message(values, now()) for values in items[start : start + MAX_ENTRIES]]


def _message(values: dict[str, Any], now: float) -> DelayedMessage:
    due_at = values["due"] / 1000
    delay = min(MAX_DELAY, max(0, math.ceil(due_at - now)))
    return DelayedMessage(
        queue=values["queue"],
        body=values["body"],
        due_at=due_at,
        deduplication_id=values["ident"],
        group_id=values.get("group"),
        delay_seconds=None if is_fifo(values["queue"]) else delay,
        key=(values["pk"], values["sk"]),
    )


def _hour(moment: float) -> int:
    return int(moment // 3_600)


def _partition(hour: int, shard: int) -> str:
    return f"{time.strftime('%Y-%m-%dT%H', time.gmtime(hour * 3_600))}#{shard}"


def _validate(queue: str, body: str, due_at: float, *, deduplication_id: str, group_id: str | None, now: float) -> None:
    if not _QUEUE.fullmatch(queue):
        raise InvalidRequest(field="queue", value=queue, expected="the name of an SQS queue")
    if group_id is not None and not _GROUP.fullmatch(group_id):
        raise InvalidRequest(field="group_id", value=group_id, expected="1-128 ASCII letters, digits or punctuation")
    if not 1 <= len(deduplication_id) <= 1_000:
        raise InvalidRequest(field="deduplication_id", value=deduplication_id, expected="1-1000 characters")
    if not isinstance(due_at, int | float) or not now - MAX_BEHIND <= due_at <= now + MAX_AHEAD:  # false for NaN
        expected = f"Unix seconds from a day ago to ten years ahead; it is {now:.0f} now"
        raise InvalidRequest(field="due_at", value=due_at, expected=expected)
    try:
        size = len(body.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(field="body", value=body, expected=f"valid Unicode ({error.reason})") from error
    if not 1 <= size <= MAX_BODY:
        expected = f"1 to {MAX_BODY} bytes; larger bodies belong in S3 (mdstore.queue.broker.claim_check)"
        raise InvalidRequest(field="body", value=f"{size} bytes", expected=expected)
