"""50,000 tasks through one worker, an hour's worth at 14 per second: memory, messages held, and messages left over.

The producer sends tasks while the worker consumes them. One task in ten is retried once, and one in five hundred has
arguments that go through S3. After each fifth of the tasks, the memory of the worker's main process and of its largest
child is read. At the end, every task must have run exactly once (no machine was lost, so no message may be delivered
twice), the worker must hold no messages, and the queues must be empty.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from typing import Any
from unittest import mock

import boto3
import psutil

from benchmarks.broker import contender_app, produce
from benchmarks.peers import ran
from benchmarks.pipeline import worker_process
from benchmarks.results import Result, Row
from mdstore.local.emulator import free_port
from mdstore.settings import load_settings

_TASKS = 50_000
_PARTS = 5


def run(*, runs: int, scale: float) -> Result:  # noqa: ARG001  one run is long enough
    """Run the soak test. Rows have the memory in MB by the number of tasks done."""
    part = int(_TASKS * scale) // _PARTS // 100 * 100
    port = free_port()
    rows: list[Row] = []
    with (
        contender_app("noop_mdstore", latency_ms=0) as (app, _),
        mock.patch.dict(os.environ, {"MDSTORE_WORKER_PORT": str(port)}),
        worker_process("noop_mdstore") as worker,
    ):
        mixed = app.tasks["mixed"]
        for number in range(_PARTS):
            began = time.perf_counter()
            produce(mixed.si, part, number * part)
            seconds = time.perf_counter() - began
            rows.append({"tasks": (number + 1) * part, "tasks_per_s": round(part / seconds), **_memory(worker)})
        time.sleep(2)  # so that duplicate runs and the last deletes are counted
        rows[-1] |= {"ran": ran.count(), "held": _held(port), "left": _left()}
    return Result(name="soak", title=__doc__ or "", runs=1, rows=rows)


def _memory(worker: int) -> dict[str, float]:
    process = psutil.Process(worker)
    children = [child.memory_info().rss for child in process.children(recursive=True)]
    return {
        "main_mb": round(process.memory_info().rss / 2**20, 1),
        "child_mb": round(max(children, default=0) / 2**20, 1),
    }


def _held(port: int) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez") as answer:
        return json.loads(answer.read())["held"]


def _left() -> int:
    """Return the number of messages in the queue and in the dead-letter queue, visible or not."""
    sqs, settings = boto3.client("sqs"), load_settings().settings
    found = 0
    for name in (settings.queue, settings.dead_letter_queue):
        url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
        counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        found += sum(int(value) for key, value in counts.items() if key.startswith("ApproximateNumberOfMessages"))
    return found
