"""A worker to attack: a namespace, a queue that takes any message, and the checks that the worker must pass afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from mdstore.client import Client
from mdstore.local.stack import kill_group
from mdstore.model import Reference
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.dead_letters import receive_dead_letters
from tests.processes import peak_memory
from tests.waiting import until

ROOT = Path(__file__).parents[2]
EVIL = "evil"  # the entity of all operations that must never be executed
LIMIT = 300 * 2**20  # bytes of memory per process, as in tests/acceptance/test_memory.py
Letter = dict[str, str]


@dataclass
class Target:
    """A namespace with one worker, and the means to attack it."""

    client: Client
    worker: psutil.Process
    log: Path
    letters: list[Letter] = field(default_factory=list)

    def store(self, request_id: str, entity: str, count: int) -> Reference:
        """Store a request of upserts and record it as accepted without sending its message; returns its reference."""
        operations = upserts(count, entity)
        return self.client.store.ingestor.accept(operations, request_id=request_id, publish=lambda _: None).reference

    def send(self, task: str, *args: Any) -> None:
        """Send a task as Celery would."""
        self.client.app.send_task(task, args=args)

    def send_raw(self, text: str) -> None:
        """Put a text into the queue unchanged."""
        sqs = self.client.store.aws.sqs
        sqs.send_message(QueueUrl=self._url(self.client.settings.queue), MessageBody=text)

    def put(self, key: str, body: bytes) -> None:
        """Put an object into the bucket."""
        self.client.store.aws.s3.put_object(Bucket=self.client.settings.bucket, Key=key, Body=body)

    def wait_for_letters(self, count: int) -> list[Letter]:
        """Wait for `count` dead letters; returns the body and attributes of each."""
        sqs = self.client.store.aws.sqs

        def received() -> bool:
            self.letters += receive_dead_letters(sqs, self.client.settings.dead_letter_queue)
            return len(self.letters) >= count

        until(received, within=120, what=f"{count} dead letters")
        return self.letters

    def wait_until_empty(self) -> None:
        """Wait until the queue has no visible and no hidden message."""
        sqs, url = self.client.store.aws.sqs, self._url(self.client.settings.queue)

        def empty() -> bool:
            attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
            return (
                attributes["ApproximateNumberOfMessages"] == attributes["ApproximateNumberOfMessagesNotVisible"] == "0"
            )

        until(empty, what="the queue is empty")

    def check_alive(self, processes: list[psutil.Process]) -> None:
        """Assert that the worker executes a valid message, that none of its processes ended, and that none used much memory."""
        self.client.submit(upserts(3, "good"), request_id=f"after/{uuid4()}").wait(timeout=60)
        assert [record.key for record in self.client.export(EVIL)] == [], "something evil was executed"
        assert self.processes() == processes, "a process has ended"
        peaks = [peak_memory(process.pid) for process in processes]
        print(f"peaks {[round(bytes_ / 2**20) for bytes_ in peaks]} MB")
        assert all(0 < bytes_ < LIMIT for bytes_ in peaks), peaks

    def processes(self) -> list[psutil.Process]:
        """Return the worker's main process and its children."""
        return [self.worker, *sorted(self.worker.children(recursive=True), key=lambda one: one.pid)]

    def _url(self, queue: str) -> str:
        return self.client.store.aws.sqs.get_queue_url(QueueName=queue)["QueueUrl"]


@contextmanager
def attacked(url: str, log: Path) -> Iterator[Target]:
    """Run a worker of two processes, which has executed a message. Messages are redelivered after 8 s, and only once."""
    environ = {
        **os.environ,
        "AWS_ENDPOINT_URL": url,
        "MDSTORE_NAMESPACE": f"hostile-{uuid4().hex[:12]}",
        "MDSTORE_WAIT_TIME": "1",
        "MDSTORE_VISIBILITY_TIMEOUT": "8",
        "MDSTORE_TASK_TIME_LIMIT": "7",
        "MDSTORE_LANE_BUDGET": "5",
        "MDSTORE_MAX_RECEIVES": "2",
        "MDSTORE_LANE_OPERATIONS": "100",
    }
    settings = load_settings(environ).settings
    for _ in provision(settings):
        pass
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mdstore", "worker"],
            cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        made = Target(Client(settings), psutil.Process(process.pid), log)
        made.client.submit(upserts(3, "good"), request_id="before").wait()
        yield made
    finally:
        kill_group(process)


def upserts(count: int, entity: str) -> list[dict[str, Any]]:
    """Return upserts of `count` keys."""
    return [{"op": "upsert", "entity": entity, "key": f"k{n}", "data": {"n": n}} for n in range(count)]
