"""CPU and wall time an operation, of one process that applies lanes of inserts of ~240 bytes to the embedded AWS.

Side by side, runs interleaved, medians of five:

* `boto3`: `transact_write_items` of 99 puts with `TypeSerializer`, as most code does it; no payload, no receipts, no retries;
* `mdstore`: the whole write path: fetch, decode, plan, marshal, sign, send, receipts, summary.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

from boto3.dynamodb.types import TypeSerializer

from mdstore.model import Reference
from mdstore.stack import Stack
from mdstore.store import Store

OPERATIONS, RUNS = 3_960, 5
RECORD: dict[str, Any] = {
    "icao": "00AR", "iata": "", "name": "Arland Airport", "city": "Bennington", "subd": "Kansas", "country": "US",
    "elevation": 1352, "lat": Decimal("38.96966"), "lon": Decimal("-97.601562"), "tz": "America/Chicago", "lid": "00AR",
}  # fmt: skip


def run() -> list[dict[str, Any]]:
    """Measure; returns one row a contender, times in microseconds an operation, ratios against boto3."""
    with Stack(with_api=False, with_worker=False) as stack:
        store = Store(stack.settings)
        contenders: dict[str, Callable[[], None]] = {"boto3": lambda: _boto3(store), "mdstore": _mdstore(store)}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(RUNS + 1):
            for name, contender in contenders.items():
                cpu, wall = time.process_time(), time.perf_counter()
                contender()
                measured[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rows = []
    base = statistics.median(cpu for cpu, _ in measured["boto3"][1:])
    for name, runs in measured.items():
        cpu = statistics.median(cpu for cpu, _ in runs[1:])  # the first run warms up
        wall = statistics.median(wall for _, wall in runs[1:])
        rows.append(
            {
                "contender": name,
                "cpu_us": round(cpu / OPERATIONS * 1e6, 1),
                "wall_us": round(wall / OPERATIONS * 1e6, 1),
                "cpu_ratio": round(base / cpu, 2),
            }
        )
    return rows


def _boto3(store: Store) -> None:
    client, table = store.aws.dynamodb, store.settings.records_table
    serializer, run_id = TypeSerializer(), uuid.uuid4()

    def write(start: int) -> None:
        items = [
            {"pk": f"bench#{run_id}-{n}", "entity": "bench", "key": f"{run_id}-{n}", "version": 1, "data": RECORD}
            for n in range(start, start + 99)
        ]
        client.transact_write_items(
            TransactItems=[
                {
                    "Put": {
                        "TableName": table,
                        "Item": {name: serializer.serialize(value) for name, value in item.items()},
                        "ConditionExpression": "attribute_not_exists(pk)",
                    }
                }
                for item in items
            ]
        )

    with ThreadPoolExecutor(store.settings.transactions_in_flight) as pool:
        for future in [pool.submit(write, start) for start in range(0, OPERATIONS, 99)]:
            future.result()


def _mdstore(store: Store) -> Callable[[], None]:
    requests: list[Reference] = []
    for _ in range(RUNS + 1):  # what a producer does is not the worker's time
        run_id = uuid.uuid4()
        store.ingestor.submit(
            ({"op": "insert", "entity": "bench", "key": f"{run_id}-{n}", "data": RECORD} for n in range(OPERATIONS)),
            publish=requests.append,
        )

    def apply() -> None:
        reference = requests.pop()
        for lane in range(reference.lanes):
            summary = store.writer.apply_lane(reference, lane)
            if summary.counts.refused:
                raise RuntimeError(f"operations were refused: {summary.counts}")

    return apply
