"""A pool: a process that has imported all that a worker imports, and forks workers, which start in a tenth of the time.

`python -m tests.chaos.worker_pool` reads orders from standard input, one line of JSON each, and answers with the worker's
process id. Each worker leads its own session. The pool ends when its standard input ends; the users end the workers.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

import msgspec
import psutil
from boto3.session import Session
from botocore.loaders import JSONFileLoader

ROOT = Path(__file__).parents[2]
#: Modules that every worker needs and that do not read the environment on import.
_IMPORTED = [
    "celery.apps.worker",
    "celery.bin.worker",
    "celery.concurrency.prefork",
    "celery.worker.consumer",
    "celery.worker.strategy",
    "celery.app.trace",
    "celery.backends.base",
    "kombu.asynchronous.aws.sqs.connection",
    "mdstore.tasks.app",
    "mdstore.queue.results.backend",
    "mdstore.tasks.tasks",
    "mdstore.queue.broker.channel",
]  # fmt: skip


class Order(msgspec.Struct, kw_only=True):
    """An order to start a worker: the module of its app, its environment, its log file, and its number of pool processes."""

    app: str
    environ: dict[str, str]
    log: str
    processes: int = 2


class WorkerPool:
    """A client of the pool's process. Threads may share it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders, self._answers = process.stdin, process.stdout
        self._lock = threading.Lock()
        self._started: list[psutil.Process] = []

    def start(self, app: str, environ: Mapping[str, str], log: Path, *, processes: int = 2) -> psutil.Process:
        """Start a worker; returns its process."""
        order = Order(app=app, environ=dict(environ), log=str(log), processes=processes)
        with self._lock:
            self._orders.write(msgspec.json.encode(order) + b"\n")
            self._orders.flush()
            worker = psutil.Process(int(self._answers.readline()))
            self._started.append(worker)
        return worker

    def kill_all(self) -> None:
        """Kill every started worker that still runs."""
        for worker in self._started:
            kill(worker)


@contextmanager
def worker_pool() -> Iterator[WorkerPool]:
    """Run a pool; at the end all its workers are killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.worker_pool"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        running = WorkerPool(process)
        try:
            yield running
        finally:
            running.kill_all()


def kill(worker: psutil.Process) -> None:
    """Kill a worker and its children with SIGKILL, unless it has ended; `psutil` detects a reused process id."""
    if worker.is_running():
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


def _serve(orders: IO[bytes]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children do not become zombies
    for line in orders:
        order = msgspec.json.decode(line, type=Order)
        child = os.fork()
        if child == 0:
            _become(order)
        print(child, flush=True)


def _become(order: Order) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.environ.clear()
    os.environ.update(order.environ)
    random.seed()
    with Path(order.log).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    app = importlib.import_module(order.app).app
    app.worker_main(["worker", "--loglevel", "INFO", "--concurrency", str(order.processes)])
    os._exit(0)


def _prepare() -> None:
    """Import the workers' modules and load boto's service descriptions, which would cost each worker half a second."""
    for name in _IMPORTED:
        importlib.import_module(name)
    read = JSONFileLoader.load_file
    read_once = cache(lambda path: read(JSONFileLoader(), path))
    JSONFileLoader.load_file = lambda _, path: read_once(path)  # type: ignore[method-assign,assignment]
    session = Session(region_name="us-east-1", aws_access_key_id="nobody", aws_secret_access_key="nothing")
    for service in ("s3", "sqs", "dynamodb"):
        session.client(service).close()


if __name__ == "__main__":
    _prepare()
    _serve(sys.stdin.buffer)
