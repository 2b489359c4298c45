"""The whole path from submission to completion, on the embedded AWS: this project, its peers, and the floor.

The floor sends the same records in parallel, as transactions marshalled beforehand and without a queue; what remains is the
emulator's own time. Each run has an emulator of its own, because the emulator's queues and tables slow down as they fill.
Stock Celery is measured twice: with its defaults, where it pauses for a second after an empty poll and whenever its
prefetch is full, and "without pause", where it pauses for only 20 ms.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, Any
from unittest import mock

import boto3

from benchmarks.alone import alone
from benchmarks.peers.writing import PROCESSES, QUEUE
from benchmarks.records import operations
from benchmarks.results import Result, Row, median
from benchmarks.services import embedded_aws, environ_of
from benchmarks.write_contenders import Floor
from mdstore.client import Client
from mdstore.local.stack import kill_group
from mdstore.settings import Settings

Operations = list[dict[str, Any]]
Work = Callable[[], int]  # returns the number of applied operations
Prepare = Callable[[Operations], Work]
_OPERATIONS = 20_000
_WARM_UP = 200
_COMMANDS: dict[str, list[str]] = {
    "stock_celery": ["celery", "-q", "-A", "benchmarks.peers.stock_celery", "worker", "-l", "WARNING"],
    "taskiq_sqs": [
        "taskiq", "worker", "benchmarks.peers.taskiq_sqs:broker", "-w", str(PROCESSES), "--log-level", "WARNING",
    ],
    "celery_s3": ["celery", "-q", "-A", "benchmarks.peers.celery_s3", "worker", "-l", "WARNING"],
    "noop_stock": ["celery", "-q", "-A", "benchmarks.peers.noop_stock", "worker", "-l", "WARNING"],
    "noop_mdstore": ["celery", "-q", "-A", "benchmarks.peers.noop_mdstore", "worker", "-l", "WARNING"],
    "powertools_loop": ["benchmarks.peers.powertools_loop"],
    "seed_like": ["benchmarks.peers.seed_like"],
    "mdstore": ["celery", "-q", "-A", "workers.celery_app", "worker", "-l", "WARNING", "-c", str(PROCESSES)],
}  # fmt: skip


def run(*, runs: int, scale: float) -> Result:
    """Measure. Rows have operations per second, and their ratios to the floor and to stock Celery with and without pause."""
    count = max(1_000, int(_OPERATIONS * scale))
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        for name in CONTENDERS:
            rates[name].append(alone(_measure, name, count))
    floor, stock, busy = (median(rates[name]) for name in (FLOOR, STOCK, STOCK_BUSY))
    rows: list[Row] = [
        {
            "contender": name,
            "operations_per_s": round(median(found)),
            "of_the_floor": round(median(found) / floor, 2),
            "times_stock_celery": round(median(found) / stock, 2),
            "times_polling_without_pause": round(median(found) / busy, 2),
        }
        for name, found in rates.items()
    ]
    return Result(name="pipeline", title=__doc__ or "", runs=runs, rows=rows)


def _measure(name: str, count: int) -> float:
    """Run a contender once, and return its operations per second."""
    with embedded_aws() as settings, mock.patch.dict(os.environ, environ_of(settings)):
        provision_peers()
        with CONTENDERS[name](settings) as prepare:
            for size in (_WARM_UP, count):
                work = prepare(listed(size))
                began = time.perf_counter()
                applied = work()
                wall = time.perf_counter() - began
                if applied != size:
                    raise RuntimeError(f"{applied} of {size} operations were applied")
    return count / wall


def listed(count: int) -> Operations:
    """Return operations as a JSON decoder returns them, with floats."""
    listed = list(operations(count, str(uuid.uuid4())))
    data = {name: float(value) if name in ("lat", "lon") else value for name, value in listed[0]["data"].items()}
    return [{**operation, "data": data} for operation in listed]


@contextmanager
def _floor(_: Settings) -> Iterator[Prepare]:
    floor = Floor()

    def prepare(work: Operations) -> Work:
        send = floor.prepare(str(uuid.uuid4()), len(work))

        def sent() -> int:
            send()
            return len(work)

        return sent

    yield prepare


@contextmanager
def _mdstore(settings: Settings) -> Iterator[Prepare]:
    client = Client(settings)

    def submit(work: Operations) -> int:
        counts = client.submit(work).wait(timeout=600).status().counts
        return sum(counts.applied.values())

    with worker_process("mdstore"):
        yield lambda work: partial(submit, work)


@contextmanager
def _peer(name: str, _: Settings) -> Iterator[Prepare]:
    with worker_process(name):
        module = importlib.import_module(f"benchmarks.peers.{name}")
        yield lambda work: partial(module.submit, work)


@contextmanager
def _stock_busy(settings: Settings) -> Iterator[Prepare]:
    with mock.patch.dict(os.environ, BENCH_WITHOUT_PAUSE="1"), _peer("stock_celery", settings) as prepare:
        yield prepare


@contextmanager
def _powertools(_: Settings) -> Iterator[Prepare]:
    from benchmarks.peers import powertools_loop  # noqa: PLC0415

    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as done, ExitStack() as stack:
        with os.fdopen(write_end, "w") as output:
            for _number in range(PROCESSES):
                stack.enter_context(worker_process("powertools_loop", output=output))

        def submit(work: Operations) -> int:
            powertools_loop.send(work)
            applied = 0
            while applied < len(work):
                applied += int(done.readline())
            return applied

        yield lambda work: partial(submit, work)


@contextmanager
def worker_process(name: str, *options: str, output: IO[str] | None = None) -> Iterator[int]:
    """Run a contender's worker with additional `options`, and kill it at the end; yields its process id."""
    process = subprocess.Popen(  # noqa: S603  our own commands
        [sys.executable, "-m", *_COMMANDS[name], *options], stdout=output or sys.stderr, start_new_session=True
    )
    try:
        yield process.pid
    finally:
        kill_group(process)


def provision_peers() -> None:
    """Create a queue, a bucket and a table for the contenders that do not create their own."""
    boto3.client("sqs").create_queue(QueueName=QUEUE, Attributes={"VisibilityTimeout": "300"})
    boto3.client("s3").create_bucket(Bucket="bench-results")
    boto3.client("dynamodb").create_table(
        TableName="bench-results",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
    )


FLOOR, STOCK = "floor: direct transactions", "stock Celery"
STOCK_BUSY = "stock Celery, no pause"
CONTENDERS: dict[str, Callable[[Settings], Any]] = {
    FLOOR: _floor,
    "mdstore": _mdstore,
    "Powertools-style loop": _powertools,
    "taskiq + taskiq-aio-sqs": partial(_peer, "taskiq_sqs"),
    STOCK_BUSY: _stock_busy,
    STOCK: partial(_peer, "stock_celery"),
}
