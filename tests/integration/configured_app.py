"""An app that is written as Celery's documentation writes one: an object of configuration, shared tasks, queues by routes."""

from __future__ import annotations

from types import SimpleNamespace

from celery import shared_task

from mdstore.queue import create_app

app = create_app(name="configured")
app.config_from_object(
    SimpleNamespace(
        CELERY_TASK_DEFAULT_QUEUE="emails",
        CELERY_TASK_TRACK_STARTED=True,
        CELERY_TASK_ROUTES={"slow": {"queue": "reports"}},
        CELERY_TASK_CREATE_MISSING_QUEUES=True,
        CELERY_WORKER_POOL_START_METHOD="spawn",
        CELERY_IMPORTS=["tests.integration.configured_app"],
    ),
    namespace="CELERY",
)


@shared_task(name="quick")
def quick(number: int) -> int:
    return number + 1


@app.task(name="slow", bind=True)
def slow(self: object) -> str:
    return str(self.request.delivery_info["routing_key"])  # type: ignore[attr-defined]
