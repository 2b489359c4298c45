"""Measures how long a request of one operation waits behind another source's long lanes.

Run `python -m tests.integration.fair_lanes`.

Source `busy` sends six requests of 60,000 operations on one key, and then source `small` sends one operation.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from mdstore.client import Client
from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import stop_process
from mdstore.model import OpName
from mdstore.provision import provision
from mdstore.settings import load_settings

ROOT = Path(__file__).parents[2]
REQUESTS, OPERATIONS = 6, 60_000
#: `upsert`: operations that fold into few writes. `patch`: operations of which each is a wave of its own.
KINDS: tuple[OpName, ...] = ("upsert", "patch")


def history(op: OpName, count: int) -> Iterator[dict[str, Any]]:
    """Yield operations on one key, after an upsert that makes its record."""
    yield {"op": "upsert", "entity": "thing", "key": "hot", "data": {"n": 0}}
    for number in range(1, count):
        yield {"op": op, "entity": "thing", "key": "hot", "data": {"n": number}}


@contextmanager
def client_and_worker(aws: EmbeddedAws, log: Path, **environ: str) -> Iterator[Client]:
    """Run a worker with two pool processes in a new namespace; yields a client of the namespace."""
    made = {**os.environ, "AWS_ENDPOINT_URL": aws.url, "MDSTORE_NAMESPACE": f"fair-{uuid4().hex[:12]}", **environ}
    settings = load_settings(made).settings
    for _ in provision(settings):
        pass
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "workers.celery_app", "worker", "-l", "INFO", "-c", "2"],
            cwd=ROOT, env=made, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        client = Client(settings)
        client.submit([{"op": "upsert", "entity": "thing", "key": "first", "data": {}}]).wait(60)  # the worker is up
        yield client
    finally:
        stop_process(process)


def small_request_behind(client: Client, op: OpName, *, count: int = OPERATIONS) -> float:
    """Send the busy source's requests, then the small one; return the seconds until the small one is completed."""
    for number in range(REQUESTS):
        client.submit(history(op, count), request_id=f"busy{number}", source="busy")
    started = time.monotonic()
    one = {"op": "upsert", "entity": "thing", "key": "small", "data": {}}
    client.submit([one], request_id="small", source="small").wait(600)
    return time.monotonic() - started


def main() -> None:
    """Measure each kind."""
    with EmbeddedAws(port=free_port()) as aws, tempfile.TemporaryDirectory() as directory:
        for op in KINDS:
            with client_and_worker(aws, Path(directory) / f"{op}.log") as client:
                seconds = small_request_behind(client, op)
                print(
                    f"{REQUESTS} requests of {OPERATIONS} {op}s on one key; one operation took {seconds:.1f} s",
                    flush=True,
                )
                if op == "upsert":
                    started = time.monotonic()
                    for number in range(REQUESTS):
                        client.wait(f"busy{number}", timeout=600)
                    version = client.get("thing", "hot").version
                    print(f"all of them took {time.monotonic() - started:.1f} s more; version {version}", flush=True)


if __name__ == "__main__":
    main()
