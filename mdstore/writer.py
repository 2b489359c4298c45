"""The worker's half of the way of the data: one lane, from its bytes in S3 to applied transactions and a summary.

    apply_lane
      fetch      ranged GET, digest, decode                                  payload
      pack       waves of transactions, the same for the same bytes          plan
      settle     each transaction, the transactions of a wave in parallel:
        propose    read what patches are based on, put large data in S3, build the actions
        send       TransactWriteItems(operations + receipt), the same bytes and token until AWS answers
        read       success | done by a former delivery | refused: take those out, propose the rest again
      count      outcomes from the receipts
      close      the lane's summary in the ledger                            ledger

A transaction is over when its receipt exists, whoever wrote it: see `docs/exactly-once.md`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mdstore.actions import Stamp, action, judge, merged
from mdstore.blobs import Blobs
from mdstore.dynamo.client import DynamoClient
from mdstore.dynamo.marshal import attribute_size, from_attribute, from_item, to_attribute
from mdstore.errors import RequestRejected, TransactionCancelled, Unavailable, Untrusted
from mdstore.ledger import LaneSummary, Ledger, Receipt, receipt_of
from mdstore.model import MAX_AGE, Counts, Indexed, Reason, Reference, Refusal, State
from mdstore.payload import Payloads
from mdstore.plan import MAX_TRANSACTION_BYTES, Transaction, pack, refusal
from mdstore.records import Records
from mdstore.settings import DAY
from mdstore.validation import Flaw, Validator

#: JSON text of this length cannot become an item over DynamoDB's 400 KB; only longer data is measured.
_SURELY_SMALL = 256 * 2**10
_MAX_INLINE = 390 * 2**10  # 400 KB less key, version and the other attributes
_MAX_TRANSACTION = 3_500_000  # of DynamoDB's 4 MB, counted in DynamoDB JSON, which is longer


@dataclass(kw_only=True, slots=True)
class _Job:
    """One run over one lane. `receipts` is filled once a former delivery has been noticed."""

    reference: Reference
    lane: int
    deadline: float
    receipts: dict[int, Receipt] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _Draft:
    """What one operation is about to do.

    `data` is new data, marshalled or as pointer; `based_on` the version that a patch was merged into; `over_tombstone`
    says that an insert has found one in its place.
    """

    item: Indexed
    data: Any = None
    based_on: int | None = None
    over_tombstone: bool = False


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
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="transaction")

    def apply_lane(self, reference: Reference, lane: int) -> LaneSummary:
        """Apply a lane, whatever a former delivery left of it, and write its summary.

        Raises `Untrusted` (dead-letter it), `Unavailable` (hand it back: what has a receipt is not done again) and
        `DeploymentBroken` (leave it in the queue).
        """
        started = self._clock()
        if started - self._payloads.header(reference).created_at > MAX_AGE + DAY / 2:
            raise Untrusted("the request is too old: its receipts may be gone, so it could be applied twice")
        job = _Job(reference=reference, lane=lane, deadline=self._monotonic() + self._budget)
        transactions: list[Transaction] = []
        receipts: list[Receipt] = []
        for wave in pack(self._payloads.lane(reference, lane)):
            self._check_budget(job)
            transactions += wave
            receipts += self._settle_wave(job, wave)
        summary = LaneSummary(
            lane=lane,
            state=State.COMPLETED,
            counts=count(transactions, receipts),
            started_at=started,
            finished_at=self._clock(),
        )
        self._ledger.close_lane(reference.request_id, summary)
        return summary

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

    def close(self) -> None:
        """Stop the threads; what runs is finished."""
        self._pool.shutdown()

    def _check_budget(self, job: _Job) -> None:
        if self._monotonic() > job.deadline:
            raise Unavailable(f"lane {job.lane} is not done within {self._budget} s", code="LaneBudget")

    def _settle_wave(self, job: _Job, wave: Sequence[Transaction]) -> list[Receipt]:
        if len(wave) == 1:
            return [self._settle(job, wave[0])]
        futures = [self._pool.submit(self._settle, job, transaction) for transaction in wave]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def _settle(self, job: _Job, transaction: Transaction) -> Receipt:
        """Bring one transaction to its receipt."""
        pending, refused = list(transaction.operations), list(transaction.refused)
        tombstones: set[int] = set()
        while True:
            former = job.receipts.get(transaction.number)
            if former is not None:
                return former
            drafts, found = self._propose(pending, tombstones)
            if not found:
                receipt = Receipt(number=transaction.number, refused=tuple(refused))
                former, found = self._send(job, drafts, receipt)
                if former is not None:
                    return former
                tombstones |= {draft.item.index for draft in drafts if draft.over_tombstone}
            pending, out = take_out(pending, found)
            refused += out

    # -- propose

    def _propose(self, pending: Sequence[Indexed], tombstones: Set[int]) -> tuple[list[_Draft], list[Refusal]]:
        """What each operation will write, or the refusals that are certain before anything is sent."""
        drafts = [_Draft(item=item, over_tombstone=item.index in tombstones) for item in pending]
        refused = self._base_patches([draft for draft in drafts if draft.item.operation.op == "patch"])
        if refused:
            return drafts, refused
        for draft in drafts:
            data = draft.item.operation.data if draft.data is None else draft.data
            if data is not None:
                draft.data = to_attribute(data)
        if _may_be_large(drafts):
            self._spill([draft for draft in drafts if draft.data is not None])
        return drafts, []

    def _base_patches(self, patches: Sequence[_Draft]) -> list[Refusal]:
        """Merge each patch into its record as it is now; the write is conditional on the version read here."""
        refused: list[Refusal] = []
        if not patches:
            return refused
        items = self._records.items((draft.item.operation.entity, draft.item.operation.key) for draft in patches)
        for draft in patches:
            operation = draft.item.operation
            old = items.get((operation.entity, operation.key))
            verdict = judge(operation, old)
            if verdict is not None or old is None:
                refused.append(refusal(draft.item, *(verdict or (Reason.MISSING, "there is no record"))))
                continue
            try:
                record = self._records.read(old)
                draft.data = merged(record.data, operation.data)
                draft.based_on = record.version
                self._validator.check_merged(operation, draft.data)
            except Flaw as flaw:
                refused.append(refusal(draft.item, flaw.reason, str(flaw)))
            except Untrusted as error:  # of this one record; the others of the lane are not to blame
                refused.append(refusal(draft.item, Reason.INVALID, f"the record cannot be read: {error}"))
        return refused

    def _spill(self, drafts: Sequence[_Draft]) -> None:
        """Keep in S3 what is over the item limit, and the largest of what is over the transaction's."""
        sizes = [(len(msgspec.json.encode(draft.data)), draft) for draft in drafts]
        total = sum(size for size, _ in sizes)
        for size, draft in sorted(sizes, key=lambda pair: -pair[0]):
            if total > _MAX_TRANSACTION or (size > _SURELY_SMALL and attribute_size(draft.data) > _MAX_INLINE):
                draft.data = self._blobs.put(from_attribute(draft.data))
                total -= size

    # -- send and read the answer

    def _send(self, job: _Job, drafts: Sequence[_Draft], receipt: Receipt) -> tuple[Receipt | None, list[Refusal]]:
        """Send; returns a former delivery's or the new receipt, or the operations to take out.

        Neither, when the same must be tried on what the records have become meanwhile.
        """
        reference = job.reference
        actions = self._actions(job, drafts, receipt.number)
        put = self._ledger.receipt_put(reference.request_id, job.lane, receipt)
        try:
            self._dynamo.transact([*actions, put], deadline=job.deadline)
        except TransactionCancelled as cancelled:
            former = cancelled.reasons[-1]
            if former.get("Code") == "ConditionalCheckFailed":
                return self._noticed_redelivery(job, receipt_of(from_item(former["Item"]))), []
            return None, self._read_reasons(job, drafts, cancelled)
        except RequestRejected as rejected:
            return None, self._isolate(job, drafts, actions, receipt.number, rejected)
        return receipt, []

    def _actions(self, job: _Job, drafts: Iterable[_Draft], number: int) -> list[dict[str, Any]]:
        now = self._clock()
        stamp = Stamp(
            table=self._table,
            updated_by=f"{job.reference.request_id}/{job.lane}/{number}",
            updated_at=round(now * 1000),
            tombstone_expires_at=int(now) + self._tombstone_seconds,
        )
        return [
            action(
                draft.item.operation, draft.data, stamp, based_on=draft.based_on, over_tombstone=draft.over_tombstone
            )
            for draft in drafts
        ]

    def _noticed_redelivery(self, job: _Job, former: Receipt) -> Receipt:
        """A former delivery was here: read all that it left at once, and not one cancelled transaction after the other."""
        if not job.receipts:
            job.receipts = self._ledger.receipts(job.reference.request_id, job.lane)
        return former

    def _read_reasons(self, job: _Job, drafts: Sequence[_Draft], cancelled: TransactionCancelled) -> list[Refusal]:
        found: list[Refusal] = []
        moved = False
        for draft, reason in zip(drafts, cancelled.reasons, strict=False):
            code = reason.get("Code")
            if code == "ConditionalCheckFailed":
                verdict = judge(draft.item.operation, reason.get("Item"))
                if verdict:
                    found.append(refusal(draft.item, *verdict))
                elif draft.based_on is not None:
                    moved = True
                elif draft.item.operation.op == "insert" and not draft.over_tombstone:
                    moved = draft.over_tombstone = True
            elif code == "ValidationError":
                found.append(_invalid(draft.item, str(reason.get("Message", code))))
        if not found and not moved:
            raise RequestRejected(str(cancelled), code="TransactionCanceled")
        self._check_budget(job)
        return found

    def _isolate(
        self,
        job: _Job,
        drafts: Sequence[_Draft],
        actions: Sequence[dict[str, Any]],
        number: int,
        rejected: RequestRejected,
    ) -> list[Refusal]:
        """Find the operations that DynamoDB calls malformed, where it names none: bisect with transactions that cannot pass."""
        found: list[Refusal] = []
        impossible = self._ledger.impossible(job.reference.request_id, job.lane, number)
        parts = [slice(0, len(drafts))]
        while parts:
            part = parts.pop()
            try:
                self._dynamo.transact([*actions[part], impossible], deadline=job.deadline)
            except TransactionCancelled:
                continue
            except RequestRejected as error:
                if part.stop - part.start == 1:
                    found.append(_invalid(drafts[part.start].item, str(error)))
                else:
                    middle = (part.start + part.stop) // 2
                    parts += [slice(middle, part.stop), slice(part.start, middle)]
        if not found:
            raise rejected
        return found


def _may_be_large(drafts: Sequence[_Draft]) -> bool:
    """Whether the limits of item or transaction can be reached at all; a patch says nothing of what it makes."""
    sizes = [draft.item.size for draft in drafts]
    return sum(sizes) > MAX_TRANSACTION_BYTES or any(
        draft.item.size > _SURELY_SMALL or draft.based_on is not None for draft in drafts
    )


def take_out(pending: Sequence[Indexed], found: Sequence[Refusal]) -> tuple[list[Indexed], list[Refusal]]:
    """Split `pending` into what goes on and the refusals: those `found`, and their groups' other operations."""
    refused = {one.index: one for one in found}
    groups = {item.operation.group for item in pending if item.index in refused} - {None}
    for item in pending:
        if item.operation.group in groups:
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
        applied.update(item.operation.op for item in transaction.operations if item.index not in refused)
    return Counts(applied=dict(sorted(applied.items())), refused=dict(sorted(reasons.items())))


def _invalid(item: Indexed, message: str) -> Refusal:
    reason = Reason.TOO_LARGE if "size" in message.lower() else Reason.INVALID
    return refusal(item, reason, f"DynamoDB: {message}")
