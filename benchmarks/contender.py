"""A contender in a process of its own: `python -m benchmarks.contender NAME`.

For each line of standard input (`{"run": id, "operations": n}`), it prepares and does its work. It then writes one line of JSON
with the CPU seconds (all threads, user and system) and wall seconds of the work alone.
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
    """The CPU and wall time of one run, in seconds."""

    operations: int
    cpu: float
    wall: float

    @property
    def cpu_us(self) -> float:
        """CPU microseconds per operation."""
        return self.cpu / self.operations * 1e6

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.wall


class Contender:
    """The parent's handle of a contender's process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def run(self, *, run: str, operations: int) -> Measured:
        """Let the contender work once. Raises `RuntimeError` if its process ends."""
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps({"run": run, "operations": operations}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} exited during a run")
        return Measured(operations=operations, **json.loads(line))


@contextmanager
def contender(name: str, environ: Mapping[str, str]) -> Iterator[Contender]:
    """Run the contender `name` with `environ` added to its environment."""
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
    """Work for the parent, once for each line of standard input."""
    candidate: Any = CONTENDERS[name]()
    for line in sys.stdin:
        order = json.loads(line)
        work = candidate.prepare(order["run"], order["operations"])
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu, "wall": wall}), flush=True)
        del work


if __name__ == "__main__":
    main(sys.argv[1])
