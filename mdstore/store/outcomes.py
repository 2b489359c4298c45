"""The outcome of each operation of a request, read page by page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from mdstore.errors import IntegrityError, InvalidRequest
from mdstore.model import Outcome, Reference, Refusal, State
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.operations import Indexed
from mdstore.store.packing import pack
from mdstore.store.payload import Payloads

Only = Literal["applied", "refused", "failed"]
_PARTS = 20  # the most parts per page: each has to be read from S3 and packed


class Outcomes:
    """Reads the outcomes of operations from the payload and the receipts of their request."""

    def __init__(self, *, payloads: Payloads, ledger: Ledger) -> None:
        self._payloads = payloads
        self._ledger = ledger

    def page(
        self, request: RequestStatus, *, only: Only | None = None, limit: int = 1_000, cursor: str | None = None
    ) -> tuple[list[Outcome], str | None]:
        """Return up to `limit` outcomes in the order of the lanes, and the cursor of the next page (None at the end).

        A cursor is `part:position`. Part 0 holds the operations that were refused before the request was published; part n is
        lane n-1. Operations that have no outcome yet are left out, so the pages of a running request grow. A page ends after
        20 parts even if it is not full, because with `only` most parts may be empty.
        """
        part, position = _parsed(cursor)
        last = min(part + _PARTS - 1, request.lanes)
        found: list[Outcome] = []
        while part <= last:
            outcomes = [one for one in self.part(request, part) if only in (None, one.outcome)]
            room = limit - len(found)
            found += outcomes[position : position + room]
            if position + room < len(outcomes):
                return found, f"{part}:{position + room}"
            part, position = part + 1, 0
            if len(found) == limit:
                break
        return found, f"{part}:0" if part <= request.lanes else None

    def all(self, request: RequestStatus, *, only: Only | None = None) -> Iterator[Outcome]:
        """Yield all outcomes, in the order of the lanes."""
        for part in range(request.lanes + 1):
            yield from (one for one in self.part(request, part) if only in (None, one.outcome))

    def part(self, request: RequestStatus, part: int) -> list[Outcome]:
        """Return the outcomes of part 0 (refused before the request was published) or of lane `part` - 1."""
        reference = self._payloads.resolved(request.reference)
        outcomes = self._part(reference, part, is_failed=request.state is State.FAILED)
        if not request.is_batched:
            return outcomes
        own = self._payloads.header(reference).batched(request.request_id)
        if own is None:
            raise IntegrityError(f"{reference.payload!r} does not hold request {request.request_id!r}")
        return [msgspec.structs.replace(one, index=one.index - own.first) for one in outcomes if own.has(one.index)]

    def _part(self, reference: Reference, part: int, *, is_failed: bool) -> list[Outcome]:
        if part == 0:
            return [_refused(refusal) for refusal in self._payloads.refused(reference)]
        lane = part - 1
        if lane >= reference.lanes:  # all operations of a batch were refused before it was published
            return []
        receipts = self._ledger.receipts(reference.request_id, lane)
        lane_failed = is_failed and self._has_failed(reference.request_id, lane)
        outcomes: list[Outcome] = []
        for wave in pack(self._payloads.lane(reference, lane), reference.v):
            for transaction in wave:
                receipt = receipts.get(transaction.number)
                if receipt is None:
                    if lane_failed:
                        outcomes += [_outcome(item, "failed") for item in transaction.operations]
                        outcomes += [_failed(one) for one in transaction.refused]
                    continue
                refused = {one.index: one for one in receipt.refused}
                outcomes += [
                    _refused(refused[item.index]) if item.index in refused else _outcome(item, "applied")
                    for item in transaction.operations
                ]
                outcomes += [_refused(one) for one in transaction.refused]
        return sorted(outcomes, key=lambda one: one.index)

    def _has_failed(self, request_id: str, lane: int) -> bool:
        summary = self._ledger.lane(request_id, lane)
        return summary is not None and summary.state is State.FAILED


def _outcome(item: Indexed, outcome: Only) -> Outcome:
    return Outcome(index=item.index, outcome=outcome, op=item.op, entity=item.entity, key=item.key)


def _failed(refusal: Refusal) -> Outcome:
    return Outcome(index=refusal.index, outcome="failed", op=refusal.op, entity=refusal.entity, key=refusal.key)


def _refused(refusal: Refusal) -> Outcome:
    values: dict[str, Any] = msgspec.structs.asdict(refusal)
    return Outcome(outcome="refused", **{**values, "reason": str(refusal.reason)})


def _parsed(cursor: str | None) -> tuple[int, int]:
    if not cursor:
        return 0, 0
    part, _, position = cursor.partition(":")
    if not (part.isascii() and part.isdigit() and position.isascii() and position.isdigit() and len(cursor) < 20):
        raise InvalidRequest(field="cursor", value=cursor, expected="the cursor of an earlier page")
    return int(part), int(position)
