"""Tasks that do nothing, sent through SQS with 10 ms per call: this project's transport and kombu's.

One worker with two processes runs the tasks. The producer sends them in groups of 100 while the worker consumes them, so
that the emulator's queue stays short. A proxy counts the calls to SQS, including the producer's. `publish` is the time to
send a group of 1,000 tasks while no worker runs.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import boto3
from celery import Celery, Signature, group

from benchmarks.alone import alone
from benchmarks.peers import ran
from benchmarks.peers.writing import QUEUE
from benchmarks.pipeline import worker_process
from benchmarks.results import Result, Row, median
from benchmarks.services import embedded_aws, environ_of, proxy

_TASKS = 10_000
_GROUP = 100  # tasks sent at once
_MAX_QUEUED = 300  # most tasks in the queue
_PUBLISHED = 1_000
_LATENCY_MS = 10
CONTENDERS = {"stock Celery": "noop_stock", "mdstore": "noop_mdstore"}


def run(*, runs: int, scale: float) -> Result:
    """Measure. Rows have tasks per second, calls per task, and the seconds to publish."""
    tasks, published = int(_TASKS * scale), max(100, int(_PUBLISHED * scale))
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in CONTENDERS}
    for _ in range(runs):
        for name, module in CONTENDERS.items():
            for what, value in alone(_measure, module, tasks, published).items():
                found[name][what].append(value)
    rows: list[Row] = [
        {"contender": name, **{what: round(median(values), 3) for what, values in one.items()}}
        for name, one in found.items()
    ]
    stock, own = rows
    own["times_as_fast"] = round(own["tasks_per_s"] / stock["tasks_per_s"], 1)
    own["publish_times_as_fast"] = round(stock["publish_s"] / own["publish_s"], 1)
    return Result(name="broker", title=__doc__ or "", runs=runs, rows=rows)


def _measure(module: str, tasks: int, published: int) -> dict[str, float]:
    with contender_app(module) as (app, calls):
        noop = app.tasks["noop"]
        with worker_process(module):
            produce(noop.si, 2 * _GROUP, 0)
            calls_before, began = calls(), time.perf_counter()
            produce(noop.si, tasks, 2 * _GROUP)
            wall, calls_after = time.perf_counter() - began, calls()
            time.sleep(0.5)  # so that duplicate runs and the last deletes are counted
        twice = ran.count() - tasks - 2 * _GROUP
        if twice < 0:
            raise RuntimeError(f"{-twice} of {tasks} tasks did not run")
        began = time.perf_counter()
        group(noop.si(number) for number in range(published)).apply_async()
        publish = time.perf_counter() - began
    made = {name: calls_after[name] - calls_before.get(name, 0) for name in calls_after}
    return {
        "tasks_per_s": tasks / wall,
        "calls_per_task": sum(made.values()) / tasks,
        "publish_s": publish * _PUBLISHED / published,
        "ran_twice": twice,
    }


def produce(signature: Callable[[int], Signature], count: int, done: int) -> None:
    """Send `count` tasks in groups, and wait until all of them ran. `done` tasks ran before."""
    for sent in range(0, count, _GROUP):
        group(signature(number) for number in range(sent, sent + _GROUP)).apply_async()
        _wait_for(done + sent + _GROUP - _MAX_QUEUED)
    _wait_for(done + count)


def _wait_for(count: int) -> None:
    deadline = time.monotonic() + 300
    while ran.count() < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{ran.count()} of {count} tasks ran")
        time.sleep(0.005)


@contextmanager
def contender_app(
    module: str, *, latency_ms: float = _LATENCY_MS
) -> Iterator[tuple[Celery, Callable[[], dict[str, int]]]]:
    """Start an emulator behind a proxy; yields the contender's app, and a function that returns the calls so far."""
    with embedded_aws() as settings, tempfile.TemporaryDirectory() as directory:
        upstream = int(str(settings.endpoint_url).rpartition(":")[2])
        with proxy(upstream, latency_ms) as port:
            endpoint = f"http://127.0.0.1:{port}"
            environ = {
                **environ_of(settings),
                "AWS_ENDPOINT_URL_SQS": endpoint,
                "BENCH_RAN": str(Path(directory) / "ran"),
            }
            with mock.patch.dict(os.environ, environ):
                boto3.client("sqs").create_queue(QueueName=QUEUE, Attributes={"VisibilityTimeout": "300"})
                peer = importlib.import_module(f"benchmarks.peers.{module}")
                yield peer.app, lambda: _calls(endpoint)


def _calls(endpoint: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{endpoint}/_calls") as answer:  # noqa: S310  our own proxy
        found: dict[str, int] = json.loads(answer.read())
    return found
