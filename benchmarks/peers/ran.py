"""A file with the numbers of the tasks that ran, eight bytes each, written by many processes."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def _file(_pid: int) -> int:
    return os.open(os.environ["BENCH_RAN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(number: int) -> None:
    """This task ran."""
    os.write(_file(os.getpid()), number.to_bytes(8, "big"))


def count() -> int:
    """How many times any task ran."""
    path = Path(os.environ["BENCH_RAN"])
    return path.stat().st_size // 8 if path.exists() else 0
