"""The worker's half of the way of the data: one lane, from its bytes in S3 to applied transactions and a summary.

    apply_lane
      fetch      ranged GET, digest, decode                                  payload
      pack       waves of transactions, the same for the same bytes          plan
      keep       data that no item can hold goes to S3                         blobs
      settle     each transaction, the transactions of a wave in parallel:
        propose    read what patches are based on, and merge them
        send       TransactWriteItems(operations + receipt), the same bytes and token until AWS answers
        read       success | done by a former delivery | refused: take those out, propose the rest again
      count      outcomes from the receipts
      close      the lane's summary in the ledger                            ledger

A transaction is over when its receipt exists, whoever wrote it: see `docs/exactly-once.md`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mdstore import exactjson
from mdstore.aws.blobs import Blob, Blobs
from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import from_attribute, from_item
from mdstore.aws.dynamodb.client import DynamoClient, transact
from mdstore.errors import IntegrityError, RequestRejected, TransactionCancelled, Unavailable
from mdstore.model import MAX_AGE, Counts, Reason, Reference, Refusal, State
from mdstore.settings import DAY
from mdstore.store.ledger import LaneSummary, Ledger, Receipt, RequestStatus, receipt_of
from mdstore.store.operations import OPERATIONS, Indexed, Needs, merged
from mdstore.store.packing import Transaction, pack, refusal
from mdstore.store.payload import Payloads
from mdstore.store.records import Records
from mdstore.store.validation import FieldError, Validator
from mdstore.store.writes import Data, WriteMetadata, build_write, explain_rejection

#: Of DynamoDB's 4 MB a transaction, in JSON, which is longer than what DynamoDB counts.
_MAX_BODY = 3_500_000
_UPLOADS = 8  # of large data to S3, at the same time
_encode = msgspec.json.Encoder().encode


@dataclass(kw_only=True, slots=True)
class _Job:
    """One run over one lane.

    `receipts` is filled once a former delivery has been noticed; `blobs` holds the data of this wave that is in S3.
    """

    reference: Reference
    lane: int
    deadline: float
    is_redelivery: bool = False
    receipts: dict[int, Receipt] = field(default_factory=dict)
    blobs: dict[int, Blob] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _Proposal:
    """What the pending operations of a transaction are about to do, where that is not what their lines say, by index.

    `data` is data that was merged, or put in S3; `based_on` the versions that patches were merged into; `tombstones` the
    inserts that have found a tombstone in their place.
    """

    operations: list[Indexed]
    tombstones: set[int]
    data: dict[int, Data] = field(default_factory=dict)
    based_on: dict[int, int] = field(default_factory=dict)

    def data_of(self, item: Indexed) -> Data:
        """What the record's data becomes."""
        return self.data.get(item.index) or item.attribute


class Writer:
    """Applies lanes. One per process; threads may share it."""

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
        self._monotonic = monotonic
        self._clock = clock
        self._in_flight = in_flight

    def apply_lane(self, reference: Reference, lane: int) -> LaneSummary:
        """Apply a lane, whatever a former delivery left of it, and write its summary.

        Raises `IntegrityError` (dead-letter it), `Unavailable` (hand it back: what has a receipt is not done again) and
        `DeploymentBroken` (leave it in the queue).
        """
        summary = self._apply(reference, lane)
        self._ledger.close_lane(reference.request_id, summary)
        return summary

    def apply_request(self, reference: Reference) -> RequestStatus:
        """Apply a request of one lane, or none, and complete it; raises as `apply_lane` does."""
        header = self._payloads.header(reference)
        return self._ledger.complete(
            reference,
            operations=header.operations,
            refused=header.refused_counts,
            lane=self._apply(reference, 0) if reference.lanes else None,
        )

    def _apply(self, reference: Reference, lane: int) -> LaneSummary:
        started = self._clock()
        if started - self._payloads.header(reference).created_at > MAX_AGE + DAY / 2:
            raise IntegrityError("the request is too old: its receipts may be gone, so it could be applied twice")
        job = _Job(reference=reference, lane=lane, deadline=self._monotonic() + self._budget)
        transactions: list[Transaction] = []
        receipts: list[Receipt] = []
        for wave in pack(self._payloads.lane(reference, lane)):
            self._check_budget(job)
            job.blobs = self._put_large(wave)
            transactions += wave
            receipts += self._dynamo.run(
                (self._run_transaction(job, transaction) for transaction in wave),
                in_flight=self._in_flight,
                deadline=job.deadline,
            )
        return LaneSummary(
            lane=lane,
            state=State.COMPLETED,
            counts=count(transactions, receipts),
            started_at=started,
            finished_at=self._clock(),
        )

    def give_up(self, reference: Reference, lane: int, error: str) -> LaneSummary:
        """Write a failed summary: what has a receipt is counted by it, all else is `failed`."""
        now = self._clock()
        operations = self._payloads.lane(reference, lane)
        receipts = self._ledger.receipts(reference.request_id, lane)
        settled = [transaction for wave in pack(operations) for transaction in wave if transaction.number in receipts]
        counts = count(settled, [receipts[transaction.number] for transaction in settled])
        counts = msgspec.structs.replace(counts, failed=len(operations) - counts.total)
        summary = LaneSummary(
            lane=lane, state=State.FAILED, counts=counts, started_at=now, finished_at=now, error=error[:500]
        )
        self._ledger.close_lane(reference.request_id, summary)
        return summary

    def _check_budget(self, job: _Job) -> None:
        if self._monotonic() > job.deadline:
            raise Unavailable(f"lane {job.lane} is not done within {self._budget} s", code="LaneBudget")

    def _run_transaction(self, job: _Job, transaction: Transaction) -> Task[Receipt]:
        """Task: bring one transaction to its receipt."""
        pending, refused = list(transaction.operations), list(transaction.refused)
        tombstones: set[int] = set()
        while True:
            former = job.receipts.get(transaction.number)
            if former is not None:
                return former
            proposal = _Proposal(operations=pending, tombstones=tombstones)
            found = yield from self._propose(job, proposal)
            if not found:
                receipt = Receipt(number=transaction.number, refused=tuple(refused))
                former, found = yield from self._send(job, proposal, receipt)
                if former is not None:
                    return former
            pending, out = take_out(pending, found)
            refused += out

    # -- propose

    def _put_large(self, wave: Sequence[Transaction]) -> dict[int, Blob]:
        """Put in S3 what no item can hold; returns the pointers by index."""
        operations = (item for transaction in wave for item in transaction.operations)
        large = [item for item in operations if item.data and not item.is_merged]
        if not large:
            return {}
        with ThreadPoolExecutor(_UPLOADS) as pool:
            blobs = pool.map(lambda item: self._blobs.put(bytes(item.data)), large)
            return {item.index: blob for item, blob in zip(large, blobs, strict=True)}

    def _propose(self, job: _Job, proposal: _Proposal) -> Task[list[Refusal]]:
        """Look at what cannot be sent as it stands; returns the refusals that are certain before anything is sent."""
        unready = [item for item in proposal.operations if item.data]
        if not unready:
            return []
        proposal.data = {item.index: job.blobs[item.index] for item in unready if not item.is_merged}
        return (yield from self._base_patches(proposal, [item for item in unready if item.is_merged]))

    def _base_patches(self, proposal: _Proposal, patches: Sequence[Indexed]) -> Task[list[Refusal]]:
        """Merge each patch into its record as it is now; the write is conditional on the version read here."""
        refused: list[Refusal] = []
        items = yield from self._records.items((item.entity, item.key) for item in patches)
        for item in patches:
            old = items.get((item.entity, item.key))
            rejection = explain_rejection(item, old)
            if rejection is not None or old is None:
                refused.append(refusal(item, *(rejection or (Reason.MISSING, "there is no record"))))
                continue
            try:
                record = self._records.read(old)
                data = merged(record.data, exactjson.loads(bytes(item.data)))
                attribute = self._validator.check_merged(item, data)
                proposal.data[item.index] = attribute or self._blobs.put(exactjson.dumps(data))
                proposal.based_on[item.index] = record.version
            except FieldError as flaw:
                refused.append(refusal(item, flaw.reason, str(flaw)))
            except IntegrityError as error:  # of this one record; the others of the lane are not to blame
                refused.append(refusal(item, Reason.INVALID, f"the record cannot be read: {error}"))
        return refused

    def _spill(self, proposal: _Proposal, excess: int) -> None:
        """Put the largest data of a transaction in S3, until it is `excess` bytes smaller."""
        texts = [(_encode(proposal.data_of(item)), item.index) for item in proposal.operations if item.size]
        for text, index in sorted(texts, key=lambda pair: -len(pair[0])):
            if excess > 0 and not isinstance(proposal.data.get(index), Blob):
                data = from_attribute(msgspec.json.decode(text))
                proposal.data[index] = self._blobs.put(exactjson.dumps(data))
                excess -= len(text)

    # -- send and read the answer

    def _send(self, job: _Job, proposal: _Proposal, receipt: Receipt) -> Task[tuple[Receipt | None, list[Refusal]]]:
        """Send; returns a former delivery's or the new receipt, or the operations to take out.

        Neither, when the same must be tried on what the records have become meanwhile.
        """
        put = self._ledger.receipt_put(job.reference.request_id, job.lane, receipt)
        actions = self._actions(job, proposal, receipt.number)
        body = _encode([*actions, put])
        if len(body) > _MAX_BODY:
            self._spill(proposal, len(body) - _MAX_BODY)
            actions = self._actions(job, proposal, receipt.number)
            body = _encode([*actions, put])
        try:
            yield transact(body)
        except TransactionCancelled as cancelled:
            former = cancelled.reasons[-1]
            if former.get("Code") == "ConditionalCheckFailed":
                return self._noticed_redelivery(job, receipt_of(from_item(former["Item"]))), []
            return None, self._read_reasons(job, proposal, cancelled)
        except RequestRejected as rejected:
            return None, (yield from self._isolate(job, proposal, actions, receipt.number, rejected))
        return receipt, []

    def _actions(self, job: _Job, proposal: _Proposal, number: int) -> list[dict[str, Any]]:
        now = self._clock()
        metadata = WriteMetadata(
            table=self._table,
            updated_by=f"{job.reference.request_id}/{job.lane}/{number}",
            updated_at=round(now * 1000),
            tombstone_expires_at=int(now) + self._tombstone_seconds,
        )
        return [
            build_write(
                item,
                proposal.data_of(item),
                metadata,
                based_on=proposal.based_on.get(item.index),
                over_tombstone=item.index in proposal.tombstones,
            )
            for item in proposal.operations
        ]

    def _noticed_redelivery(self, job: _Job, former: Receipt) -> Receipt:
        """A former delivery was here: read all that it left at once, and not one cancelled transaction after the other."""
        if not job.is_redelivery:
            job.is_redelivery = True
            job.receipts = self._ledger.receipts(job.reference.request_id, job.lane)
        return former

    def _read_reasons(self, job: _Job, proposal: _Proposal, cancelled: TransactionCancelled) -> list[Refusal]:
        found: list[Refusal] = []
        moved = False
        for item, reason in zip(proposal.operations, cancelled.reasons, strict=False):
            code = reason.get("Code")
            if code == "ConditionalCheckFailed":
                rejection = explain_rejection(item, reason.get("Item"))
                if rejection:
                    found.append(refusal(item, *rejection))
                elif item.is_merged:
                    moved = True
                elif OPERATIONS[item.op].needs is Needs.ABSENT and item.index not in proposal.tombstones:
                    moved = True
                    proposal.tombstones.add(item.index)
            elif code == "ValidationError":
                found.append(_invalid(item, str(reason.get("Message", code))))
        if not found and not moved:
            raise RequestRejected(str(cancelled), code="TransactionCanceled")
        self._check_budget(job)
        return found

    def _isolate(
        self,
        job: _Job,
        proposal: _Proposal,
        actions: Sequence[dict[str, Any]],
        number: int,
        rejected: RequestRejected,
    ) -> Task[list[Refusal]]:
        """Find the operations that DynamoDB calls malformed, where it names none: bisect with transactions that cannot pass."""
        found: list[Refusal] = []
        impossible = self._ledger.impossible(job.reference.request_id, job.lane, number)
        parts = [slice(0, len(actions))]
        while parts:
            part = parts.pop()
            try:
                yield transact(_encode([*actions[part], impossible]))
            except TransactionCancelled:
                continue
            except RequestRejected as error:
                if part.stop - part.start == 1:
                    found.append(_invalid(proposal.operations[part.start], str(error)))
                else:
                    middle = (part.start + part.stop) // 2
                    parts += [slice(middle, part.stop), slice(part.start, middle)]
        if not found:
            raise rejected
        return found


def take_out(pending: Sequence[Indexed], found: Sequence[Refusal]) -> tuple[list[Indexed], list[Refusal]]:
    """Split `pending` into what goes on and the refusals: those `found`, and their groups' other operations."""
    refused = {one.index: one for one in found}
    groups = {item.group for item in pending if item.index in refused} - {None}
    for item in pending:
        if item.group in groups:
            refused.setdefault(
                item.index, refusal(item, Reason.GROUP_REFUSED, "another operation of the group was refused")
            )
    return [item for item in pending if item.index not in refused], list(refused.values())


def count(transactions: Sequence[Transaction], receipts: Sequence[Receipt]) -> Counts:
    """Count the outcomes of settled transactions from their receipts: what is not refused was applied."""
    applied: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for transaction, receipt in zip(transactions, receipts, strict=True):
        refused = {one.index for one in receipt.refused}
        reasons.update(str(one.reason) for one in receipt.refused)
        applied.update([item.op for item in transaction.operations if item.index not in refused])
    return Counts(applied=dict(sorted(applied.items())), refused=dict(sorted(reasons.items())))


def _invalid(item: Indexed, message: str) -> Refusal:
    reason = Reason.TOO_LARGE if "size" in message.lower() else Reason.INVALID
    return refusal(item, reason, f"DynamoDB: {message}")
