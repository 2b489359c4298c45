"""A contender as a process of its own, which runs when it is told to: `python -m benchmarks.contender NAME`.

It takes one JSON object a line (`{"run": id, "operations": n}`), prepares, works, and answers with one line: CPU seconds (all
threads, user and system) and wall seconds of the work alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.write_contenders import CONTENDERS


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run's times in seconds."""

    operations: int
    cpu: float
    wall: float

    @property
    def cpu_us(self) -> float:
        """CPU microseconds an operation."""
        return self.cpu / self.operations * 1e6

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.wall


class Contender:
    """The parent's end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def run(self, *, run: str, operations: int) -> Measured:
        """Have it work once. Raises `RuntimeError` where it fails."""
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps({"run": run, "operations": operations}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended in the middle of a run")
        return Measured(operations=operations, **json.loads(line))


@contextmanager
def contender(name: str, environ: Mapping[str, str]) -> Iterator[Contender]:
    """Start the contender `name` with `environ` added to the environment."""
    process = subprocess.Popen(  # noqa: S603  our own module
        [sys.executable, "-m", "benchmarks.contender", name],
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Contender(process)
    finally:
        process.kill()
        process.wait()


def main(name: str) -> None:
    """Serve the parent."""
    made: Any = CONTENDERS[name]()
    for line in sys.stdin:
        asked = json.loads(line)
        work = made.prepare(asked["run"], asked["operations"])
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu, "wall": wall}), flush=True)
        del work


if __name__ == "__main__":
    main(sys.argv[1])
