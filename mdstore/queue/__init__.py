"""Run any Celery app on SQS: `create_app` makes the app, complete with transport, result backend and chords."""

from mdstore.queue.app import create_app
from mdstore.queue.broker.publisher import Unsent

__all__ = ["Unsent", "create_app"]
