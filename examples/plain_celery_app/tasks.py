"""The tasks of a small shop. Prices are in cents."""

from __future__ import annotations

from celery import Task
from celery.utils.log import get_task_logger

from .app import app

logger = get_task_logger(__name__)

PRICES = {"coffee": 650, "tea": 420, "cup": 900}
SHIPPING = 490


@app.task
def price(item: str, quantity: int) -> int:
    """Price one line of an order."""
    return PRICES[item] * quantity


@app.task
def total(prices: list[int]) -> int:
    """Add up an order's lines."""
    return sum(prices)


@app.task
def add_shipping(cents: int) -> int:
    """Add the cost of shipping."""
    return cents + SHIPPING


@app.task
def invoice(cents: int) -> str:
    """Format the amount for the customer."""
    return f"{cents / 100:.2f} EUR"


@app.task(bind=True, autoretry_for=(ConnectionError,), retry_backoff=1, retry_jitter=False, max_retries=5)
def notify(self: Task, customer: str, failures: int) -> str:
    """Send a message through a service that fails the first `failures` tries; Celery retries after 1, 2, 4, ... s."""
    tries = self.request.retries + 1
    if tries <= failures:
        raise ConnectionError(f"the service did not answer try {tries}")
    return f"{customer} notified at try {tries}"


@app.task(bind=True)
def report(self: Task, orders: int) -> str:
    """Report on `orders` orders; the result names the worker that ran this task."""
    return f"{orders} orders, reported by {self.request.hostname}"


@app.task(ignore_result=True)
def refresh_rates() -> None:
    """Fetch exchange rates; beat sends this task every two seconds."""
    logger.info("exchange rates are fresh")
