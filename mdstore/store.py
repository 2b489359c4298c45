"""The composition root: every part of the core, built once from the settings. Knows nothing of Celery or HTTP."""

from __future__ import annotations

from functools import cached_property

from mdstore.apikeys import ApiKeys
from mdstore.aws import Aws
from mdstore.blobs import Blobs
from mdstore.entities import load_entities
from mdstore.ingestor import Ingestor
from mdstore.ledger import DAY, Ledger
from mdstore.objects import Objects
from mdstore.outcomes import Outcomes, Verifier
from mdstore.payload import Payloads
from mdstore.records import Records
from mdstore.settings import Settings
from mdstore.validation import Validator
from mdstore.writer import Writer


class Store:
    """The core's parts, each built on first use in the process that uses it. Threads may share a store."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.aws = Aws(settings)

    @cached_property
    def objects(self) -> Objects:
        """The bucket."""
        return Objects(client=self.aws.s3, bucket=self.settings.bucket)

    @cached_property
    def payloads(self) -> Payloads:
        """Payloads of requests."""
        settings = self.settings
        return Payloads(objects=self.objects, prefix=settings.payload_prefix, max_lane_bytes=settings.max_lane_bytes)

    @cached_property
    def blobs(self) -> Blobs:
        """Data too large for an item."""
        settings = self.settings
        # A patch may make a record larger than any one operation.
        return Blobs(objects=self.objects, prefix=settings.blob_prefix, max_bytes=4 * settings.max_record_bytes)

    @cached_property
    def ledger(self) -> Ledger:
        """Request states, lane summaries, receipts."""
        settings = self.settings
        return Ledger(dynamo=self.aws.dynamo, table=settings.ledger_table, retention_days=settings.receipt_days)

    @cached_property
    def api_keys(self) -> ApiKeys:
        """Who may call the front door."""
        return ApiKeys(dynamo=self.aws.dynamo, table=self.settings.ledger_table)

    @cached_property
    def records(self) -> Records:
        """The current state of each key."""
        return Records(dynamo=self.aws.dynamo, table=self.settings.records_table, blobs=self.blobs)

    @cached_property
    def validator(self) -> Validator:
        """Checks of operations against rules and entity models."""
        settings = self.settings
        entities = load_entities(settings.entities, strict=settings.strict_entities)
        return Validator(entities=entities, max_record_bytes=settings.max_record_bytes)

    @cached_property
    def ingestor(self) -> Ingestor:
        """The producer's half."""
        return Ingestor(payloads=self.payloads, ledger=self.ledger, validator=self.validator, settings=self.settings)

    @cached_property
    def writer(self) -> Writer:
        """The worker's half."""
        settings = self.settings
        return Writer(
            payloads=self.payloads,
            records=self.records,
            blobs=self.blobs,
            ledger=self.ledger,
            dynamo=self.aws.dynamo,
            validator=self.validator,
            table=settings.records_table,
            tombstone_seconds=settings.tombstone_days * DAY,
            in_flight=settings.transactions_in_flight,
            budget=settings.lane_budget,
        )

    @cached_property
    def outcomes(self) -> Outcomes:
        """What became of each operation."""
        return Outcomes(payloads=self.payloads, ledger=self.ledger)

    @cached_property
    def verifier(self) -> Verifier:
        """The proof that effects equal inputs."""
        return Verifier(payloads=self.payloads, ledger=self.ledger, records=self.records)
