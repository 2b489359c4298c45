"""The ledger table: request states, lane summaries and receipts. Only this module changes a state; see `docs/states.md`.

    pk = {request_id}          sk = request        state, counts, payload reference, times
    pk = {request_id}          sk = lane#00042     the summary of lane 42
    pk = {request_id}#00042    sk = tx#00007       receipt of transaction 7 of lane 42: its operations that were refused
    pk = {batch_id}            sk = batch          the message of a batch was sent

The reference of a request in a batch names the batch, which is its `request_id` there. So are the keys of the batch's lane
summary and receipts.

The receipts of each lane have their own partition, because one partition takes 1,000 write units per second. Every item has
`expires_at`, which DynamoDB's TTL uses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import Item, from_item, to_item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.dynamodb.updates import expressions, given, placeholders, unless_set
from mdstore.aws.json_protocol import encode
from mdstore.errors import ConditionFailed, NotFound, Unavailable
from mdstore.log import event
from mdstore.model import BatchedRequest, Counts, Reference, State
from mdstore.settings import DAY
from mdstore.store.ledger_items import (
    LaneSummary,
    Receipt,
    RequestStatus,
    counted_values,
    counts_value,
    lane_of,
    milliseconds,
    receipt_key,
    receipt_of,
    request_of,
    request_values,
)

T = TypeVar("T")


class Ledger:
    """Reads and writes the ledger table."""

    def __init__(
        self, *, dynamo: DynamoClient, table: str, retention_days: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._dynamo = dynamo
        self._table = table
        self._retention = retention_days * DAY
        self._clock = clock

    # -- requests

    def run(self, tasks: Iterable[Task[T]], *, in_flight: int = 1) -> list[T]:
        """Run tasks of the ledger side by side, with up to `in_flight` calls at the same time."""
        return self._dynamo.run(tasks, in_flight=in_flight)

    def outcomes(self, tasks: Iterable[Task[T]], *, in_flight: int) -> list[T | Exception]:
        """Run tasks as `run` does, but let each end on its own: return its result or its error."""
        return self._dynamo.outcomes(tasks, in_flight=in_flight)

    def note_task(
        self,
        request_id: str,
        reference: Reference,
        *,
        content: str,
        operations: int,
        refused: Mapping[str, int],
        is_follow_up: bool = False,
        replaces: str = "",
    ) -> Task[RequestStatus | None]:
        """Task: make the transition (none) -> accepted, and return None. If the id is taken, return its request instead.

        If the id is taken by the same request in the batch `replaces`, which is void, replace that note.
        """
        condition, arguments = "attribute_not_exists(pk)", {}
        if replaces:
            condition += " OR (#state = :accepted AND #reference.#request_id = :batch)"
            arguments = {"accepted": State.ACCEPTED, "batch": replaces}
        values = {
            "pk": request_id,
            "sk": "request",
            "state": State.ACCEPTED,
            "content": content,
            **request_values(reference, operations, refused),
            **({"is_follow_up": True} if is_follow_up else {}),
            "accepted_at": milliseconds(self._clock()),
            "expires_at": self.expires_at(),
        }
        body = _put_body(self._table, values, condition, arguments)
        failed = yield from self._dynamo.put_if_task({**body, "ReturnValuesOnConditionCheckFailure": "ALL_OLD"})
        if failed is None:
            return None
        item = failed.item
        if item is None:  # not every endpoint returns it
            item = (yield "GetItem", encode(self._get_body(request_id, "request"))).get("Item")
        if item is None:
            raise Unavailable(f"the note of request {request_id!r} vanished while it was read", code="NoteVanished")
        found = request_of(from_item(item))
        if found.is_batched and found.reference.request_id == reference.request_id:
            return None  # an earlier attempt of this call, whose answer was lost
        return found

    def withdraw(self, request_id: str, content: str) -> None:
        """Delete the note of a request that cannot be accepted after all, because its id has another payload."""
        body = {
            "TableName": self._table,
            "Key": to_item({"pk": request_id, "sk": "request"}),
            **expressions(condition="#state = :accepted AND #content = :content"),
            "ExpressionAttributeValues": to_item(placeholders({"accepted": State.ACCEPTED, "content": content})),
        }
        with suppress(ConditionFailed):
            self._dynamo.call("DeleteItem", body)

    def correct(self, reference: Reference) -> None:
        """Replace the reference of an accepted request: its payload was stored before, by another call."""
        self._update(
            reference.request_id,
            always={"reference": msgspec.to_builtins(reference)},
            condition="#state = :accepted",
            arguments={"accepted": State.ACCEPTED},
        )

    def record_sent(self, batch_id: str) -> None:
        """Record that the message of a batch was sent, so that repeats of its requests need not send it again."""
        self._put_unless({"pk": batch_id, "sk": "batch", "expires_at": self.expires_at()}, "attribute_exists(pk)")

    def was_sent(self, batch_id: str) -> bool:
        """Return whether the message of a batch is known to have been sent."""
        return self._get(batch_id, "batch") is not None

    def start(
        self, reference: Reference, *, operations: int, refused: Mapping[str, int], by: str = ""
    ) -> RequestStatus:
        """Make the transition accepted or failed -> running; also from (none), if the producer's record is late or lost.

        `by` is the id of the task that starts the request.
        """
        now = milliseconds(self._clock())
        defaults = {
            **counted_values(operations, refused),
            "accepted_at": now,
            "expires_at": self.expires_at(),
        }
        changed = self._update(
            reference.request_id,
            always={
                "state": State.RUNNING,
                "started_at": now,
                "started_by": by,
                "reference": msgspec.to_builtins(reference),
            },
            defaults=defaults,
            removed=("error", "finished_at"),
            condition="attribute_not_exists(pk) OR #state IN (:accepted, :failed)",
            arguments={"accepted": State.ACCEPTED, "failed": State.FAILED},
        )
        if changed:
            event("request.started", request_id=reference.request_id, operations=operations, lanes=reference.lanes)
        return changed or self.get(reference.request_id)

    def reopen(self, request: RequestStatus) -> bool:
        """Make the transition to accepted. `request`, as read before, is abandoned, and the caller is about to send it again.

        Return False if another process was faster: it sends the request again, or a worker has continued it.
        """
        before = {"state_before": request.state, "times": request.sent_again}
        times = (
            "#sent_again = :times"
            if request.sent_again
            else "(attribute_not_exists(#sent_again) OR #sent_again = :times)"
        )
        changed = self._update(
            request.request_id,
            always={
                "state": State.ACCEPTED,
                "sent_at": milliseconds(self._clock()),
                "sent_again": request.sent_again + 1,
            },
            removed=("counts", "error", "finished_at"),
            condition=f"#state = :state_before AND {times}",
            arguments=before,
        )
        if changed:
            event("request.reopened", request_id=request.request_id, times=changed.sent_again)
        return changed is not None

    def complete(
        self, reference: Reference, *, operations: int, refused: Mapping[str, int], lane: LaneSummary | None
    ) -> RequestStatus:
        """Make the transition to completed in one write, from any other state or none, for a request of at most one lane."""
        task = self.complete_task(reference, operations=operations, refused=refused, lane=lane)
        (status,) = self._dynamo.run([task])
        return status

    def complete_task(
        self, reference: Reference, *, operations: int, refused: Mapping[str, int], lane: LaneSummary | None
    ) -> Task[RequestStatus]:
        """Task: do what `complete` does."""
        early = Counts(refused=dict(refused))
        started, finished = (lane.started_at, lane.finished_at) if lane else (self._clock(), self._clock())
        update = self._update_body(
            reference.request_id,
            always={
                "state": State.COMPLETED,
                "started_at": milliseconds(started),
                "finished_at": milliseconds(finished),
                "counts": counts_value(lane.counts + early if lane else early),
                "reference": msgspec.to_builtins(reference),  # the note's may be of a payload that was never stored
            },
            defaults={
                **counted_values(operations, refused),
                "accepted_at": milliseconds(started),
                "expires_at": self.expires_at(),
            },
            removed=("error",),
            condition="attribute_not_exists(pk) OR #state <> :completed",
            arguments={"completed": State.COMPLETED},
        )
        item = yield from self._dynamo.update_if_task(update)
        if item is None:
            found = yield "GetItem", encode(self._get_body(reference.request_id, "request"))
            return request_of(from_item(found["Item"]))
        completed = request_of(from_item(item))
        _log_end(completed.request_id, completed.state, completed.counts)
        return completed

    def end_batch(
        self, reference: Reference, requests: Sequence[BatchedRequest], summaries: Sequence[LaneSummary]
    ) -> Iterator[Task[bool]]:
        """Yield a task for each request of a batch: it makes the transition to the state of the request's summary.

        As with other requests, a completed one stays completed, and a failed one may be completed later.
        """
        for request, summary in zip(requests, summaries, strict=True):
            yield self._end_batched(reference, request, summary)

    def _end_batched(self, reference: Reference, request: BatchedRequest, summary: LaneSummary) -> Task[bool]:
        always: dict[str, Any] = {
            "state": summary.state,
            "started_at": milliseconds(summary.started_at),
            "finished_at": milliseconds(summary.finished_at),
            "counts": counts_value(summary.counts),
            "reference": msgspec.to_builtins(reference),
        }
        if summary.error:
            always["error"] = summary.error
        defaults = {
            "content": request.content,
            **counted_values(request.operations, request.refused_counts),
            "accepted_at": milliseconds(summary.started_at),
            "expires_at": self.expires_at(),
        }
        body = self._update_body(
            request.request_id,
            always=always,
            defaults=defaults,
            removed=() if summary.error else ("error",),
            # The request may have been noted for another batch since, if this one came too late.
            condition="attribute_not_exists(pk) OR (#state <> :completed AND #reference.#request_id = :batch)",
            arguments={"completed": State.COMPLETED, "batch": reference.request_id},
        )
        has_ended = (yield from self._dynamo.update_if_task(body, return_values="NONE")) is not None
        if has_ended:
            _log_end(request.request_id, summary.state, summary.counts)
        return has_ended

    def record_turn(self, request_id: str) -> None:
        """Record that a lane has had its turn and is about to be sent again, which is a sign of work. The state stays."""
        self._update(
            request_id,
            always={"sent_at": milliseconds(self._clock())},
            condition="attribute_exists(pk) AND #state <> :completed",
            arguments={"completed": State.COMPLETED},
        )

    def finish(self, request_id: str) -> RequestStatus:
        """Make the transition to completed or failed, once every lane has its summary. Leave a completed request unchanged."""
        request, summaries = self._request_and_lanes(request_id)
        if len(summaries) < request.lanes or request.state is State.COMPLETED:
            return request
        errors = [f"lane {lane.lane}: {lane.error}" for lane in summaries if lane.state is State.FAILED]
        values = {
            "state": State.FAILED if errors else State.COMPLETED,
            "finished_at": milliseconds(self._clock()),
            "counts": counts_value(sum((lane.counts for lane in summaries), start=request.early)),
            "error": "; ".join(errors)[:1000],
        }
        changed = self._update(
            request_id, always=values, condition="#state <> :completed", arguments={"completed": State.COMPLETED}
        )
        if changed:
            _log_end(changed.request_id, changed.state, changed.counts)
        return changed or self.get(request_id)

    def fail(self, request_id: str, error: str) -> None:
        """Make the transition to failed from any state but completed. Lanes that are delivered again may still complete it."""
        request, lanes = self._request_and_lanes(request_id)
        values = {
            "state": State.FAILED,
            "finished_at": milliseconds(self._clock()),
            "counts": counts_value(sum((lane.counts for lane in lanes), start=request.early)),
            "error": error[:1000],
        }
        changed = self._update(
            request_id, always=values, condition="#state <> :completed", arguments={"completed": State.COMPLETED}
        )
        if changed:
            _log_end(changed.request_id, changed.state, changed.counts)

    def get(self, request_id: str) -> RequestStatus:
        """Read one request, strongly consistent. Raises `NotFound`."""
        item = self._get(request_id, "request")
        if item is None:
            raise NotFound("request", request_id)
        return request_of(item)

    def get_many(self, request_ids: Sequence[str]) -> dict[str, RequestStatus]:
        """Read several requests, strongly consistent, 100 per call. Unknown ones are left out."""
        items = self._get_all({"pk": request_id, "sk": "request"} for request_id in request_ids)
        return {item["pk"]: request_of(item) for item in items}

    def progress(self, request_id: str) -> RequestStatus:
        """Read one request, with counts of the lanes that have a summary so far. Raises `NotFound`."""
        request, lanes = self._request_and_lanes(request_id)
        if request.state is State.COMPLETED or request.is_batched:
            return request
        return msgspec.structs.replace(request, counts=sum((lane.counts for lane in lanes), start=request.early))

    def _request_and_lanes(self, request_id: str) -> tuple[RequestStatus, list[LaneSummary]]:
        items = {item["sk"]: item for item in self._query(request_id)}
        if "request" not in items:
            raise NotFound("request", request_id)
        request = request_of(items.pop("request"))
        lanes = [lane_of(item) for item in items.values()]
        active_at = max([request.active_at, *(lane.finished_at for lane in lanes)])
        return msgspec.structs.replace(request, active_at=active_at), lanes

    # -- lanes

    def close_lane(self, request_id: str, summary: LaneSummary) -> None:
        """Write a lane's summary. It replaces a failed one, when the lane has run again, but never a completed one."""
        values = {
            "pk": request_id,
            "sk": _lane_key(summary.lane),
            "state": summary.state,
            "counts": counts_value(summary.counts),
            "started_at": milliseconds(summary.started_at),
            "finished_at": milliseconds(summary.finished_at),
            "error": summary.error or None,
            "expires_at": self.expires_at(),
        }
        is_new = self._put_unless(
            values, "attribute_exists(pk) AND #state = :completed", {"completed": State.COMPLETED}
        )
        if is_new:
            level = logging.INFO if summary.state is State.COMPLETED else logging.ERROR
            took = milliseconds(summary.finished_at - summary.started_at)
            event(
                f"lane.{summary.state}",
                level=level,
                request_id=request_id,
                lane=summary.lane,
                operations=summary.counts.total,
                ms=took,
            )

    def lane(self, request_id: str, number: int) -> LaneSummary | None:
        """Read the summary of one lane; None if it has none yet."""
        item = self._get(request_id, _lane_key(number))
        return lane_of(item) if item else None

    def lanes(self, request_id: str) -> list[LaneSummary]:
        """Read the summaries written so far, in the order of the lanes."""
        return self._request_and_lanes(request_id)[1]

    # -- receipts

    def receipt_put(self, request_id: str, lane: int, receipt: Receipt) -> dict[str, Any]:
        """Build the action that writes a receipt in its transaction, and cancels the transaction if the receipt exists."""
        item = to_item(
            {
                **receipt_key(request_id, lane, receipt.number),
                "refused": [msgspec.to_builtins(refusal) for refusal in receipt.refused] or None,
                "expires_at": self.expires_at(),
            }
        )
        return {
            "Put": {
                "TableName": self._table,
                "Item": item,
                "ConditionExpression": "attribute_not_exists(pk)",
                "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
            }
        }

    def failing_check(self, request_id: str, lane: int, number: int) -> dict[str, Any]:
        """Build an action whose condition never holds: DynamoDB validates a transaction that has it, then cancels it."""
        return {
            "ConditionCheck": {
                "TableName": self._table,
                "Key": to_item(receipt_key(request_id, lane, number)),
                "ConditionExpression": "attribute_exists(pk) AND attribute_not_exists(pk)",
            }
        }

    def receipts(self, request_id: str, lane: int) -> dict[int, Receipt]:
        """Read the receipts of a lane, by transaction number."""
        (found,) = self._dynamo.run([self.receipts_task(request_id, lane)])
        return found

    def receipts_task(self, request_id: str, lane: int) -> Task[dict[int, Receipt]]:
        """Task: do what `receipts` does."""
        items = yield from self._dynamo.query_task(self._query_body(f"{request_id}#{lane:05d}"))
        return _receipts(map(from_item, items))

    def some_receipts(self, request_id: str, lane: int, numbers: Iterable[int]) -> dict[int, Receipt]:
        """Read those receipts of a lane that exist, of the transactions `numbers`."""
        return _receipts(self._get_all(receipt_key(request_id, lane, number) for number in numbers))

    def expires_at(self) -> int:
        """Return the time at which an item written now expires, in Unix seconds."""
        return int(self._clock() + self._retention)

    # -- calls

    def _update(self, request_id: str, **changes: Any) -> RequestStatus | None:
        """Update a request's item if `condition` holds. Return None if not: another process has changed it, which is normal."""
        item = self._dynamo.update_if(self._update_body(request_id, **changes))
        return None if item is None else request_of(from_item(item))

    def _update_body(
        self,
        request_id: str,
        *,
        always: Mapping[str, Any],
        condition: str,
        arguments: Mapping[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
        removed: Collection[str] = (),
    ) -> dict[str, Any]:
        return {
            "TableName": self._table,
            "Key": to_item({"pk": request_id, "sk": "request"}),
            **expressions(set=given(always) | unless_set(defaults), remove=removed, condition=condition),
            "ExpressionAttributeValues": to_item(placeholders({**always, **defaults, **arguments})),
        }

    def _put_unless(
        self, values: Mapping[str, Any], condition: str, arguments: Mapping[str, Any] = MappingProxyType({})
    ) -> bool:
        return self._dynamo.put_if(_put_body(self._table, values, f"NOT ({condition})", arguments))

    def _get(self, pk: str, sk: str) -> dict[str, Any] | None:
        item: Item | None = self._dynamo.call("GetItem", self._get_body(pk, sk)).get("Item")
        return from_item(item) if item else None

    def _get_body(self, pk: str, sk: str) -> dict[str, Any]:
        return {"TableName": self._table, "Key": to_item({"pk": pk, "sk": sk}), "ConsistentRead": True}

    def _get_all(self, keys: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        (items,) = self._dynamo.run([self._dynamo.batch_get(self._table, [to_item(key) for key in keys])])
        return map(from_item, items)

    def _query(self, pk: str) -> Iterator[dict[str, Any]]:
        for page in self._dynamo.pages("Query", self._query_body(pk)):
            yield from map(from_item, page)

    def _query_body(self, pk: str) -> dict[str, Any]:
        return {
            "TableName": self._table,
            "KeyConditionExpression": "pk = :pk",
            "ExpressionAttributeValues": to_item({":pk": pk}),
            "ConsistentRead": True,
        }


def _lane_key(number: int) -> str:
    return f"lane#{number:05d}"


def _receipts(items: Iterable[Mapping[str, Any]]) -> dict[int, Receipt]:
    return {receipt.number: receipt for receipt in map(receipt_of, items)}


def _log_end(request_id: str, state: State, counts: Counts) -> None:
    event(
        f"request.{state}",
        level=logging.INFO if state is State.COMPLETED else logging.ERROR,
        request_id=request_id,
        applied=sum(counts.applied.values()),
        refused=sum(counts.refused.values()),
        failed=counts.failed,
    )


def _put_body(table: str, values: Mapping[str, Any], condition: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    body = {"TableName": table, "Item": to_item(values), **expressions(condition=condition)}
    if arguments:
        body["ExpressionAttributeValues"] = to_item(placeholders(arguments))
    return body
