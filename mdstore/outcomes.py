"""Outcomes looked up by page, and the proof that a request's effects equal its inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mdstore import exactjson
from mdstore.actions import merged
from mdstore.dynamo.marshal import from_attribute
from mdstore.errors import InvalidRequest, Untrusted
from mdstore.ledger import Ledger, Request
from mdstore.model import Indexed, Outcome, Refusal, State
from mdstore.payload import Payloads
from mdstore.plan import pack
from mdstore.records import Record, Records

Only = Literal["applied", "refused", "failed"]
_PARTS = 20  # of a page at most: each is read from S3 and planned


class Outcomes:
    """Reads payloads and receipts of a request and tells what became of each operation."""

    def __init__(self, *, payloads: Payloads, ledger: Ledger) -> None:
        self._payloads = payloads
        self._ledger = ledger

    def page(
        self, request: Request, *, only: Only | None = None, limit: int = 1_000, cursor: str | None = None
    ) -> tuple[list[Outcome], str | None]:
        """Up to `limit` outcomes in the order of the lanes, and the cursor of the next page (None at the end).

        The refusals made before anything was sent come first. A cursor is `part:position`; part 0 are those refusals,
        part n is lane n-1. An operation without outcome as yet is left out, so a running request's pages grow. A page ends
        after 20 parts, full or not: with `only`, most parts may have nothing to show.
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

    def all(self, request: Request, *, only: Only | None = None) -> Iterator[Outcome]:
        """Every outcome there is, in the order of the lanes."""
        for part in range(request.lanes + 1):
            yield from (one for one in self.part(request, part) if only in (None, one.outcome))

    def part(self, request: Request, part: int) -> list[Outcome]:
        """The outcomes of part 0 (refused before anything was sent) or of lane `part` - 1."""
        if part == 0:
            return [_refused(refusal) for refusal in self._payloads.refused(request.reference)]
        lane = part - 1
        receipts = self._ledger.receipts(request.request_id, lane)
        gave_up = request.state is State.FAILED and self._gave_up(request.request_id, lane)
        outcomes: list[Outcome] = []
        for wave in pack(self._payloads.lane(request.reference, lane)):
            for transaction in wave:
                receipt = receipts.get(transaction.number)
                if receipt is None:
                    if gave_up:
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

    def _gave_up(self, request_id: str, lane: int) -> bool:
        summary = self._ledger.lane(request_id, lane)
        return summary is not None and summary.state is State.FAILED


@dataclass(kw_only=True)
class Verification:
    """What `verify` found. `superseded` are effects that a later request has replaced; `faults` name what is wrong."""

    request_id: str
    operations: int = 0
    applied: int = 0
    refused: int = 0
    superseded: int = 0
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0

    def fault(self, text: str) -> None:
        """Note something wrong; the first hundred are kept."""
        self.fault_count += 1
        if self.fault_count <= 100:
            self.faults.append(text)

    @property
    def ok(self) -> bool:
        """Whether every operation has its outcome and its effect."""
        return self.fault_count == 0


class Verifier:
    """Compares a request's payload, receipts and records."""

    def __init__(self, *, payloads: Payloads, ledger: Ledger, records: Records) -> None:
        self._payloads = payloads
        self._outcomes = Outcomes(payloads=payloads, ledger=ledger)
        self._records = records

    def verify(self, request: Request) -> Verification:
        """Check that each operation has one outcome, that the counts agree, and that each effect is there."""
        found = Verification(request_id=request.request_id)
        if request.state is not State.COMPLETED:
            found.fault(
                f"the request is {request.state}: {request.counts.total} of {request.operations} operations have an outcome"
            )
            return found
        seen: set[int] = set()
        try:
            for part in range(request.lanes + 1):
                outcomes = self._outcomes.part(request, part)
                self._count(found, outcomes, seen)
                if part:
                    self._verify_effects(found, request, part - 1, outcomes)
        except Untrusted as error:
            found.fault(str(error))
        if seen != set(range(request.operations)):
            found.fault(f"{request.operations - len(seen)} of {request.operations} operations have no outcome")
        counts = (sum(request.counts.applied.values()), sum(request.counts.refused.values()))
        if counts != (found.applied, found.refused):
            found.fault(
                f"the ledger counts {counts} applied and refused, the receipts {(found.applied, found.refused)}"
            )
        return found

    def _count(self, found: Verification, outcomes: list[Outcome], seen: set[int]) -> None:
        for one in outcomes:
            if one.index in seen:
                found.fault(f"operation {one.index} has two outcomes")
            seen.add(one.index)
            found.operations += 1
            found.applied += one.outcome == "applied"
            found.refused += one.outcome == "refused"

    def _verify_effects(self, found: Verification, request: Request, lane: int, outcomes: list[Outcome]) -> None:
        applied = {one.index for one in outcomes if one.outcome == "applied"}
        writers: dict[tuple[str, str], str] = {}
        changes: dict[tuple[str, str], list[Indexed]] = defaultdict(list)
        for wave in pack(self._payloads.lane(request.reference, lane)):
            for transaction in wave:
                writer = f"{request.request_id}/{lane}/{transaction.number}"
                for item in transaction.operations:
                    if item.index in applied and item.op != "check":
                        writers[item.entity, item.key] = writer
                        changes[item.entity, item.key].append(item)
        records = self._records.look_up(writers)
        for key, writer in writers.items():
            self._verify_effect(found, records.get(key), writer, changes[key])

    def _verify_effect(self, found: Verification, record: Record | None, writer: str, changes: list[Indexed]) -> None:
        item = changes[-1]
        name = f"operation {item.index} ({item.op} {item.entity}/{item.key})"
        if record is None:
            found.fault(f"{name}: the record has vanished")
        elif record.updated_by != writer:
            if record.updated_by.rsplit("/", 2)[0] == writer.rsplit("/", 2)[0]:
                found.fault(f"{name}: the record was last written by {record.updated_by}, not {writer}")
            else:
                found.superseded += 1
        elif not _is_effect(changes, record):
            found.fault(f"{name}: the record's data is not what the request's operations on it make of it")


def _is_effect(changes: list[Indexed], record: Record) -> bool:
    """Whether `record`, last written by the last of `changes`, is what they make, one after the other.

    Where its version tells that they are all that ever wrote it, that is all of its data. Else another request may have come
    between them, and the last one counts: a patch that was made on data that is not known changes nothing when made again.
    """
    last = changes[-1]
    if not (changes[0].op == "insert" and record.version == len(changes)):
        changes = [last]
    if last.op == "delete":
        return record.deleted
    if last.sequence is not None and record.sequence != last.sequence:
        return False
    data = record.data
    for item in changes:
        if item.op == "patch":
            data = merged(data, _data(item))
        elif item.op != "delete":
            data = _data(item)
    return exactjson.canonical(record.data) == exactjson.canonical(data)


def _data(item: Indexed) -> Any:
    return exactjson.loads(bytes(item.data)) if item.data else from_attribute(exactjson.loads(bytes(item.attribute)))


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
        raise InvalidRequest(field="cursor", value=cursor, expected="a cursor of a former page")
    return int(part), int(position)
