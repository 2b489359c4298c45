"""The environment of a model run: objects, a DynamoDB service, and the store's real parts over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, Field

from mdstore.aws.blobs import Blobs
from mdstore.aws.dynamodb.attributes import Item
from mdstore.aws.dynamodb.client import DynamoClient
from mdstore.aws.http import SignedHttp
from mdstore.aws.retry import Retry
from mdstore.aws.s3 import Objects
from mdstore.settings import Settings
from mdstore.store.entities import Entities
from mdstore.store.ingestor import Ingestor
from mdstore.store.ledger import Ledger
from mdstore.store.outcomes import Outcomes
from mdstore.store.payload import Payloads
from mdstore.store.records import Record, Records
from mdstore.store.validation import Validator
from mdstore.store.verify import Verifier
from mdstore.store.writer import Writer
from tests.model.deliveries import Clock, Delivery
from tests.model.model import Known, Rules
from tests.model.network import Service
from tests.unit.fakes import MemoryDynamo

T = TypeVar("T")

#: Limits so small that a few operations reach them: a group's operations, and the bytes of an item, a body and a record.
GROUP, ITEM, BODY, RECORD = 3, 1_500, 3_000, 2_600
RULES = Rules(group=GROUP, size=RECORD)
#: Where the code has the limits that are not settings. With these, a transaction holds 3 operations.
LIMITS = {
    "mdstore.store.packing.MAX_ACTIONS": GROUP,
    "mdstore.store.folding.MAX_REFUSAL_BYTES": 4 * 255,
    "mdstore.store.payload_builder.MAX_ACTIONS": GROUP,
    "mdstore.store.validation.MAX_INLINE": ITEM,
    "mdstore.store.validation._SURELY_INLINE": ITEM // 2,
    "mdstore.store.writer._MAX_BODY": BODY,
}


class Typed(BaseModel):
    """The data model of the entity `typed`."""

    n: int = Field(ge=0)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The objects and tables of one run, under names that no other run uses."""

    objects: Objects
    service: Service
    records: str = "records"
    ledger: str = "ledger"
    prefix: str = ""
    lane_operations: int = 3


class Parts:
    """The store of one process: the parts that `Store` builds, over a given HTTP client and clock."""

    def __init__(self, environment: Environment, http: SignedHttp, clock: Clock) -> None:
        retry = Retry(clock=clock, sleep=lambda _: None, uniform=lambda low, _: low)
        self.dynamo = DynamoClient(http=http, endpoint="http://dynamodb", retry=retry)
        entities = Entities({RULES.typed: Typed})
        self.validator = Validator(entities=entities, max_record_bytes=RECORD)
        self.payloads = Payloads(
            objects=environment.objects, prefix=f"{environment.prefix}payloads/", max_lane_bytes=2**20
        )
        self.blobs = Blobs(objects=environment.objects, prefix=f"{environment.prefix}blobs/", max_bytes=2**20)
        self.records = Records(dynamo=self.dynamo, table=environment.records, blobs=self.blobs)
        self.ledger = Ledger(dynamo=self.dynamo, table=environment.ledger, retention_days=15, clock=clock)
        self.ingestor = Ingestor(
            payloads=self.payloads,
            ledger=self.ledger,
            validator=self.validator,
            settings=Settings(lane_operations=environment.lane_operations),
            clock=clock,
        )
        self.writer = Writer(
            payloads=self.payloads,
            records=self.records,
            blobs=self.blobs,
            ledger=self.ledger,
            dynamo=self.dynamo,
            validator=self.validator,
            table=environment.records,
            tombstone_seconds=15 * 86_400,
            in_flight=3,
            budget=100,
            turn=50,
            turn_waves=2,
            monotonic=clock,
            clock=clock,
        )
        self.outcomes = Outcomes(payloads=self.payloads, ledger=self.ledger)
        self.verifier = Verifier(payloads=self.payloads, ledger=self.ledger, records=self.records, entities=entities)


def at_once(environment: Environment, clock: Clock, work: Callable[[Parts], T]) -> T:
    """Run `work` with a store whose every call is answered at once; returns its result."""
    found: list[T] = []
    delivery = Delivery(clock, lambda http, clock: found.append(work(Parts(environment, http, clock))))
    while not delivery.over:
        call = delivery.calls[0]
        delivery.finish_call(call, environment.service.answer(call.operation, call.body))
    if delivery.error is not None:
        raise delivery.error
    return found[0]


def known(record: Record) -> Known:
    """Return a record as the model represents it."""
    return Known(data=record.data, version=record.version, sequence=record.sequence, deleted=record.deleted)


def reader(environment: Environment) -> Callable[[Item], Known]:
    """Return a function that turns an item of the records table into the model's representation."""
    blobs = Blobs(objects=environment.objects, prefix=f"{environment.prefix}blobs/", max_bytes=2**20)
    records = Records(dynamo=MemoryDynamo(), table=environment.records, blobs=blobs)
    return lambda item: known(records.read(item))
