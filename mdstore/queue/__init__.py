"""Celery on SQS for any Celery app: `create_app` makes the app; transport, results and chords come with it."""

from mdstore.queue.app import create_app
from mdstore.queue.broker.publisher import Unsent

__all__ = ["Unsent", "create_app"]
