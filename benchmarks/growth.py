"""One request of a thousand to a million operations: CPU per operation and peak memory of producer and worker.

A stand-in answers transactions at once, so only the worker's own cost is measured, and no emulator has to hold a million
records. Ledger, results, queue and payloads are in the embedded AWS. A small request is repeated until 150,000 operations
are done, but at most a hundred times, because CPU times of a few milliseconds cannot be measured. Runs are short so that
there can be many of them, because the speed of a shared machine varies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast
from unittest import mock

import psutil

from benchmarks.pipeline import worker_process
from benchmarks.producer import peak_mb
from benchmarks.records import operations
from benchmarks.results import Result, Row, median
from benchmarks.services import embedded_aws, environ_of, stub
from mdstore import exactjson
from mdstore.client import Client

SIZES = (1_000, 10_000, 100_000, 1_000_000)
_AT_LEAST, _AT_MOST = 150_000, 100  # least operations and most requests of one measurement


def run(*, runs: int, scale: float) -> Result:
    """Measure. Rows have CPU in microseconds per operation, and peak memory in MB, of producer and worker."""
    found: dict[int, dict[str, list[float]]] = {size: defaultdict(list) for size in SIZES if size * scale >= 100}
    for _ in range(runs):
        for size, values in found.items():
            for name, value in _measure(int(size * scale), int(_AT_LEAST * scale)).items():
                values[name].append(value)
    rows: list[Row] = [
        {"operations": int(size * scale), **{name: round(median(values), 1) for name, values in found[size].items()}}
        for size in found
    ]
    return Result(name="growth", title=__doc__ or "", runs=runs, rows=rows)


def _measure(size: int, at_least: int) -> dict[str, float]:
    repeats = max(1, min(at_least // size, _AT_MOST))
    with (
        embedded_aws() as settings,
        stub(0, upstream=int(str(settings.endpoint_url).rpartition(":")[2])) as port,
        mock.patch.dict(os.environ, {**environ_of(settings), "AWS_ENDPOINT_URL_DYNAMODB": f"http://127.0.0.1:{port}"}),
        tempfile.TemporaryDirectory() as directory,
        worker_process("mdstore") as worker,
    ):
        client = Client()
        client.submit([{"op": "upsert", "entity": "warm", "key": str(n), "data": {}} for n in range(5_000)]).wait()
        file = _file(Path(directory), size)
        with _producer(file) as produce:
            before, produced = tree_cpu(worker), []
            for _ in range(repeats):
                request_id = str(uuid.uuid4())
                produced.append(produce(request_id))
                client.wait(request_id, timeout=900, interval=0.25)
            consumed = tree_cpu(worker) - before
        return {
            "producer_cpu_us": sum(one["cpu"] for one in produced) / (size * repeats) * 1e6,
            "worker_cpu_us": consumed / (size * repeats) * 1e6,
            "producer_peak_mb": max(one["peak_mb"] for one in produced),
            "worker_peak_mb": max(peak_mb(process.pid) for process in _tree(worker)),
        }


def _file(directory: Path, size: int) -> Path:
    path = directory / "operations.jsonl"
    with path.open("wb") as file:
        for operation in operations(size, "growth"):
            file.write(exactjson.dumps(operation) + b"\n")
    return path


@contextmanager
def _producer(file: Path) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Run a producer; yields a function that lets it submit the file under a request id, and returns its measurements."""
    command = [sys.executable, "-m", "benchmarks.producer", os.fspath(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  our own module
        stdin, stdout = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)

        def produce(request_id: str) -> dict[str, Any]:
            print(request_id, file=stdin, flush=True)
            measured: dict[str, Any] = json.loads(stdout.readline())
            return measured

        yield produce


def _tree(worker: int) -> list[psutil.Process]:
    parent = psutil.Process(worker)
    return [parent, *parent.children(recursive=True)]


def tree_cpu(worker: int) -> float:
    """Return the CPU seconds that a worker's processes have used so far."""
    return sum(sum(process.cpu_times()[:2]) for process in _tree(worker))
