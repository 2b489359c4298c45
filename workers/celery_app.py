"""`celery -A workers.celery_app worker`: the same worker as `mdstore worker`."""

from mdstore.queue import create_app

app = create_app()
app.conf.worker_concurrency = app.settings.concurrency
