"""Wait for conditions in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(reached: Callable[[], T], *, within: float = 60.0, what: str = "") -> T:
    """Poll `reached` until it returns a true value, and return that value. Fail after `within` seconds."""
    deadline = time.monotonic() + within
    while not (found := reached()):
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.02)
    return found
