"""The noting app with a lease extender that is broken: `LEASES` says whether its thread fails once or hangs."""

from __future__ import annotations

import os
import threading
from typing import Any

import mdstore.queue.worker.watchdog
from mdstore.queue.broker.leases import LeaseExtender
from tests.integration.transport_app import app

__all__ = ["app"]

_send = LeaseExtender._send
_failures = [RuntimeError("on purpose")]


def _broken(self: LeaseExtender, changes: Any) -> None:
    if os.environ["LEASES"] == "hang":
        threading.Event().wait()
    if _failures:
        raise _failures.pop()
    _send(self, changes)


LeaseExtender._send = _broken  # type: ignore[method-assign]
mdstore.queue.worker.watchdog._MIN_LIMIT = 3.0
