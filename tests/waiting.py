"""Wait for conditions in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LONGEST_PAUSE = 0.1  # seconds


def until(reached: Callable[[], T], *, within: float = 60.0, what: str = "") -> T:
    """Poll `reached` until it returns a true value, and return that value. Fail after `within` seconds."""
    deadline = time.monotonic() + within
    pause = 0.01
    while not (found := reached()):
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(pause)
        # What takes long is asked for less often: most questions go to the emulator, and other tests want the processor.
        pause = min(_LONGEST_PAUSE, pause * 1.5)
    return found
