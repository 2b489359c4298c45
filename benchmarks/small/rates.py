"""Producers submit all requests before two worker processes start: this project, its peers, and twenty lines of boto3."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.alone import alone
from benchmarks.peers.seed_like import Producer
from benchmarks.peers.writing import PROCESSES
from benchmarks.pipeline import listed, provision_peers, worker_process
from benchmarks.results import Row, percentile
from benchmarks.services import environ_of, memory_aws
from benchmarks.small.counts import costs, counts, final_counts, wait_for
from mdstore.client import Client
from mdstore.settings import Settings

Operations = list[dict[str, Any]]
Submit = Callable[[Operations], object]
LATENCY_MS = 10.0
SEED_LIKE, IN_BATCHES = "seed-like", "mdstore, in batches"
_WARM_UP = 0.1  # the part of all requests that is applied before the measurement begins
_RATES = ("clients", "accepted_per_s", "applied_per_s")


class Submitted(NamedTuple):
    """When each submission began and how long it took, in seconds."""

    began: list[float]
    took: list[float]

    @property
    def rate(self) -> float:
        """Submissions per second."""
        return len(self.took) / (max(map(sum, zip(*self, strict=True))) - min(self.began))

    def milliseconds(self, share: float) -> float:
        """Return a percentile."""
        return percentile(self.took, share) * 1e3


def requests_of_one(count: int) -> Iterator[Operations]:
    """Yield requests of one operation each."""
    return ([operation] for operation in listed(count))


def submit_all(submits: Sequence[Submit], requests: Iterable[Operations]) -> Submitted:
    """Submit all requests: each of `submits` is called by a thread of its own, again and again."""
    waiting, lock = iter(requests), threading.Lock()

    def work(submit: Submit) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        while True:
            with lock:
                request = next(waiting, None)
            if request is None:
                return found
            began = time.perf_counter()
            submit(request)
            found.append((began, time.perf_counter() - began))

    with ThreadPoolExecutor(len(submits)) as threads:
        calls = [call for found in threads.map(work, submits) for call in found]
    return Submitted([began for began, _ in calls], [took for _, took in calls])


def rows(names: Iterable[str], count: int) -> tuple[list[Row], list[Row]]:
    """Measure the named contenders. The first rows have their rates, the second ones the costs of their requests."""
    measured = [{"contender": name, **alone(_measure, name, count)} for name in names]
    rates: list[Row] = [{name: row[name] for name in ("contender", *_RATES)} for row in measured]
    return rates, [{name: value for name, value in row.items() if name not in _RATES} for row in measured]


def _measure(name: str, count: int) -> Row:
    contender = CONTENDERS[name]
    with (
        memory_aws(LATENCY_MS) as settings,
        mock.patch.dict(os.environ, environ_of(settings)),
        ExitStack() as stack,
    ):
        provision_peers()
        submits, before = contender.submits(settings, stack), counts(settings)
        submit_all(submits, requests_of_one(len(submits)))  # each client connects
        accepted = submit_all(submits, requests_of_one(count)).rate
        total = len(submits) + count
        for _ in range(contender.workers):
            stack.enter_context(worker_process(contender.worker))
        first = wait_for(settings, round(total * _WARM_UP))
        began = time.perf_counter()
        wait_for(settings, total)
        applied = (total - first) / (time.perf_counter() - began)
        after = final_counts(settings)
    rates = dict(zip(_RATES, (len(submits), accepted, applied), strict=True))
    return {**rates, **costs(before, after, total)}


class _Contender(NamedTuple):
    """How requests are submitted, one function for each client; the worker (of `worker_process`), and how many of it run."""

    submits: Callable[[Settings, ExitStack], Sequence[Submit]]
    worker: str
    workers: int = 1


def _together(clients: int, settings: Settings, _: ExitStack) -> Sequence[Submit]:
    return [Client(settings).submit] * clients


def _one_by_one(clients: int, settings: Settings, stack: ExitStack) -> Sequence[Submit]:
    return [_together(1, settings, stack)[0] for _ in range(clients)]


def _seed_like(clients: int, _settings: Settings, _: ExitStack) -> Sequence[Submit]:
    return [Producer().submit] * clients


def _celery(clients: int, _settings: Settings, _: ExitStack) -> Sequence[Submit]:
    from benchmarks.peers.celery_s3 import CeleryProducer  # noqa: PLC0415  it reads the environment

    return [CeleryProducer().submit] * clients


def _taskiq(clients: int, _: Settings, stack: ExitStack) -> Sequence[Submit]:
    from benchmarks.peers.taskiq_sqs import apply, broker  # noqa: PLC0415  it reads the environment

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def call(made: Coroutine[Any, Any, object]) -> object:
        return asyncio.run_coroutine_threadsafe(made, loop).result()

    def submit(operations: Operations) -> object:
        # A message in a batch is not sent yet when `kiq` returns, so that a crash would lose it.
        return call(apply.kicker().with_labels(skip_batching=True).kiq(operations))

    call(broker.startup())
    stack.callback(lambda: call(broker.shutdown()))
    return [submit] * clients


CONTENDERS = {
    SEED_LIKE: _Contender(partial(_seed_like, 32), "seed_like", PROCESSES),
    "stock Celery, no pause": _Contender(partial(_celery, 32), "celery_s3"),
    "taskiq + taskiq-aio-sqs": _Contender(partial(_taskiq, 32), "taskiq_sqs"),
    "mdstore, one by one": _Contender(partial(_one_by_one, 32), "mdstore"),
    IN_BATCHES: _Contender(partial(_together, 64), "mdstore"),
}
