"""A Celery app on SQS that uses `mdstore.queue` and nothing of the data store."""
