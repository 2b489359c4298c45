"""The write path at the worker: it applies one lane of a request, from the lane's bytes in S3 to its summary in the ledger.

Each line names a step, the function that does it, and what it does:

    apply_lane
      fetch      Payloads.lane         read the lane with a ranged GET, check its digest, decode its operations
      pack       pack                  pack the operations into waves of transactions; equal bytes give equal transactions
      upload     _upload_large_data    for each wave: put data that is too large for an item in S3
      apply      _apply_transaction    for each transaction, in parallel with the others of its wave:
        prepare    _prepare              read the records that patches apply to, and merge the patches (_merge_patches)
        send       _send                 call TransactWriteItems(operations + receipt): same bytes and token until AWS answers
        read       _send                 learn whether it applied, now or before, or what was refused (see below)
      count      count                 count the outcomes from the receipts
      close      Ledger.close_lane     write the lane's summary to the ledger

If an earlier delivery applied the transaction, `_load_earlier_receipts` reads what that delivery did. If DynamoDB refused
operations, `_read_reasons` reads why; if it rejected the call without naming an operation, `_find_malformed` finds it by
bisection. `remove_refused` then removes them and their groups, and the remaining operations are prepared and sent again.

A transaction is done when its receipt exists, whichever delivery wrote it: see `docs/exactly-once.md`.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.aws.blobs import Blob, Blobs
from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import from_attribute, from_item
from mdstore.aws.dynamodb.client import DynamoClient, transact
from mdstore.errors import IntegrityError, LaneUnfinished, RequestRejected, TransactionCancelled, Unavailable
from mdstore.model import MAX_AGE, BatchedRequest, Counts, Reason, Reference, Refusal, State
from mdstore.settings import DAY
from mdstore.store.batch import MAX_OPERATIONS, counts_by_request
from mdstore.store.folding import Fold, folds_of
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import LaneSummary, Receipt, RequestStatus, receipt_of
from mdstore.store.operations import OPERATIONS, Indexed, Needs, merged
from mdstore.store.packing import Transaction, pack, refusal
from mdstore.store.payload import Header, OpenPayload, Payloads
from mdstore.store.records import Records
from mdstore.store.validation import FieldError, Validator
from mdstore.store.writes import (
    Data,
    WriteMetadata,
    build_folded_write,
    build_write,
    explain_rejection,
    explain_rejections,
)

#: Bytes of JSON in one call. DynamoDB allows 4 MB per transaction, and counts fewer bytes than the JSON has.
_MAX_BODY = 3_500_000
_UPLOADS = 8  # concurrent uploads of large data to S3
#: The most bytes of JSON and waves of a request that is applied side by side with others.
_SMALL_JSON, _SMALL_WAVES = 2**20, 4
_COMPLETIONS = 100  # requests of a batch that are completed at the same time
_encode = msgspec.json.Encoder().encode


@dataclass(kw_only=True, slots=True)
class _LaneRun:
    """The state of one run of a lane.

    `receipts` is empty until the run meets a receipt of an earlier delivery; then it holds all of them. `blobs` maps operation
    indexes to the large data of the current wave, which is in S3.
    """

    reference: Reference
    lane: int
    deadline: float
    is_redelivery: bool = False
    requests: tuple[BatchedRequest, ...] = ()
    receipts: dict[int, Receipt] = field(default_factory=dict)
    blobs: dict[int, Blob] = field(default_factory=dict)

    def request_of(self, item: Indexed) -> str:
        """Return the id of the request that an operation belongs to."""
        if not self.requests:
            return self.reference.request_id
        number = bisect_right(self.requests, item.index, key=lambda request: request.first) - 1
        return self.requests[number].request_id


@dataclass(kw_only=True, slots=True)
class _AppliedLane:
    """A lane that was applied: its transactions, and the receipt of each."""

    lane: int
    transactions: list[Transaction]
    receipts: list[Receipt]
    started_at: float
    finished_at: float

    @property
    def summary(self) -> LaneSummary:
        """Return the lane's summary for the ledger."""
        return LaneSummary(
            lane=self.lane,
            state=State.COMPLETED,
            counts=count(self.transactions, self.receipts),
            started_at=self.started_at,
            finished_at=self.finished_at,
        )


@dataclass(kw_only=True, slots=True)
class _PreparedWrites:
    """The pending operations of a transaction, and the values to write that an operation's line does not contain.

    `written` has the last operation of each action: the action of a fold applies all of it (see `store.folding`). By the index
    of that operation, `folds` holds the folds, `data` the data that was merged or moved to S3, `based_on` the record versions
    that patches were merged into, and `tombstones` the inserts for which an attempt found a tombstone.
    """

    operations: list[Indexed]
    written: list[Indexed]
    tombstones: set[int]
    folds: dict[int, Fold] = field(default_factory=dict)
    data: dict[int, Data] = field(default_factory=dict)
    based_on: dict[int, int] = field(default_factory=dict)

    def data_of(self, item: Indexed) -> Data:
        """Return the data to write."""
        return self.data.get(item.index) or item.attribute


class Writer:
    """Applies lanes. A process needs one; threads may share it."""

    def __init__(
        self,
        *,
        payloads: Payloads,
        records: Records,
        blobs: Blobs,
        ledger: Ledger,
        dynamo: DynamoClient,
        validator: Validator,
        table: str,
        tombstone_seconds: int,
        in_flight: int,
        budget: float,
        turn: float,
        turn_waves: int,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._payloads = payloads
        self._records = records
        self._blobs = blobs
        self._ledger = ledger
        self._dynamo = dynamo
        self._validator = validator
        self._table = table
        self._tombstone_seconds = tombstone_seconds
        self._budget = budget
        self._turn = turn
        self._turn_waves = turn_waves
        self._monotonic = monotonic
        self._clock = clock
        self._in_flight = in_flight

    def apply_lane(self, reference: Reference, lane: int, *, had_turns: bool = False) -> LaneSummary:
        """Apply a lane, or what an earlier delivery left of it, and write its summary.

        `had_turns` means that waves of the lane may be applied already: then the first incomplete one is looked up.

        Raises `LaneUnfinished` (its turn is over: send the message again, for the other waves), `IntegrityError` (dead-letter
        the message), `Unavailable` (return the message to the queue: transactions with a receipt are not applied again) or
        `DeploymentBroken` (leave the message in the queue).
        """
        summary = self._apply(reference, lane, had_turns).summary
        self._ledger.close_lane(reference.request_id, summary)
        return summary

    def apply_request(self, reference: Reference, *, had_turns: bool = False) -> RequestStatus:
        """Apply a request of at most one lane and complete it, as `apply_lane` does, and with its errors."""
        header = self._payloads.header(reference)
        if header.requests:
            return self._apply_batch(reference, header, had_turns)
        return self._ledger.complete(
            reference,
            operations=header.operations,
            refused=header.refused_counts,
            lane=self._apply(reference, 0, had_turns).summary if reference.lanes else None,
        )

    def _apply_batch(self, reference: Reference, header: Header, had_turns: bool) -> RequestStatus:
        """Apply a batch and complete each of its requests with counts of its own. Return the state of the batch as a whole."""
        started = self._clock()
        transactions: list[Transaction] = []
        receipts: dict[int, Receipt] = {}
        if reference.lanes:
            applied = self._apply(reference, 0, had_turns)
            transactions, receipts = applied.transactions, {receipt.number: receipt for receipt in applied.receipts}
        counts = counts_by_request(header, transactions, receipts)
        self._end_batch(reference, header, counts, started_at=started)
        return RequestStatus(
            request_id=reference.request_id,
            state=State.COMPLETED,
            source=reference.source,
            operations=header.operations,
            lanes=reference.lanes,
            reference=reference,
            early=Counts(),
            counts=sum(counts, start=Counts()),
            accepted_at=float(header.created_at),
            started_at=started,
            finished_at=self._clock(),
        )

    def fail_batch(self, reference: Reference, error: str) -> None:
        """Record that the requests of a batch failed. Operations whose transactions applied are counted by their receipts."""
        header = self._payloads.header(reference)
        transactions: list[Transaction] = []
        receipts: dict[int, Receipt] = {}
        if reference.lanes:
            with suppress(IntegrityError, MemoryError):  # then the operations count as failed
                transactions = _transactions(pack(self._payloads.lane(reference, 0), reference.v))
                self.give_up(reference, 0, error)
            receipts = self._ledger.receipts(reference.request_id, 0)
        counts = counts_by_request(header, transactions, receipts)
        self._end_batch(reference, header, counts, started_at=self._clock(), error=error)

    def _end_batch(
        self, reference: Reference, header: Header, counts: Sequence[Counts], *, started_at: float, error: str = ""
    ) -> None:
        state, now = State.FAILED if error else State.COMPLETED, self._clock()
        summaries = [
            LaneSummary(lane=0, state=state, counts=one, started_at=started_at, finished_at=now, error=error[:1_000])
            for one in counts
        ]
        self._ledger.run(self._ledger.end_batch(reference, header.requests, summaries), in_flight=_COMPLETIONS)

    def apply_small_task(self, payload: OpenPayload) -> Task[RequestStatus | None]:
        """Task: apply a small request as `apply_request` does, one call after the other, and complete it.

        Return None, and change nothing, if the request is not small: it has more than one lane, 100 operations, 1 MiB of JSON
        or 4 waves, its first read does not hold its lane, or the payload is a batch. Raises the errors of `apply_lane`, except
        `LaneUnfinished`.
        """
        reference, header = payload.reference, payload.header
        if not is_small_payload(payload):
            return None
        summary = None
        if header.lanes:
            started = self._begin(header)
            waves = pack((yield from self._payloads.lane_task(payload, 0)), reference.v)
            if len(waves) > _SMALL_WAVES:
                return None
            run = _LaneRun(reference=reference, lane=0, deadline=self._monotonic() + self._budget)
            receipts: list[Receipt] = []
            for wave in waves:
                self._check_budget(run)
                run.blobs = {}
                for item in _large(wave):
                    run.blobs[item.index] = yield from self._blobs.put_task(bytes(item.data))
                for transaction in wave:
                    receipt = yield from self._apply_transaction(run, transaction)
                    receipts.append(receipt)
            summary = self._applied(0, started, waves, receipts).summary
        return (
            yield from self._ledger.complete_task(
                reference, operations=header.operations, refused=header.refused_counts, lane=summary
            )
        )

    def _begin(self, header: Header) -> float:
        """Return the time at which a lane starts."""
        started = self._clock()
        if started - header.created_at > MAX_AGE + DAY / 2:
            raise IntegrityError("the request is too old: its receipts may be gone, so it could be applied twice")
        return started

    def _apply(self, reference: Reference, lane: int, had_turns: bool) -> _AppliedLane:
        header = self._payloads.header(reference)
        started = self._begin(header)
        run = _LaneRun(
            reference=reference, lane=lane, deadline=self._monotonic() + self._budget, requests=header.requests
        )
        waves = pack(self._payloads.lane(reference, lane), reference.v)
        first = self._find_first_wave(run, waves) if had_turns else 0
        receipts: list[Receipt] = []
        turn_ends = self._monotonic() + self._turn
        for number, wave in enumerate(waves[first:]):
            if number and (number >= self._turn_waves or self._monotonic() > turn_ends):
                self._ledger.record_turn(reference.request_id)
                raise LaneUnfinished(f"lane {lane}: {first + number} of {len(waves)} waves are applied")
            self._check_budget(run)
            run.blobs = self._upload_large_data(run, wave)
            receipts += self._dynamo.run(
                (self._apply_transaction(run, transaction) for transaction in wave),
                in_flight=self._in_flight,
                deadline=run.deadline,
            )
        if first:
            earlier = self._ledger.receipts(reference.request_id, lane)
            receipts = [earlier[transaction.number] for wave in waves[:first] for transaction in wave] + receipts
        return self._applied(lane, started, waves, receipts)

    def _applied(
        self, lane: int, started: float, waves: Sequence[Sequence[Transaction]], receipts: list[Receipt]
    ) -> _AppliedLane:
        return _AppliedLane(
            lane=lane,
            transactions=_transactions(waves),
            receipts=receipts,
            started_at=started,
            finished_at=self._clock(),
        )

    def _find_first_wave(self, run: _LaneRun, waves: Sequence[Sequence[Transaction]]) -> int:
        """Return the number of the first wave that is not applied as a whole, and read its receipts.

        A wave begins when the one before it is applied, so a binary search finds the last one that has begun, with few reads.
        """

        def receipts_of(transactions: Sequence[Transaction]) -> dict[int, Receipt]:
            numbers = [transaction.number for transaction in transactions]
            return self._ledger.some_receipts(run.reference.request_id, run.lane, numbers)

        begun = bisect_left(waves, True, key=lambda wave: not receipts_of(wave[:1]))
        if not begun:
            return 0
        run.is_redelivery, run.receipts = True, receipts_of(waves[begun - 1])
        return begun - (len(run.receipts) < len(waves[begun - 1]))

    def give_up(self, reference: Reference, lane: int, error: str) -> LaneSummary:
        """Write a `failed` summary: operations of transactions with a receipt are counted by it, all others as `failed`."""
        now = self._clock()
        operations = self._payloads.lane(reference, lane)
        receipts = self._ledger.receipts(reference.request_id, lane)
        done = [
            transaction
            for wave in pack(operations, reference.v)
            for transaction in wave
            if transaction.number in receipts
        ]
        counts = count(done, [receipts[transaction.number] for transaction in done])
        counts = msgspec.structs.replace(counts, failed=len(operations) - counts.total)
        summary = LaneSummary(
            lane=lane, state=State.FAILED, counts=counts, started_at=now, finished_at=now, error=error[:500]
        )
        self._ledger.close_lane(reference.request_id, summary)
        return summary

    def _check_budget(self, run: _LaneRun) -> None:
        if self._monotonic() > run.deadline:
            raise Unavailable(f"lane {run.lane} was not applied within {self._budget} s", code="LaneBudget")

    def _apply_transaction(self, run: _LaneRun, transaction: Transaction) -> Task[Receipt]:
        """Task: apply one transaction and return its receipt."""
        pending, refused = list(transaction.operations), list(transaction.refused)
        tombstones: set[int] = set()
        while True:
            existing = run.receipts.get(transaction.number)
            if existing is not None:
                return existing
            prepared = _PreparedWrites(operations=pending, written=pending, tombstones=tombstones)
            if transaction.is_folded:
                folds = folds_of(pending)
                prepared.written = [fold[-1] for fold in folds]
                prepared.folds = {fold[-1].index: fold for fold in folds if len(fold) > 1}
            refusals = yield from self._prepare(run, prepared)
            if not refusals:
                receipt = Receipt(number=transaction.number, refused=tuple(refused))
                existing, refusals = yield from self._send(run, prepared, receipt)
                if existing is not None:
                    return existing
            pending, removed = remove_refused(pending, refusals)
            refused += removed

    # -- prepare

    def _upload_large_data(self, run: _LaneRun, wave: Sequence[Transaction]) -> dict[int, Blob]:
        """Put data that is too large for an item in S3, and return the pointers by operation index."""
        large = _large(wave)
        if not large:
            return {}
        blobs = self._dynamo.run(
            (self._blobs.put_task(bytes(item.data)) for item in large), in_flight=_UPLOADS, deadline=run.deadline
        )
        return {item.index: blob for item, blob in zip(large, blobs, strict=True)}

    def _prepare(self, run: _LaneRun, prepared: _PreparedWrites) -> Task[list[Refusal]]:
        """Task: prepare the operations whose line holds plain JSON; return the refusals that are certain before sending."""
        with_json = [item for item in prepared.operations if item.data]
        if not with_json:
            return []
        prepared.data = {item.index: run.blobs[item.index] for item in with_json if not item.is_merged}
        return (yield from self._merge_patches(prepared, [item for item in with_json if item.is_merged]))

    def _merge_patches(self, prepared: _PreparedWrites, patches: Sequence[Indexed]) -> Task[list[Refusal]]:
        """Task: merge each patch into its current record; the write will require the version that was read here."""
        refused: list[Refusal] = []
        items = yield from self._records.items((item.entity, item.key) for item in patches)
        for item in patches:
            old = items.get((item.entity, item.key))
            rejection = explain_rejection(item, old)
            if rejection is not None or old is None:
                refused.append(refusal(item, *(rejection or (Reason.MISSING, "there is no record"))))
                continue
            try:
                record = yield from self._records.read_task(old)
                data = merged(record.data, exactjson.loads(bytes(item.data)))
                data, attribute = self._validator.read_merged(item.entity, data)
                prepared.data[item.index] = attribute or (yield from self._blobs.put_task(exactjson.dumps(data)))
                prepared.based_on[item.index] = record.version
            except FieldError as error:
                refused.append(refusal(item, error.reason, str(error)))
            except IntegrityError as error:  # only this record is unreadable; the rest of the lane can apply
                refused.append(refusal(item, Reason.INVALID, f"the record cannot be read: {error}"))
        return refused

    def _move_largest_to_s3(self, prepared: _PreparedWrites, excess: int) -> Task[None]:
        """Task: move the largest data values of a transaction to S3, until its body is `excess` bytes smaller."""
        texts = [(_encode(prepared.data_of(item)), item.index) for item in prepared.written if item.size]
        for text, index in sorted(texts, key=lambda pair: -len(pair[0])):
            if excess > 0 and not isinstance(prepared.data.get(index), Blob):
                data = from_attribute(msgspec.json.decode(text))
                prepared.data[index] = yield from self._blobs.put_task(exactjson.dumps(data))
                excess -= len(text)

    # -- send, and read the response

    def _send(
        self, run: _LaneRun, prepared: _PreparedWrites, receipt: Receipt
    ) -> Task[tuple[Receipt | None, list[Refusal]]]:
        """Task: send a transaction; return `(its receipt, [])` once it applied, whether now or in an earlier delivery.

        Otherwise return `(None, refusals)`. With no refusals, a record has changed since it was read, so the caller must
        prepare and send the same operations again.
        """
        put = self._ledger.receipt_put(run.reference.request_id, run.lane, receipt)
        actions = self._actions(run, prepared, receipt.number)
        body = _encode([*actions, put])
        if len(body) > _MAX_BODY:
            yield from self._move_largest_to_s3(prepared, len(body) - _MAX_BODY)
            actions = self._actions(run, prepared, receipt.number)
            body = _encode([*actions, put])
        try:
            yield transact(body)
        except TransactionCancelled as cancelled:
            receipt_reason = cancelled.reasons[-1]
            if receipt_reason.get("Code") == "ConditionalCheckFailed":
                existing = receipt_of(from_item(receipt_reason["Item"]))
                return (yield from self._load_earlier_receipts(run, existing)), []
            return None, self._read_reasons(run, prepared, cancelled)
        except RequestRejected as rejected:
            return None, (yield from self._find_malformed(run, prepared, actions, receipt.number, rejected))
        return receipt, []

    def _actions(self, run: _LaneRun, prepared: _PreparedWrites, number: int) -> list[dict[str, Any]]:
        now = self._clock()

        @cache
        def metadata_of(request_id: str) -> WriteMetadata:
            return WriteMetadata(
                table=self._table,
                updated_by=f"{request_id}/{run.lane}/{number}",
                updated_at=round(now * 1000),
                tombstone_expires_at=int(now) + self._tombstone_seconds,
            )

        request_of = run.request_of
        folds = prepared.folds
        return [
            build_folded_write(folds[item.index], prepared.data_of(item), metadata_of(request_of(item)))
            if folds and item.index in folds
            else build_write(
                item,
                prepared.data_of(item),
                metadata_of(request_of(item)),
                based_on=prepared.based_on.get(item.index),
                over_tombstone=item.index in prepared.tombstones,
            )
            for item in prepared.written
        ]

    def _load_earlier_receipts(self, run: _LaneRun, existing: Receipt) -> Task[Receipt]:
        """Task: read all receipts of the lane at the first existing one. Otherwise each would cost a cancelled transaction."""
        if not run.is_redelivery:
            run.is_redelivery = True
            run.receipts = yield from self._ledger.receipts_task(run.reference.request_id, run.lane)
        return existing

    def _read_reasons(self, run: _LaneRun, prepared: _PreparedWrites, cancelled: TransactionCancelled) -> list[Refusal]:
        """Return the refused operations, or none if only a record has changed, so that a new attempt may succeed."""
        refusals: list[Refusal] = []
        changed = False
        for item, reason in zip(prepared.written, cancelled.reasons, strict=False):
            code = reason.get("Code")
            if code == "ConditionalCheckFailed":
                rejected = explain_rejections(prepared.folds.get(item.index, [item]), reason.get("Item"))
                if rejected:
                    refusals += [refusal(*one) for one in rejected]
                elif item.is_merged:
                    changed = True
                elif OPERATIONS[item.op].needs is Needs.ABSENT and item.index not in prepared.tombstones:
                    changed = True
                    prepared.tombstones.add(item.index)
            elif code == "ValidationError":
                refusals.append(_invalid(item, str(reason.get("Message", code))))
        if not refusals and not changed:
            raise RequestRejected(str(cancelled), code="TransactionCanceled")
        self._check_budget(run)
        return refusals

    def _find_malformed(
        self,
        run: _LaneRun,
        prepared: _PreparedWrites,
        actions: Sequence[dict[str, Any]],
        number: int,
        rejected: RequestRejected,
    ) -> Task[list[Refusal]]:
        """Task: find the malformed operations where DynamoDB names none, by bisecting with transactions that never apply."""
        refusals: list[Refusal] = []
        failing_check = self._ledger.failing_check(run.reference.request_id, run.lane, number)
        parts = [slice(0, len(actions))]
        while parts:
            part = parts.pop()
            try:
                yield transact(_encode([*actions[part], failing_check]))
            except TransactionCancelled:
                continue
            except RequestRejected as error:
                if part.stop - part.start == 1:
                    refusals.append(_invalid(prepared.written[part.start], str(error)))
                else:
                    middle = (part.start + part.stop) // 2
                    parts += [slice(middle, part.stop), slice(part.start, middle)]
        if not refusals:
            raise rejected
        return refusals


def remove_refused(pending: Sequence[Indexed], refusals: Sequence[Refusal]) -> tuple[list[Indexed], list[Refusal]]:
    """Return the operations that remain, and all refusals: the given ones, and those of their groups' other operations."""
    refused = {one.index: one for one in refusals}
    groups = {item.group for item in pending if item.index in refused} - {None}
    for item in pending:
        if item.group in groups:
            refused.setdefault(
                item.index, refusal(item, Reason.GROUP_REFUSED, "another operation of the group was refused")
            )
    return [item for item in pending if item.index not in refused], list(refused.values())


def _transactions(waves: Sequence[Sequence[Transaction]]) -> list[Transaction]:
    return [transaction for wave in waves for transaction in wave]


def count(transactions: Sequence[Transaction], receipts: Sequence[Receipt]) -> Counts:
    """Count the outcomes of applied transactions: each operation that its receipt does not refuse was applied."""
    applied: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for transaction, receipt in zip(transactions, receipts, strict=True):
        refused = {one.index for one in receipt.refused}
        reasons.update(str(one.reason) for one in receipt.refused)
        applied.update([item.op for item in transaction.operations if item.index not in refused])
    return Counts(applied=dict(sorted(applied.items())), refused=dict(sorted(reasons.items())))


def is_small_payload(payload: OpenPayload) -> bool:
    """Return whether a payload holds one small request (see `Writer.apply_small_task`), as far as its header tells."""
    header = payload.header
    return (
        not header.requests
        and header.operations <= MAX_OPERATIONS
        and (
            not header.lanes
            or (len(header.lanes) == 1 and header.lanes[0].raw <= _SMALL_JSON and payload.holds(header.lanes[0]))
        )
    )


def _large(wave: Sequence[Transaction]) -> list[Indexed]:
    """Return the operations of a wave whose data is too large for an item."""
    operations = (item for transaction in wave for item in transaction.operations)
    return [item for item in operations if item.data and not item.is_merged]


def _invalid(item: Indexed, message: str) -> Refusal:
    reason = Reason.TOO_LARGE if "size" in message.lower() else Reason.INVALID
    return refusal(item, reason, f"DynamoDB: {message}")
