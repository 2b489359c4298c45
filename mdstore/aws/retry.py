"""The one retry policy for calls that AWS did not answer, or answered with "not now": capped full jitter until a deadline.

Throttles and conflicts are expected contention, so time bounds the retries, not a number of attempts
(https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from mdstore.errors import Unavailable

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Random delays of up to `base`, 2 x `base`, 4 x `base` ... `cap` seconds. `patience` bounds calls without a deadline."""

    base: float = 0.05
    cap: float = 5.0
    patience: float = 20.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = field(default=random.uniform)

    def run(self, call: Callable[[], T], *, deadline: float | None = None) -> T:
        """Call until `call` succeeds. Raises the last `Unavailable` when the next attempt would come after `deadline`."""
        deadline = self.deadline(deadline)
        attempt = 0
        while True:
            try:
                return call()
            except Unavailable:
                delay = self.delay(attempt, deadline)
                if delay is None:
                    raise
                attempt += 1
                self.sleep(delay)

    def deadline(self, deadline: float | None) -> float:
        """Return `deadline`, or `patience` seconds from now if it is None."""
        return self.clock() + self.patience if deadline is None else deadline

    def delay(self, attempt: int, deadline: float) -> float | None:
        """Return the seconds to wait after failed attempt number `attempt` (from 0), or None if that would pass `deadline`."""
        delay = self.uniform(0, min(self.cap, self.base * 2 ** min(attempt, 30)))
        return None if self.clock() + delay > deadline else delay
