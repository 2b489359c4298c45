"""The composition root: builds every part of the data store from the settings, without Celery or HTTP."""

from __future__ import annotations

from mdstore.aws.blobs import Blobs
from mdstore.aws.clients import AwsClients
from mdstore.settings import DAY, Settings
from mdstore.store.api_keys import ApiKeys
from mdstore.store.entities import load_entities
from mdstore.store.ingestor import Ingestor
from mdstore.store.ledger import Ledger
from mdstore.store.outcomes import Outcomes
from mdstore.store.payload import Payloads
from mdstore.store.records import Records
from mdstore.store.validation import Validator
from mdstore.store.verify import Verifier
from mdstore.store.writer import Writer


class Store:
    """The parts of the data store. Creating one connects to nothing. Threads may share it; a forked child must make its own."""

    def __init__(self, settings: Settings, *, aws: AwsClients | None = None) -> None:
        """Use the clients `aws`, if the process already has them."""
        self.settings = settings
        self.aws = aws or AwsClients(settings)
        dynamo = self.aws.dynamo
        self.objects = self.aws.objects
        self.payloads = Payloads(
            objects=self.objects, prefix=settings.payload_prefix, max_lane_bytes=settings.max_lane_bytes
        )
        # A patch may make a record larger than any single operation.
        self.blobs = Blobs(objects=self.objects, prefix=settings.blob_prefix, max_bytes=4 * settings.max_record_bytes)
        self.ledger = Ledger(dynamo=dynamo, table=settings.ledger_table, retention_days=settings.receipt_days)
        self.api_keys = ApiKeys(dynamo=dynamo, table=settings.ledger_table)
        self.records = Records(dynamo=dynamo, table=settings.records_table, blobs=self.blobs)
        self.entities = load_entities(settings.entities, strict=settings.strict_entities)
        self.validator = Validator(
            entities=self.entities,
            max_record_bytes=settings.max_record_bytes,
            max_record_values=settings.max_record_values,
        )
        self.ingestor = Ingestor(
            payloads=self.payloads, ledger=self.ledger, validator=self.validator, settings=settings
        )
        self.writer = Writer(
            payloads=self.payloads,
            records=self.records,
            blobs=self.blobs,
            ledger=self.ledger,
            dynamo=dynamo,
            validator=self.validator,
            table=settings.records_table,
            tombstone_seconds=settings.tombstone_days * DAY,
            in_flight=settings.transactions_in_flight,
            budget=settings.lane_budget,
            turn=settings.lane_turn,
            turn_waves=settings.lane_turn_waves,
        )
        self.outcomes = Outcomes(payloads=self.payloads, ledger=self.ledger)
        self.verifier = Verifier(
            payloads=self.payloads, ledger=self.ledger, records=self.records, entities=self.entities
        )
