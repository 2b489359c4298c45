"""The app for `celery -A workers.celery_app worker`, which runs the same worker as `mdstore worker`."""

from mdstore.tasks import create_store_app

app = create_store_app()
app.conf.worker_concurrency = app.settings.concurrency
