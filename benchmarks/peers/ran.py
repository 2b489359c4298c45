"""Records which tasks ran: many processes append the tasks' numbers, eight bytes each, to one file."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def _file(_pid: int) -> int:
    return os.open(os.environ["BENCH_RAN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def record_run(number: int) -> None:
    """Record that the task `number` ran."""
    os.write(_file(os.getpid()), number.to_bytes(8, "big"))


def count() -> int:
    """Return how many task runs were recorded."""
    path = Path(os.environ["BENCH_RAN"])
    return path.stat().st_size // 8 if path.exists() else 0
