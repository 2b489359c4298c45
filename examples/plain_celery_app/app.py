"""The Celery app: its queues, its routes and its schedule."""

from __future__ import annotations

from kombu import Queue

from mdstore.queue import create_app

app = create_app(name="shop", include=["plain_celery_app.tasks"])

#: Reports take long, so they have their own queue, where no order waits behind them.
REPORTS = f"{app.settings.queue}-reports"

app.conf.update(
    task_queues=[*app.conf.task_queues, Queue(REPORTS)],
    task_routes={"plain_celery_app.tasks.report": {"queue": REPORTS}},
    beat_schedule={
        "refresh-rates": {
            "task": "plain_celery_app.tasks.refresh_rates",
            "schedule": 2.0,  # seconds; a `crontab` works as well
            "options": {"expires": 30},  # seconds; runs that no worker starts in time are dropped
        },
    },
)
