"""An app whose worker is stopped: a watchdog of short limits, and settings of Celery's shutdown by the environment."""

from __future__ import annotations

import os
import time

from mdstore.queue.worker import watchdog
from tests.integration.transport_app import journaling_app, record

watchdog._MIN_LIMIT = 1.0
app = journaling_app()
app.conf.worker_soft_shutdown_timeout = float(os.environ.get("SOFT_SHUTDOWN", "0"))


@app.task(name="early", shared=False, acks_late=False)
def early(seconds: float) -> None:
    record("begins")
    time.sleep(seconds)
    record("ends")
