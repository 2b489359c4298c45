"""A Celery app on SQS; it uses `mdstore.queue` and nothing of the data store."""
