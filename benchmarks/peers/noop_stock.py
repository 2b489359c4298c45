"""Celery on SQS: a task that does nothing but say that it ran.

Its queue is predefined and polled without pause (20 ms), so that it is not slowed down by kombu's default of a second.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from celery import Celery

from benchmarks.peers import writing
from benchmarks.peers.ran import note

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
    """Do nothing."""
    note(number)
