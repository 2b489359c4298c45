"""The data store's core over in-memory tables and objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mdstore.aws.blobs import Blobs
from mdstore.aws.dynamodb.attributes import from_item
from mdstore.model import Counts, Operation, Reason, Reference
from mdstore.settings import Settings
from mdstore.store.entities import Entities
from mdstore.store.ledger import Ledger
from mdstore.store.payload import Payloads
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.records import Records
from mdstore.store.validation import Validator
from mdstore.store.writer import Writer
from tests.unit.fakes import MemoryDynamo, MemoryObjects


class Bench:
    """Holds the data store's core over in-memory tables and objects, and applies lanes with it."""

    def __init__(self, dynamo: MemoryDynamo | None = None) -> None:
        self.dynamo = dynamo or MemoryDynamo()
        self.objects = MemoryObjects()
        self.now = 1_000.0
        self.turn, self.turn_waves = 1_000, 1_000_000
        self.settings = Settings(lane_operations=100_000)
        self.validator = Validator(entities=Entities(), max_record_bytes=2**20)
        self.payloads = Payloads(objects=self.objects, prefix="payloads/", max_lane_bytes=2**26)
        self.blobs = Blobs(objects=self.objects, prefix="blobs/", max_bytes=2**26)
        self.records = Records(dynamo=self.dynamo, table="records", blobs=self.blobs)
        self.ledger = Ledger(dynamo=self.dynamo, table="ledger", retention_days=15, clock=lambda: self.now)

    def writer(self) -> Writer:
        """Return a new writer, as another worker would have it."""
        return Writer(
            payloads=self.payloads,
            records=self.records,
            blobs=self.blobs,
            ledger=self.ledger,
            dynamo=self.dynamo,
            validator=self.validator,
            table="records",
            tombstone_seconds=60,
            in_flight=1,
            budget=30,
            turn=self.turn,
            turn_waves=self.turn_waves,
            monotonic=lambda: self.now,
            clock=lambda: self.now,
        )

    def request(self, operations: Sequence[Operation], request_id: str = "r1") -> Reference:
        """Store a request's payload, and return the reference to it."""
        builder = PayloadBuilder(validator=self.validator, settings=self.settings)
        for operation in operations:
            assert builder.add(operation) is None
        encoded = builder.encode(request_id, "shop")
        builder.close()
        with encoded.body:
            return self.payloads.put(encoded)[0]

    def apply(self, operations: Sequence[Operation], request_id: str = "r1") -> Counts:
        """Apply the only lane of a request, and return its counts."""
        return self.writer().apply_lane(self.request(operations, request_id), 0).counts

    def refused(self, request_id: str = "r1") -> dict[int, tuple[Reason, str]]:
        """Return the reason and the detail of each refusal in the receipts, by the operation's index."""
        receipts = self.ledger.receipts(request_id, 0).values()
        return {one.index: (one.reason, one.detail) for receipt in receipts for one in receipt.refused}

    def data(self, key: str) -> Any:
        return self.records.get("e", key).data

    def snapshot(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Return all records and receipts. Leave out lane summaries and expiry times, which differ between runs."""
        return {
            place: {name: value for name, value in from_item(item).items() if name != "expires_at"}
            for place, item in self.dynamo.items.items()
            if not place[2].startswith("lane#")
        }
