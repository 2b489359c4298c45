"""A test bench: the project's actions, receipts and writer over one target, with their own entity and request id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from mdstore.aws.blobs import Blobs
from mdstore.aws.concurrent import Call, Task
from mdstore.aws.dynamodb.attributes import Item, from_item, to_attribute, to_item
from mdstore.aws.dynamodb.client import DynamoClient, transact
from mdstore.errors import TransactionCancelled
from mdstore.model import Counts, Operation, OpName, Reason, Reference
from mdstore.store.entities import Entities
from mdstore.store.ledger import Ledger
from mdstore.store.ledger_items import Receipt
from mdstore.store.operations import Indexed
from mdstore.store.payload import Payloads
from mdstore.store.payload_builder import PayloadBuilder
from mdstore.store.records import Records, primary_key
from mdstore.store.validation import Validator
from mdstore.store.writer import Writer
from mdstore.store.writes import Data, WriteMetadata, build_write
from tests.conformance.target import SINGLE_THREADED, Target
from tests.unit.fakes import MemoryObjects

Action = dict[str, Any]
UPDATED_AT = 1_700_000_000_123  # Unix milliseconds
TOMBSTONE_EXPIRES_AT = 1_900_000_000  # Unix seconds
encode = msgspec.json.Encoder().encode


class Bench:
    """A test bench. Its keys belong to an entity that no other bench has, so tests may share a table."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.dynamo = target.dynamo
        self.table = target.settings.records_table
        self.ledger_table = target.settings.ledger_table
        unique = uuid4().hex[:12]
        self.entity, self.request_id = f"e{unique}", f"r{unique}"
        self.objects = MemoryObjects()
        self.validator = Validator(entities=Entities(), max_record_bytes=2**24)
        self.payloads = Payloads(objects=self.objects, prefix="payloads/", max_lane_bytes=2**26)
        self.ledger = self.ledger_over(self.dynamo)
        self.records = self.records_over(self.dynamo)

    # -- calls

    def send(self, *actions: Action) -> None:
        """Send one transaction, as the writer sends it."""
        self.make(transact(encode(actions)))

    def make(self, call: Call) -> Any:
        """Make one call; returns its answer."""
        (answer,) = self.dynamo.run([_once(call)])
        return answer

    def cancelled(self, *actions: Action) -> list[dict[str, Any]]:
        """Send a transaction that must be cancelled; returns DynamoDB's reasons."""
        with pytest.raises(TransactionCancelled) as caught:
            self.send(*actions)
        return list(caught.value.reasons)

    # -- actions

    def operation(self, op: OpName, key: str, **fields: Any) -> Indexed:
        """Return an operation as a worker has it."""
        return Indexed(index=0, op=op, entity=self.entity, key=key, **fields)

    def action(self, operation: Indexed, data: Data | None = None, **how: Any) -> Action:
        """Return the action of an operation; `data` is `{"n": 2}` by default."""
        metadata = WriteMetadata(
            table=self.table,
            updated_by=f"{self.request_id}/0/0",
            updated_at=UPDATED_AT,
            tombstone_expires_at=TOMBSTONE_EXPIRES_AT,
        )
        return build_write(operation, to_attribute({"n": 2}) if data is None else data, metadata, **how)

    def act(self, op: OpName, key: str, *, data: Data | None = None, **fields: Any) -> Action:
        """Return the action of a new operation."""
        return self.action(self.operation(op, key, **fields), data)

    def receipt_put(self, number: int = 0, receipt: Receipt | None = None) -> Action:
        """Return the action that writes a receipt of lane 0."""
        return self.ledger.receipt_put(self.request_id, 0, receipt or Receipt(number=number))

    def put(self, key: str, **values: Any) -> Action:
        """Return an unconditional put of a record's item."""
        item = {"pk": primary_key(self.entity, key), "entity": self.entity, "key": key, **values}
        return {"Put": {"TableName": self.table, "Item": to_item(item)}}

    def store(self, key: str, **values: Any) -> None:
        """Store a record's item without a condition."""
        self.dynamo.call("PutItem", self.put(key, **values)["Put"])

    # -- reads

    def item(self, key: str) -> Item | None:
        """Return a record's item as it is stored, in DynamoDB JSON."""
        body = {"TableName": self.table, "Key": self.key(key), "ConsistentRead": True}
        found: Item | None = self.dynamo.call("GetItem", body).get("Item")
        return found

    def values(self, key: str) -> dict[str, Any] | None:
        """Return a record's item as Python values."""
        item = self.item(key)
        return None if item is None else from_item(item)

    def key(self, key: str) -> Item:
        """Return a record's primary key."""
        return to_item({"pk": primary_key(self.entity, key)})

    def receipt_numbers(self) -> list[int]:
        """Return the numbers of the transactions of lane 0 that have a receipt."""
        return sorted(self.ledger.receipts(self.request_id, 0))

    # -- the writer

    def ledger_over(self, dynamo: DynamoClient) -> Ledger:
        """Return a ledger over a client, as another worker has it."""
        return Ledger(dynamo=dynamo, table=self.ledger_table, retention_days=15)

    def records_over(self, dynamo: DynamoClient) -> Records:
        """Return the records over a client, as another worker has them."""
        return Records(dynamo=dynamo, table=self.table, blobs=self.blobs)

    @property
    def blobs(self) -> Blobs:
        """Large data, kept in memory."""
        return Blobs(objects=self.objects, prefix="blobs/", max_bytes=2**26)

    def writer(self, dynamo: DynamoClient | None = None) -> Writer:
        """Return a worker's writer, over `dynamo` if it is given."""
        dynamo = dynamo or self.dynamo
        return Writer(
            payloads=self.payloads,
            records=self.records_over(dynamo),
            blobs=self.blobs,
            ledger=self.ledger_over(dynamo),
            dynamo=dynamo,
            validator=self.validator,
            table=self.table,
            tombstone_seconds=86_400,
            in_flight=1 if self.target.name in SINGLE_THREADED else 4,
            budget=60,
            turn=1_000,
            turn_waves=1_000_000,
        )

    def op(self, name: OpName, key: str, **fields: Any) -> Operation:
        """Return an operation as a producer has it."""
        return Operation(op=name, entity=self.entity, key=key, **fields)

    def request(
        self, operations: Iterable[Operation], request_id: str | None = None, *, validator: Validator | None = None
    ) -> Reference:
        """Store a payload of one lane; returns its reference."""
        settings = self.target.settings.model_copy(update={"lane_operations": 100_000})
        builder = PayloadBuilder(validator=validator or self.validator, settings=settings)
        for operation in operations:
            assert builder.add(operation) is None
        encoded = builder.encode(request_id or self.request_id, "shop")
        builder.close()
        with encoded.body:
            return self.payloads.put(encoded)[0]

    def apply(self, operations: Sequence[Operation], request_id: str | None = None) -> Counts:
        """Apply a request; returns its counts."""
        return self.writer().apply_lane(self.request(operations, request_id), 0).counts

    def refused(self, request_id: str | None = None) -> dict[int, Reason]:
        """Return the reasons of the refusals in the receipts of lane 0, by the operations' indexes."""
        receipts = self.ledger.receipts(request_id or self.request_id, 0).values()
        return {one.index: one.reason for receipt in receipts for one in receipt.refused}

    def data(self, key: str) -> Any:
        """Return a record's data, whether it is in the item or in S3."""
        return self.records.get(self.entity, key).data


def codes(reasons: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the codes of a cancelled transaction, in the order of its actions."""
    return [str(reason.get("Code")) for reason in reasons]


def _once(call: Call) -> Task[Any]:
    return (yield call)
