"""Celery on SQS: app, transport, result backend and this project's tasks."""

from mdstore.queue.app import create_app
from mdstore.queue.outbox import Unsent

__all__ = ["Unsent", "create_app"]
