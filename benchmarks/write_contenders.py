"""The contenders of `write_path`. Each has a method `prepare(run, operations)` that returns the work to measure.

*Workers* do everything a worker does: they read the payload from S3, decode it, and marshal, sign and send transactions in
parallel. This project's worker also writes receipts, outcomes and summaries; the boto3 worker does not. *Clients* marshal, sign
and send records that are already in memory. All contenders keep `IN_FLIGHT` transactions in flight, except boto3 with one
thread, which needs less CPU if answers come at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import boto3
import msgspec
import zstandard
from boto3.dynamodb.types import TypeSerializer
from botocore.config import Config

from benchmarks.records import items, operations
from mdstore import exactjson
from mdstore.aws.concurrent import Task
from mdstore.aws.dynamodb.attributes import to_item
from mdstore.aws.dynamodb.client import transact
from mdstore.model import Reference
from mdstore.settings import load_settings
from mdstore.store import Store

Work = Callable[[], None]
IN_FLIGHT = 24
ACTIONS = 99  # actions per transaction: as many as a full transaction of this project has
LANE = 2_000  # operations per payload or lane: this project's default
_CONDITION = "attribute_not_exists(pk)"
_encode = msgspec.json.Encoder().encode


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + ACTIONS, count)) for start in range(0, count, ACTIONS))


class Mdstore:
    """This project's whole write path: fetch, decode, plan, sign and send, with receipts, outcomes and summary."""

    def __init__(self) -> None:
        self._store = Store(load_settings(transactions_in_flight=IN_FLIGHT, lane_operations=LANE).settings)

    def prepare(self, run: str, count: int) -> Work:
        """Store the payload in S3. This is the producer's work, so it is not measured."""
        requests: list[Reference] = []
        self._store.ingestor.accept(operations(count, run), publish=requests.append, request_id=run)
        return partial(self._work, requests[0], count)

    def _work(self, reference: Reference, count: int) -> None:
        lanes = [self._store.writer.apply_lane(reference, lane) for lane in range(reference.lanes)]
        if sum(lane.counts.applied["insert"] for lane in lanes) != count:
            raise RuntimeError("not all operations were applied")


class MdstoreClient:
    """This project's DynamoDB client alone."""

    def __init__(self) -> None:
        store = Store(load_settings().settings)
        self._dynamo, self._table = store.aws.dynamo, store.settings.records_table

    def prepare(self, run: str, count: int) -> Work:
        """Create the items as Python values."""
        chunks = [items(start, end, run) for start, end in _chunks(count)]
        return lambda: self._send(map(self._task, chunks))

    def _send(self, tasks: Iterator[Task[None]]) -> None:
        self._dynamo.run(tasks, in_flight=IN_FLIGHT)

    def _task(self, chunk: list[dict[str, Any]]) -> Task[None]:
        yield transact(self._body(chunk))

    def _body(self, chunk: list[dict[str, Any]]) -> bytes:
        return _encode(
            [
                {"Put": {"TableName": self._table, "Item": to_item(item), "ConditionExpression": _CONDITION}}
                for item in chunk
            ]
        )


class Floor(MdstoreClient):
    """The floor: a bare loop that signs and sends bodies. They are marshalled before the measurement."""

    def prepare(self, run: str, count: int) -> Work:
        """Marshal all bodies."""
        calls = [transact(self._body(items(start, end, run))) for start, end in _chunks(count)]

        def task(call: tuple[str, bytes]) -> Task[None]:
            yield call

        return lambda: self._send(map(task, calls))


class Threaded:
    """A client that sends from threads. Subclasses define `_send`, which sends one transaction."""

    threads = IN_FLIGHT
    takes_decimals = True

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads)

    def prepare(self, run: str, count: int) -> Work:
        """Create the items as Python values."""
        chunks = [items(start, end, run) for start, end in _chunks(count)]
        if not self.takes_decimals:
            for item in chain.from_iterable(chunks):
                item["data"] = {
                    name: float(value) if isinstance(value, Decimal) else value for name, value in item["data"].items()
                }
        return lambda: self._send_all(chunks)

    def _send_all(self, chunks: list[list[dict[str, Any]]]) -> None:
        for future in [self._pool.submit(self._send, chunk) for chunk in chunks]:
            future.result()

    def _send(self, chunk: list[dict[str, Any]]) -> None:
        raise NotImplementedError


class Boto3Client(Threaded):
    """boto3's `transact_write_items` with `TypeSerializer`, as boto3's documentation shows it."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self._table = load_settings().settings.records_table
        self._client = boto3.client("dynamodb", config=Config(max_pool_connections=IN_FLIGHT, **self.config))
        self._serializer = TypeSerializer()

    def _send(self, chunk: list[dict[str, Any]]) -> None:
        self._client.transact_write_items(
            TransactItems=[
                {
                    "Put": {
                        "TableName": self._table,
                        "Item": {name: self._serializer.serialize(value) for name, value in item.items()},
                        "ConditionExpression": _CONDITION,
                    }
                }
                for item in chunk
            ]
        )


class Boto3OneThread(Boto3Client):
    """`Boto3Client`, but sending one transaction at a time."""

    threads = 1


class Boto3Unvalidated(Boto3Client):
    """`Boto3Client` without botocore's parameter validation."""

    config: ClassVar[dict[str, Any]] = {"parameter_validation": False}


class Boto3Worker(Boto3Client):
    """A worker as most would write it: S3 get, JSON decode, `TypeSerializer`, `transact_write_items`, and no receipts."""

    def __init__(self) -> None:
        super().__init__()
        self._s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
        self._bucket = load_settings().settings.bucket

    def prepare(self, run: str, count: int) -> Work:
        """Store the payloads in S3. As for this project's worker, this is not measured."""
        lines = [exactjson.dumps(operation) for operation in operations(count, run)]
        keys = []
        for start in range(0, count, LANE):
            keys.append(f"payloads/boto3/{run}/{start}")
            body = zstandard.compress(b"\n".join(lines[start : start + LANE]))
            self._s3.put_object(Bucket=self._bucket, Key=keys[-1], Body=body)
        return partial(self._work, run, keys)

    def _work(self, run: str, keys: list[str]) -> None:
        for key in keys:
            text = zstandard.decompress(self._s3.get_object(Bucket=self._bucket, Key=key)["Body"].read())
            rows = [json.loads(line, parse_float=Decimal) for line in text.split(b"\n")]
            new_items = [
                {
                    "pk": f"{row['entity']}#{row['key']}",
                    "entity": row["entity"],
                    "key": row["key"],
                    "version": 1,
                    "data": row["data"],
                    "updated_at": 1_764_000_000_000,
                    "updated_by": run,
                }
                for row in rows
            ]
            self._send_all([new_items[start:end] for start, end in _chunks(len(new_items))])


class Boto3WorkerOneThread(Boto3Worker):
    """`Boto3Worker`, but sending one transaction at a time."""

    threads = 1


class PynamoDB(Threaded):
    """PynamoDB's `TransactWrite` with models."""

    takes_decimals = False

    def __init__(self) -> None:
        super().__init__()
        from pynamodb.attributes import MapAttribute, NumberAttribute, UnicodeAttribute  # noqa: PLC0415
        from pynamodb.connection import Connection  # noqa: PLC0415
        from pynamodb.models import Model  # noqa: PLC0415
        from pynamodb.transactions import TransactWrite  # noqa: PLC0415

        class Airport(MapAttribute):
            icao = UnicodeAttribute()
            iata = UnicodeAttribute()
            name = UnicodeAttribute()
            city = UnicodeAttribute()
            subd = UnicodeAttribute()
            country = UnicodeAttribute()
            elevation = NumberAttribute()
            lat = NumberAttribute()
            lon = NumberAttribute()
            tz = UnicodeAttribute()

        class Row(Model):
            class Meta:
                table_name = load_settings().settings.records_table
                region = os.environ["AWS_REGION"]
                host = os.environ.get("AWS_ENDPOINT_URL_DYNAMODB") or os.environ["AWS_ENDPOINT_URL"]
                max_pool_connections = IN_FLIGHT

            pk = UnicodeAttribute(hash_key=True)
            entity = UnicodeAttribute()
            key = UnicodeAttribute()
            version = NumberAttribute()
            data = Airport()
            updated_at = NumberAttribute()
            updated_by = UnicodeAttribute()

        self._row, self._airport, self._write = Row, Airport, TransactWrite
        self._connection = Connection(region=Row.Meta.region, host=Row.Meta.host, max_pool_connections=IN_FLIGHT)

    def _send(self, chunk: list[dict[str, Any]]) -> None:
        with self._write(connection=self._connection) as transaction:
            for item in chunk:
                row = self._row(**{**item, "data": self._airport(**item["data"])})
                transaction.save(row, condition=self._row.pk.does_not_exist())


class Pydynox(Threaded):
    """pydynox's `sync_transact_write`, which is implemented in Rust."""

    takes_decimals = False

    def __init__(self) -> None:
        super().__init__()
        from pydynox import DynamoDBClient  # noqa: PLC0415

        self._table = load_settings().settings.records_table
        self._client = DynamoDBClient(
            region=os.environ["AWS_REGION"],
            access_key=os.environ["AWS_ACCESS_KEY_ID"],
            secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=os.environ.get("AWS_ENDPOINT_URL_DYNAMODB") or os.environ["AWS_ENDPOINT_URL"],
        )

    def _send(self, chunk: list[dict[str, Any]]) -> None:
        self._client.sync_transact_write(
            [{"type": "put", "table": self._table, "item": item, "condition_expression": _CONDITION} for item in chunk]
        )


CONTENDERS: dict[str, Callable[[], Any]] = {
    "worker: mdstore": Mdstore,
    "worker: boto3": Boto3Worker,
    "worker: boto3, one thread": Boto3WorkerOneThread,
    "client: mdstore": MdstoreClient,
    "client: pydynox": Pydynox,
    "client: PynamoDB": PynamoDB,
    "client: boto3, no validation": Boto3Unvalidated,
    "client: boto3": Boto3Client,
    "client: boto3, one thread": Boto3OneThread,
    "floor: bare loop": Floor,
}
