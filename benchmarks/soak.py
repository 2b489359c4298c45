"""50,000 tasks through one worker, an hour's worth of fourteen a second: memory, what is held, and what is left over.

Tasks are produced while they are consumed, one in ten with a retry and one in five hundred with arguments that go through S3.
Every fifth of the way the memory of the worker's main process is read, and of its largest child. At the end every task must
have run once (no machine was lost, so no message may come twice), the worker hold nothing, and the queues be empty.
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

from benchmarks.broker import place, produce
from benchmarks.peers import ran
from benchmarks.pipeline import worker_process
from benchmarks.results import Result, Row
from mdstore.local.emulator import free_port
from mdstore.settings import load_settings

_TASKS = 50_000
_PARTS = 5


def run(*, runs: int, scale: float) -> Result:  # noqa: ARG001  one run is long enough
    """Soak; rows have memory in MB by the number of tasks done."""
    part = int(_TASKS * scale) // _PARTS // 100 * 100
    port = free_port()
    rows: list[Row] = []
    with (
        place("noop_mdstore", latency_ms=0) as (app, _),
        mock.patch.dict(os.environ, {"MDSTORE_WORKER_PORT": str(port)}),
        worker_process("noop_mdstore") as worker,
    ):
        mixed = app.tasks["mixed"]
        for number in range(_PARTS):
            began = time.perf_counter()
            produce(mixed.si, part, number * part)
            seconds = time.perf_counter() - began
            rows.append({"tasks": (number + 1) * part, "tasks_per_s": round(part / seconds), **_memory(worker)})
        time.sleep(2)  # for a task that runs twice, and the last deletes
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
    """Messages of any kind in the queue and among the dead letters."""
    sqs, settings = boto3.client("sqs"), load_settings().settings
    found = 0
    for name in (settings.queue, settings.dead_letter_queue):
        url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
        counts = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        found += sum(int(value) for key, value in counts.items() if key.startswith("ApproximateNumberOfMessages"))
    return found
