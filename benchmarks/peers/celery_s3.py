"""Stock Celery on SQS, with a task per request that does what `seed_like` does: S3 get, and a transaction.

Its queue is predefined. It pauses for 20 ms between polls, so that kombu's default pause of a second does not slow it down.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from celery.signals import worker_process_init

from benchmarks.peers import writing
from benchmarks.peers.seed_like import Applier, Producer

_ENDPOINT = os.environ["AWS_ENDPOINT_URL"]

app = Celery("small", broker=f"sqs://{urlsplit(_ENDPOINT).netloc}//")
app.conf.update(
    broker_transport_options=writing.stock_options(_ENDPOINT, without_pause=True),
    task_default_queue=writing.QUEUE,
    task_acks_late=True,
    task_ignore_result=True,
    worker_concurrency=writing.PROCESSES,
    worker_hijack_root_logger=False,
)
_applier: Any = None


@worker_process_init.connect
def _connect(**_: Any) -> None:
    global _applier  # noqa: PLW0603  a task module would usually keep its client like this
    _applier = Applier()


@app.task(name="apply", shared=False)
def apply(key: str) -> None:
    """Apply one request."""
    _applier.apply(key)


class CeleryProducer(Producer):
    """Accepts requests: it stores each in S3, and sends a task that names it."""

    def submit(self, operations: list[dict[str, Any]]) -> None:
        """Accept one request."""
        apply.delay(self.store(operations))
