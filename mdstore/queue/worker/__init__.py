"""Extend a Celery worker with a consumer, requests, periodic work and a watchdog."""
