"""Send some tasks and print their results: `python -m plain_celery_app.producer`."""

from __future__ import annotations

from celery import chain, chord

from .tasks import add_shipping, invoice, notify, price, report, total

TIMEOUT = 60  # seconds


def main() -> None:
    """Send all tasks first, then wait for their results."""
    results = {
        "chain": chain(price.s("tea", 2), add_shipping.s(), invoice.s())(),
        "chord": chord([price.s("tea", 2), price.s("coffee", 1), price.s("cup", 4)], total.s())(),
        "retry": notify.delay("Ada", failures=2),
        "second queue": report.delay(orders=3),
    }
    for name, result in results.items():
        print(f"{name}: {result.get(timeout=TIMEOUT)}")


if __name__ == "__main__":
    main()
