"""Where a model run takes place: objects, a service for tables, and the store's real parts over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, Field

from mdstore.blobs import Blobs
from mdstore.dynamo.client import DynamoClient
from mdstore.dynamo.marshal import Item
from mdstore.dynamo.retry import Retry
from mdstore.entities import Entities
from mdstore.ingestor import Ingestor
from mdstore.ledger import Ledger
from mdstore.objects import Objects
from mdstore.outcomes import Outcomes, Verifier
from mdstore.payload import Payloads
from mdstore.records import Record, Records
from mdstore.settings import Settings
from mdstore.signed import SignedHttp
from mdstore.validation import Validator
from mdstore.writer import Writer
from tests.model.deliveries import Clock, Delivery
from tests.model.model import Known, Rules
from tests.model.network import Service
from tests.unit.fakes import MemoryDynamo

T = TypeVar("T")

#: Limits so small that a few operations reach them: of a group, an item, a transaction's body, a record.
GROUP, ITEM, BODY, RECORD = 3, 1_500, 3_000, 2_600
RULES = Rules(group=GROUP, size=RECORD)
#: Where the code keeps those that are no settings; a transaction then holds 3 operations.
LIMITS = {
    "mdstore.plan.MAX_ACTIONS": GROUP,
    "mdstore.draft.MAX_ACTIONS": GROUP,
    "mdstore.validation.MAX_INLINE": ITEM,
    "mdstore.validation._SURELY_INLINE": ITEM // 2,
    "mdstore.writer._MAX_BODY": BODY,
}


class Typed(BaseModel):
    """The model of the entity `typed`."""

    n: int = Field(ge=0)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Objects and tables of one run, under names of their own."""

    objects: Objects
    service: Service
    records: str = "records"
    ledger: str = "ledger"
    prefix: str = ""
    lane_operations: int = 3


class Parts:
    """One process's store over a site: the parts that `Store` builds, over given calls and a given clock."""

    def __init__(self, site: Site, http: SignedHttp, clock: Clock) -> None:
        retry = Retry(clock=clock, sleep=lambda _: None, uniform=lambda low, _: low)
        self.dynamo = DynamoClient(http=http, endpoint="http://dynamodb", retry=retry)
        self.validator = Validator(entities=Entities({RULES.typed: Typed}), max_record_bytes=RECORD)
        self.payloads = Payloads(objects=site.objects, prefix=f"{site.prefix}payloads/", max_lane_bytes=2**20)
        self.blobs = Blobs(objects=site.objects, prefix=f"{site.prefix}blobs/", max_bytes=2**20)
        self.records = Records(dynamo=self.dynamo, table=site.records, blobs=self.blobs)
        self.ledger = Ledger(dynamo=self.dynamo, table=site.ledger, retention_days=15, clock=clock)
        self.ingestor = Ingestor(
            payloads=self.payloads,
            ledger=self.ledger,
            validator=self.validator,
            settings=Settings(lane_operations=site.lane_operations),
            clock=clock,
        )
        self.writer = Writer(
            payloads=self.payloads,
            records=self.records,
            blobs=self.blobs,
            ledger=self.ledger,
            dynamo=self.dynamo,
            validator=self.validator,
            table=site.records,
            tombstone_seconds=15 * 86_400,
            in_flight=3,
            budget=100,
            monotonic=clock,
            clock=clock,
        )
        self.outcomes = Outcomes(payloads=self.payloads, ledger=self.ledger)
        self.verifier = Verifier(payloads=self.payloads, ledger=self.ledger, records=self.records)


def at_once(site: Site, clock: Clock, work: Callable[[Parts], T]) -> T:
    """Do `work` with a store whose every call is answered at once."""
    found: list[T] = []
    delivery = Delivery(clock, lambda http, clock: found.append(work(Parts(site, http, clock))))
    while not delivery.over:
        call = delivery.calls[0]
        delivery.land(call, site.service.answer(call.operation, call.body))
    if delivery.error is not None:
        raise delivery.error
    return found[0]


def known(record: Record) -> Known:
    """A record in the model's words."""
    return Known(data=record.data, version=record.version, sequence=record.sequence, deleted=record.deleted)


def reader(site: Site) -> Callable[[Item], Known]:
    """What an item of the records table says, in the model's words."""
    blobs = Blobs(objects=site.objects, prefix=f"{site.prefix}blobs/", max_bytes=2**20)
    records = Records(dynamo=MemoryDynamo(), table=site.records, blobs=blobs)
    return lambda item: known(records.read(item))
