"""The due-time table: messages that are due later than SQS can delay them, kept in DynamoDB until SQS can.

SQS delays a message by 900 s at most. A message that is due later is put here, and moved to its queue 900 s before it is due:
the rest of the time it waits in SQS, whose own delay gives the precision. A FIFO queue delays no single message, so its
messages are moved when they are due, and are late by as much as the table is looked at, about `INTERVAL`.

    pk = {hour of the move}#{shard}   sk = {time of the move}#{digest}      a message
         2026-11-25T15#3                   1795618800123#9f86d081884c7d65
         queue, body, ident, group?   due: Unix ms   expires_at: Unix s, 90 days after the move, so never before it
    pk = drain                        sk = drain                            who looks where; the only item that is updated
         since: hour   before it nothing was ever put
         first#3: hour   of shard 3 nothing is left before it   until#3: Unix ms   of shard 3's lease

The digest is of queue, due time and `ident`, and the shard is taken from it, so messages of one moment are spread over 8
partitions, which take 8,000 write units a second. Nothing is written to announce an hour: whoever drains goes from `first` to
the present hour. After a pause of a day that is 24 reads a shard. `docs/adr/0016-due-time-table.md` has the reasons.

At least once: a message is deleted when SQS has it, so a drainer that dies in between repeats messages and loses none.

What it costs to find nothing: each worker reads one item (1 read unit) every 10 s, 8,640 units or $0.001 a day. Where
something was ever put, the workers together lease and read each shard every 7 to 10 s, 2 write and 2 read units a time: at most
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

MAX_BODY = 350 * 1024  # bytes; an item may have 400 KB
SHARDS = 8  # may grow; were it made smaller, the shards left out would not be drained any more
THREADS = 4  # shards that one worker drains at the same time
#: Seconds between two looks of one worker, on average, and from the end of a look at a shard until it may be looked at again.
INTERVAL = 10.0
REST = 7.0
#: Seconds that a shard is leased for, and after which its drainer begins nothing more. A batch whose calls are tried for long
#: may outlast the rest, and then be sent by the next drainer too: a message may come twice anyway.
LEASE = 60.0
TURN = 15.0
#: Seconds for which a clock may be wrong, or a put under way: AWS refuses a call whose time is off by 15 minutes.
LATE = 3_600
PATIENCE = 5.0  # with a call that drains; the next look repeats it
KEPT = 90 * DAY
MAX_AHEAD = 10 * 366 * DAY
MAX_BEHIND = DAY

_STATE = to_item({"pk": "drain", "sk": "drain"})
_QUEUE = re.compile(r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo")
_GROUP = re.compile(r"[!-~]{1,128}")


class DelayedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message that SQS can take now. `delay_seconds` is what is left of its time, None for a FIFO queue.

    `due` is Unix seconds; `place` where it lies in the table. Its `ident` is good for a FIFO queue's deduplication id.
    """

    queue: str
    body: str
    due: float
    ident: str
    group_id: str | None
    delay_seconds: int | None
    place: tuple[str, str]


#: Publishes up to 10 messages of one queue; returns those that are safe, in SQS or among the dead letters.
#: What it does not return, or raises for, stays in the table and is tried again.
Send = Callable[[Sequence[DelayedMessage]], Sequence[DelayedMessage]]


class DelayedTable:
    """Puts and drains. Safe to share between threads, not across a fork.

    To put takes the right to PutItem; to drain, those to GetItem, UpdateItem, Query and BatchWriteItem. Raises `Unavailable`
    and `DeploymentBroken` beside what is said.
    """

    def __init__(self, *, dynamo: DynamoClient, table: str, clock: Callable[[], float] = time.time) -> None:
        self._dynamo = dynamo
        self._table = table
        self._clock = clock
        self._is_noted = False

    def put(self, queue: str, body: str, due: float, *, ident: str, group_id: str | None = None) -> bool:
        """Keep a message for `queue` until `due`, Unix seconds; returns False where it is here already.

        The same is what has the same queue, `due` and `ident`, for instance a task's id and its number of retries.
        Raises `InvalidRequest`.
        """
        now = self._clock()
        _check(queue, body, due, ident=ident, group_id=group_id, now=now)
        if not self._is_noted:
            # Before the first message: a drainer that finds no such item looks no further.
            self._put({**_STATE, **to_item({"since": _hour(now - LATE)})})
            self._is_noted = True
        move = due if is_fifo(queue) else due - MAX_DELAY
        digest = hashlib.sha256(f"{queue}\n{round(due * 1000)}\n{ident}".encode()).hexdigest()
        found = max(now, move)  # in an hour that is over nobody would look for it
        values = {
            "pk": _partition(_hour(found), int(digest[:8], 16) % SHARDS),
            "sk": f"{round(move * 1000):013d}#{digest[:32]}",
            "queue": queue,
            "body": body,
            "ident": ident,
            "group": group_id,
            "due": round(due * 1000),
            "expires_at": round(found + KEPT),
        }
        return self._put(to_item(values))

    def move(self, send: Send, *, stopping: Callable[[], bool] = lambda: False) -> int:
        """Move what is due to its queue; returns how many messages `send` took.

        It ends when it has been at each shard that nobody else is at, and soon after `stopping` says so. Several workers
        may drain at once. A queue that `send` fails for is logged, and left alone until the shard's next turn.
        """
        state = from_item(self._call("GetItem", {"Key": _STATE, "ConsistentRead": True}).get("Item", {}))
        if "since" not in state:
            return 0
        now = round(self._clock() * 1000)
        free = [shard for shard in range(SHARDS) if state.get(f"until#{shard}", 0) < now]
        random.shuffle(free)  # so that workers who come together do not ask for the same
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mdstore-due") as pool:
            runs = [pool.submit(self._run_leased, shard, send, stopping) for shard in free]
        return sum(run.result() for run in runs)

    def _run_leased(self, shard: int, send: Send, stopping: Callable[[], bool]) -> int:
        if stopping():
            return 0
        until = round((self._clock() + LEASE) * 1000)
        state = self._lease(shard, until, {"until": until})
        if state is None:
            return 0
        run = LeasedRun(self, shard, send, stopping, state.get(f"first#{shard}", state["since"]))
        rest = run.run()
        # Where a call above raises, the lease ends by its time.
        self._lease(shard, until, {"until": round((self._clock() + rest) * 1000), "first": run.first}, held=True)
        return run.published

    def _lease(self, shard: int, until: int, changes: dict[str, int], *, held: bool = False) -> dict[str, Any] | None:
        """Write a shard's part of the state where its lease is over, or is the one `held`; returns the state, or None."""
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
        """What may be moved by now of one partition, in order, up to 1 MB a page."""
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

    def delete(self, places: Iterable[tuple[str, str]]) -> None:
        """Forget up to 25 messages."""
        deadline = self._dynamo.retry.deadline(None)
        left = {self._table: [{"DeleteRequest": {"Key": to_item({"pk": pk, "sk": sk})}} for pk, sk in places]}

        def attempt() -> None:
            nonlocal left
            answer = self._dynamo.call("BatchWriteItem", {"RequestItems": left}, deadline=deadline)
            left = answer.get("UnprocessedItems")
            if left:
                raise Unavailable("BatchWriteItem: not all was deleted", code="UnprocessedItems")

        self._dynamo.retry.run(attempt, deadline=deadline)

    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def _put(self, item: Item) -> bool:
        condition = expressions(condition="attribute_not_exists(#pk)")
        return self._dynamo.put_if({"TableName": self._table, "Item": item, **condition})

    def _call(self, operation: str, body: dict[str, Any]) -> Any:
        return self._dynamo.call(operation, {"TableName": self._table, **body}, deadline=self._deadline())

    def _deadline(self) -> float:
        return self._dynamo.retry.clock() + PATIENCE


class LeasedRun:
    """What one drainer does with one shard while it has the lease. `first`: the first hour that may hold something."""

    def __init__(self, table: DelayedTable, shard: int, send: Send, stopping: Callable[[], bool], first: int) -> None:
        self._table = table
        self._shard = shard
        self._send = send
        self._stopping = stopping
        self._over = table.now() + TURN
        self._left = False
        self._broken: set[str] = set()
        self.first = first
        self.published = 0

    def run(self) -> float:
        """Move what may be moved; returns the seconds after which the shard may be looked at again."""
        closed = _hour(self._table.now() - LATE)  # before this hour nothing is put any more
        for hour in range(self.first, _hour(self._table.now()) + 1):
            for page in self._table.pages(hour, self._shard):
                for batch in _batches(page, self._table.now):
                    if self._is_over():
                        return 0.0
                    self._move(batch)
            if not self._left and hour < closed:
                self.first = hour + 1
            if self._is_over():
                return 0.0
        return LEASE if self._left else REST

    def _is_over(self) -> bool:
        return self._stopping() or self._table.now() >= self._over

    def _move(self, batch: list[DelayedMessage]) -> None:
        queue = batch[0].queue
        sent: Sequence[DelayedMessage] = []
        if queue not in self._broken:
            try:
                sent = self._send(batch)
            except Exception as error:
                event("due.kept", level=logging.ERROR, queue=queue, messages=len(batch), error=repr(error))
                self._broken.add(queue)
        if sent:
            self._table.delete(one.place for one in sent)
        self.published += len(sent)
        self._left = self._left or len(sent) < len(batch)


def _batches(page: list[dict[str, Any]], now: Callable[[], float]) -> Iterator[list[DelayedMessage]]:
    """Batches of one queue each, in order; the rest of the time is reckoned when its batch is asked for."""
    queues: dict[str, list[dict[str, Any]]] = {}
    for values in page:
        queues.setdefault(values["queue"], []).append(values)
    for items in queues.values():
        for start in range(0, len(items), MAX_ENTRIES):
            yield [_due(values, now()) for values in items[start : start + MAX_ENTRIES]]


def _due(values: dict[str, Any], now: float) -> DelayedMessage:
    due = values["due"] / 1000
    rest = min(MAX_DELAY, max(0, math.ceil(due - now)))
    return DelayedMessage(
        queue=values["queue"],
        body=values["body"],
        due=due,
        ident=values["ident"],
        group_id=values.get("group"),
        delay_seconds=None if is_fifo(values["queue"]) else rest,
        place=(values["pk"], values["sk"]),
    )


def _hour(moment: float) -> int:
    return int(moment // 3_600)


def _partition(hour: int, shard: int) -> str:
    return f"{time.strftime('%Y-%m-%dT%H', time.gmtime(hour * 3_600))}#{shard}"


def _check(queue: str, body: str, due: float, *, ident: str, group_id: str | None, now: float) -> None:
    if not _QUEUE.fullmatch(queue):
        raise InvalidRequest(field="queue", value=queue, expected="the name of an SQS queue")
    if group_id is not None and not _GROUP.fullmatch(group_id):
        raise InvalidRequest(field="group_id", value=group_id, expected="1-128 of ASCII letters, digits, punctuation")
    if not 1 <= len(ident) <= 1_000:
        raise InvalidRequest(field="ident", value=ident, expected="1-1000 characters")
    if not isinstance(due, int | float) or not now - MAX_BEHIND <= due <= now + MAX_AHEAD:  # NaN is not
        expected = f"Unix seconds from a day ago to ten years ahead; it is {now:.0f} now"
        raise InvalidRequest(field="due", value=due, expected=expected)
    try:
        size = len(body.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(field="body", value=body, expected=f"valid Unicode ({error.reason})") from error
    if not 1 <= size <= MAX_BODY:
        expected = f"1 to {MAX_BODY} bytes; larger ones belong in S3 (mdstore.queue.broker.claim_check)"
        raise InvalidRequest(field="body", value=f"{size} bytes", expected=expected)
