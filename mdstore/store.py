"""The composition root: every part of the core, built once from the settings. Knows nothing of Celery or HTTP."""

from __future__ import annotations

from mdstore.apikeys import ApiKeys
from mdstore.aws import Aws
from mdstore.blobs import Blobs
from mdstore.dynamo.retry import Retry
from mdstore.entities import load_entities
from mdstore.ingestor import Ingestor
from mdstore.ledger import Ledger
from mdstore.objects import Objects
from mdstore.outcomes import Outcomes, Verifier
from mdstore.payload import Payloads
from mdstore.records import Records
from mdstore.settings import DAY, Settings
from mdstore.validation import Validator
from mdstore.writer import Writer


class Store:
    """The core's parts. Making one connects to nothing; threads may share it, a forked child makes its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # On one machine what does not answer is not there; a network deserves more patience.
        retry = Retry(patience=3.0 if settings.profile == "local" else 20.0)
        self.aws = Aws(settings, retry=retry)
        dynamo = self.aws.dynamo
        self.objects = Objects(client=self.aws.s3, http=self.aws.s3_http, bucket=settings.bucket, retry=retry)
        self.payloads = Payloads(
            objects=self.objects, prefix=settings.payload_prefix, max_lane_bytes=settings.max_lane_bytes
        )
        # A patch may make a record larger than any one operation.
        self.blobs = Blobs(objects=self.objects, prefix=settings.blob_prefix, max_bytes=4 * settings.max_record_bytes)
        self.ledger = Ledger(dynamo=dynamo, table=settings.ledger_table, retention_days=settings.receipt_days)
        self.api_keys = ApiKeys(dynamo=dynamo, table=settings.ledger_table)
        self.records = Records(dynamo=dynamo, table=settings.records_table, blobs=self.blobs)
        self.validator = Validator(
            entities=load_entities(settings.entities, strict=settings.strict_entities),
            max_record_bytes=settings.max_record_bytes,
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
        )
        self.outcomes = Outcomes(payloads=self.payloads, ledger=self.ledger)
        self.verifier = Verifier(payloads=self.payloads, ledger=self.ledger, records=self.records)
