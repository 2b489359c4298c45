"""Celery on SQS: app, transport, result backend and this project's tasks."""

from mdstore.queue.app import create_app

__all__ = ["create_app"]
