"""Pools and transactions in flight per lane: many requests of one operation, and one of 50,000, at 5 and 20 ms per call."""

from __future__ import annotations

import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

from benchmarks.alone import alone
from benchmarks.growth import tree_cpu
from benchmarks.pipeline import worker_process
from benchmarks.records import operations
from benchmarks.results import Result, Row, median
from benchmarks.services import embedded_aws, environ_of, stub
from mdstore.client import Client

#: Pool, its size, and transactions in flight per lane.
POOLS = (
    ("prefork", 2, 24),
    ("threads", 2, 24),
    ("threads", 8, 24),
    ("prefork", 2, 8),
    ("prefork", 2, 16),
    ("prefork", 2, 48),
)
QUICK_POOLS = POOLS[::2]  # for a run that only shows that the benchmark works
LATENCIES = (5, 20)  # milliseconds
_SMALL, _LARGE = 200, 50_000


def run(*, runs: int, scale: float) -> Result:
    """Measure. Rows have small requests per second, and operations per second and CPU per operation of a large request."""
    found: dict[tuple[int, str, int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(runs):
        for latency in LATENCIES:
            for options in POOLS if scale >= 1 else QUICK_POOLS:
                for name, value in alone(_measure, *options, latency, scale).items():
                    found[latency, *options][name].append(value)
    rows: list[Row] = [
        {
            "latency_ms": latency,
            "pool": pool,
            "size": size,
            "in_flight": in_flight,
            **{name: round(median(one), 1) for name, one in values.items()},
        }
        for (latency, pool, size, in_flight), values in found.items()
    ]
    return Result(name="pools", title=__doc__ or "", runs=runs, rows=rows)


def _measure(pool: str, size: int, in_flight: int, latency: float, scale: float) -> dict[str, float]:
    small, large = max(20, int(_SMALL * scale)), max(2_000, int(_LARGE * scale))
    with _worker(pool, size, in_flight, latency) as (worker, client):
        requests = _small(client, small)
        before = tree_cpu(worker)
        rate = _large(client, large)
        cpu = (tree_cpu(worker) - before) / large * 1e6
    return {"small_requests_per_s": requests, "large_operations_per_s": rate, "large_cpu_us": cpu}


@contextmanager
def _worker(pool: str, size: int, in_flight: int, latency: float) -> Iterator[tuple[int, Client]]:
    with embedded_aws() as settings, stub(latency, upstream=int(str(settings.endpoint_url).rpartition(":")[2])) as port:
        environ = environ_of(settings) | {
            "AWS_ENDPOINT_URL_DYNAMODB": f"http://127.0.0.1:{port}",
            "MDSTORE_TRANSACTIONS_IN_FLIGHT": str(in_flight),
        }
        with mock.patch.dict(os.environ, environ), worker_process("mdstore", "-P", pool, "-c", str(size)) as worker:
            client = Client()
            _small(client, 4 * size)  # warms up every pool member
            yield worker, client


def _small(client: Client, count: int) -> float:
    """Return requests per second, from submission by four threads to completion."""
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        submissions = list(pool.map(lambda _: client.submit(operations(1, str(uuid.uuid4()))), range(count)))
        for submission in submissions:
            submission.wait(timeout=300)
    return count / (time.perf_counter() - began)


def _large(client: Client, count: int) -> float:
    """Return operations per second from the sent message on, so that the producer's time is not included."""
    submission = client.submit(operations(count, str(uuid.uuid4())))
    began = time.perf_counter()
    submission.wait(timeout=600)
    return count / (time.perf_counter() - began)
