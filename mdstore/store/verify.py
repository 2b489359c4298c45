"""Verification: checks that a request's effects equal its inputs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from mdstore import exactjson
from mdstore.aws.dynamodb.attributes import from_attribute
from mdstore.errors import IntegrityError
from mdstore.model import Outcome, State
from mdstore.store.entities import Entities
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import RequestStatus
from mdstore.store.operations import OPERATIONS, Effect, Indexed, Needs, effect_on
from mdstore.store.outcomes import Outcomes
from mdstore.store.packing import pack
from mdstore.store.payload import Payloads
from mdstore.store.records import Record, Records


@dataclass(kw_only=True)
class Verification:
    """The result of a verification. `superseded` counts effects that a later request replaced; `faults` describes errors.

    `same_models` is False if the request was checked against other models than those of this process. They decide what a patch
    makes of a record, so faults may come from the difference.
    """

    request_id: str
    operations: int = 0
    applied: int = 0
    refused: int = 0
    superseded: int = 0
    same_models: bool = True
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0

    def fault(self, text: str) -> None:
        """Record a fault. Only the first 100 texts are kept."""
        self.fault_count += 1
        if self.fault_count <= 100:
            self.faults.append(text)

    @property
    def ok(self) -> bool:
        """Return whether every operation has one outcome and the right effect."""
        return self.fault_count == 0


class Verifier:
    """Compares the payload, the receipts and the records of a request."""

    def __init__(self, *, payloads: Payloads, ledger: Ledger, records: Records, entities: Entities) -> None:
        self._payloads = payloads
        self._outcomes = Outcomes(payloads=payloads, ledger=ledger)
        self._records = records
        self._entities = entities

    def verify(self, request: RequestStatus) -> Verification:
        """Check that each operation has one outcome, that the counts agree, and that the records show each effect."""
        found = Verification(request_id=request.request_id)
        if request.state is not State.COMPLETED:
            found.fault(
                f"the request is {request.state}: {request.counts.total} of {request.operations} operations have an outcome"
            )
            return found
        seen = bytearray(request.operations)  # 1 at the index of each operation that has an outcome
        try:
            found.same_models = self._entities.matches(self._payloads.header(request.reference).models)
            for part in range(request.lanes + 1):
                outcomes = self._outcomes.part(request, part)
                self._count(found, outcomes, seen)
                if part:
                    self._verify_effects(found, request, part - 1, outcomes)
        except IntegrityError as error:
            found.fault(str(error))
        if missing := seen.count(0):
            found.fault(f"{missing} of {request.operations} operations have no outcome")
        counts = (sum(request.counts.applied.values()), sum(request.counts.refused.values()))
        if counts != (found.applied, found.refused):
            found.fault(
                f"the ledger counts {counts} applied and refused, the receipts {(found.applied, found.refused)}"
            )
        return found

    def _count(self, found: Verification, outcomes: list[Outcome], seen: bytearray) -> None:
        for one in outcomes:
            if not 0 <= one.index < len(seen):
                found.fault(f"operation {one.index} has an outcome, but the request has {len(seen)} operations")
                continue
            if seen[one.index]:
                found.fault(f"operation {one.index} has two outcomes")
            seen[one.index] = 1
            found.operations += 1
            found.applied += one.outcome == "applied"
            found.refused += one.outcome == "refused"

    def _verify_effects(self, found: Verification, request: RequestStatus, lane: int, outcomes: list[Outcome]) -> None:
        own = self._payloads.header(request.reference).batched(request.request_id)
        first = own.first if own else 0
        applied = {first + one.index for one in outcomes if one.outcome == "applied"}
        writers: dict[tuple[str, str], str] = {}
        changes: dict[tuple[str, str], list[Indexed]] = defaultdict(list)
        for wave in pack(self._payloads.lane(request.reference, lane), request.reference.v):
            for transaction in wave:
                writer = f"{request.request_id}/{lane}/{transaction.number}"
                for item in transaction.operations:
                    if item.index in applied and OPERATIONS[item.op].writes:
                        writers[item.entity, item.key] = writer
                        changes[item.entity, item.key].append(item)
        records = self._records.look_up(writers)
        for key, writer in writers.items():
            self._verify_effect(found, records.get(key), writer, changes[key], first)

    def _verify_effect(
        self, found: Verification, record: Record | None, writer: str, changes: list[Indexed], first: int
    ) -> None:
        item = changes[-1]
        name = f"operation {item.index - first} ({item.op} {item.entity}/{item.key})"
        if record is None:
            found.fault(f"{name}: the record has vanished")
        elif record.updated_by != writer:
            if record.updated_by.rsplit("/", 2)[0] == writer.rsplit("/", 2)[0]:
                found.fault(f"{name}: the record was last written by {record.updated_by}, not {writer}")
            else:
                found.superseded += 1
        elif not self._is_effect(changes, record):
            found.fault(f"{name}: the record's data does not match the request's operations on it")

    def _is_effect(self, changes: list[Indexed], record: Record) -> bool:
        """Return whether `record`, which the last of `changes` wrote, has the data that the changes produce.

        If the record's version shows that only `changes` ever wrote it, apply them in order and compare the result. Otherwise
        another request may have written between them, so apply only the last change to the record: it must change nothing. That
        holds for a patch too, because merging the same patch twice changes nothing.
        """
        last = changes[-1]
        if not (OPERATIONS[changes[0].op].needs is Needs.ABSENT and record.version == len(changes)):
            changes = [last]
        if OPERATIONS[last.op].effect is Effect.REMOVE:
            return record.deleted
        if last.sequence is not None and record.sequence != last.sequence:
            return False
        data = record.data
        for item in changes:
            data = effect_on(data, item.op, _data(item))
            if item.is_merged:
                data, _ = self._entities.validated(record.entity, data)
        return exactjson.canonical(record.data) == exactjson.canonical(data)


def _data(item: Indexed) -> Any:
    if item.data:
        return exactjson.loads(bytes(item.data))
    return from_attribute(exactjson.loads(bytes(item.attribute))) if item.attribute else None
