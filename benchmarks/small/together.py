"""Requests that come over HTTP while a worker applies them, and reads over HTTP: speed, CPU, and what they cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

from benchmarks.alone import alone
from benchmarks.growth import tree_cpu
from benchmarks.load import Answers, Order, make_calls
from benchmarks.peers.seed_like import Producer
from benchmarks.peers.writing import PROCESSES
from benchmarks.pipeline import provision_peers, worker_process
from benchmarks.results import Row
from benchmarks.services import Server, embedded_aws, environ_of, http_api, memory_aws
from benchmarks.small.calls import api_key, get, post
from benchmarks.small.counts import costs, final_counts, wait_for
from benchmarks.small.rates import LATENCY_MS, SEED_LIKE, requests_of_one, submit_all
from mdstore.settings import Settings

_CLIENTS = 64
_WARM_UP = 2 * _CLIENTS
_API = "mdstore, HTTP API"


def rates(count: int) -> list[Row]:
    """Return the requests applied per second on the embedded AWS, from the first submission on."""
    return [
        {"contender": SEED_LIKE, "applied_per_s": alone(_seed_like_on_ministack, count)},
        {"contender": _API, "applied_per_s": _api_on_ministack(count)},
    ]


def cpu(count: int) -> tuple[list[Row], Row]:
    """Return the CPU of requests and of reads, and what a request costs."""
    with memory_aws(LATENCY_MS) as settings, _stack(settings) as stack:
        before, (api, worker) = final_counts(settings), stack.cpu_us()
        rate = stack.post(count)
        after, (api_after, worker_after) = final_counts(settings), stack.cpu_us()
        reads = stack.get(count)
        api_read, _ = stack.cpu_us()
    api_us, worker_us = (api_after - api) / count, (worker_after - worker) / count
    read_us = (api_read - api_after) / len(reads.took)
    requests = {
        "what": "request, submitted to applied",
        "per_s": rate,
        "api_cpu_us": api_us,
        "worker_cpu_us": worker_us,
    }
    return [
        {**requests, "cpu_us": api_us + worker_us},
        {"what": "read of a record", "per_s": reads.rate, "api_cpu_us": read_us, "cpu_us": read_us},
    ], {"contender": _API, **costs(before, after, count)}


@dataclass(kw_only=True)
class _Stack:
    """A running HTTP API and a worker."""

    settings: Settings
    api: Server
    worker: int
    key: str
    posted: int = 0

    def post(self, count: int) -> float:
        """Submit requests, wait until they are applied, and return how many were applied per second."""
        order = Order(port=self.api.port, clients=_CLIENTS, call=post(self.key), calls=count, first=self.posted)
        began = min(make_calls(order, expected=202).began)
        self.posted += count
        wait_for(self.settings, self.posted)
        return count / (time.monotonic() - began)

    def get(self, count: int) -> Answers:
        """Read records that were applied."""
        order = Order(port=self.api.port, clients=_CLIENTS, call=get(self.key), calls=min(count, self.posted))
        return make_calls(order, expected=200)

    def cpu_us(self) -> tuple[float, float]:
        """Return the microseconds of CPU that the API's and the worker's processes used so far."""
        return tree_cpu(self.api.pid) * 1e6, tree_cpu(self.worker) * 1e6


@contextmanager
def _stack(settings: Settings) -> Iterator[_Stack]:
    with (
        mock.patch.dict(os.environ, environ_of(settings)),
        http_api() as api,
        worker_process("mdstore") as worker,
    ):
        found = _Stack(settings=settings, api=api, worker=worker, key=api_key(settings))
        found.post(_WARM_UP)
        yield found


def _api_on_ministack(count: int) -> float:
    with embedded_aws() as settings, _stack(settings) as stack:
        return stack.post(count)


def _seed_like_on_ministack(count: int) -> float:
    with embedded_aws() as settings, mock.patch.dict(os.environ, environ_of(settings)), ExitStack() as processes:
        provision_peers()
        for _ in range(PROCESSES):
            processes.enter_context(worker_process("seed_like"))
        submits = [Producer().submit] * _CLIENTS
        submit_all(submits, requests_of_one(_WARM_UP))
        wait_for(settings, _WARM_UP)
        began = time.perf_counter()
        submit_all(submits, requests_of_one(count))
        wait_for(settings, _WARM_UP + count)
        return count / (time.perf_counter() - began)
