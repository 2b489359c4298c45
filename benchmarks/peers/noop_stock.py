"""Stock Celery on SQS, with a task that only records that it ran.

Its queue is predefined. It pauses for 20 ms between polls, so that kombu's default pause of a second does not slow it down.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from celery import Celery

from benchmarks.peers import writing
from benchmarks.peers.ran import record_run

_ENDPOINT = os.environ["AWS_ENDPOINT_URL_SQS"]

app = Celery("stock", broker=f"sqs://{urlsplit(_ENDPOINT).netloc}//")
app.conf.update(
    broker_transport_options=writing.stock_options(_ENDPOINT, without_pause=True),
    task_default_queue=writing.QUEUE,
    task_acks_late=True,
    task_ignore_result=True,
    worker_concurrency=writing.PROCESSES,
    worker_hijack_root_logger=False,
)


@app.task(name="noop", shared=False)
def noop(number: int) -> None:
    """Do nothing but record the run."""
    record_run(number)
