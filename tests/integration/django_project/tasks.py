"""The project's tasks, which Celery discovers."""

from __future__ import annotations

import time

from celery import shared_task
from celery_once import QueueOnce
from celery_singleton import Singleton


@shared_task(name="greet")
def greet(name: str) -> str:
    return f"hello {name}"


@shared_task(name="once", base=QueueOnce, once={"graceful": True})
def once(seconds: float) -> str:
    time.sleep(seconds)
    return "once"


@shared_task(name="single", base=Singleton)
def single(seconds: float) -> str:
    time.sleep(seconds)
    return "single"
